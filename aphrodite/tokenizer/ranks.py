"""Byte-level vocabularies by rank: Mistral's tekken.json and tiktoken.model.

Such a file lists tokens as bytes, in the order in which they were learned, and merges are not in it: of two neighbours
those are joined first whose joint token has the lowest rank (https://github.com/openai/tiktoken). tekken.json has the
pattern that cuts words and special tokens beside it; tiktoken.model has nothing else, so that of Kimi's and Moonlight's
alone is known what belongs to it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from aphrodite.errors import ModelFormatError
from aphrodite.loading.config_reader import ConfigReader, load_json_object
from aphrodite.loading.files import read_small_file
from aphrodite.tokenizer.pieces import BYTE_ALPHABET
from aphrodite.tokenizer.pretokenizers import PRE_TOKENIZERS

MAX_TOKENS = 1 << 20
MAX_TOKEN_BYTES = 1 << 10
_ID_DIGITS = 9
# Before version 7 tekken.json does not list them.
_TEKKEN_SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
_KIMI_MARK = "<|im_middle|>"
_LETTERS = {byte: letter for letter, byte in BYTE_ALPHABET.items()}


def read_tekken(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a tekken.json: special tokens come first, the vocabulary's tokens after them.

    Raises:
        ModelFormatError: the file is damaged.
    """
    values = load_json_object(path)
    config = ConfigReader(path, values).section("config")
    if config is None:
        raise _damaged(path, "it has no config")
    reserved = config.read("default_num_special_tokens", int, low=1, high=MAX_TOKENS)
    size = config.read("default_vocab_size", int, low=reserved + 1, high=MAX_TOKENS)
    entries, listed = values.get("vocab"), values.get("special_tokens")
    if not isinstance(entries, list) or len(entries) < size - reserved:
        raise _damaged(path, f"its vocabulary has not the {size - reserved} tokens that its config says")
    tokens = [_decoded(path, entry.get("token_bytes") if isinstance(entry, dict) else None) for entry in entries]
    names = dict(enumerate(_TEKKEN_SPECIAL))
    if isinstance(listed, list):
        names = {entry["rank"]: entry["token_str"] for entry in listed if _is_special(entry, reserved)}
    special = [names.get(number, f"<SPECIAL_{number}>") for number in range(reserved)]
    try:
        split = pre_tokenizers.Split(Regex(config.read("pattern", str)), "isolated")
    except Exception as error:  # which the library raises bare
        raise _damaged(path, f"its pattern is no regular expression ({error})") from None
    words = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    ids = {token: reserved + rank for rank, token in enumerate(tokens[: size - reserved])}
    return _built(path, ids, dict(enumerate(special)), words)


def _is_special(entry: object, reserved: int) -> bool:
    if not isinstance(entry, dict):
        return False
    rank, name = entry.get("rank"), entry.get("token_str")
    return type(rank) is int and 0 <= rank < reserved and isinstance(name, str) and name != ""


def read_tiktoken(path: Path, added: Mapping[int, str]) -> tokenizers.Tokenizer:
    """The tokenizer of a tiktoken.model: a line for each token, its bytes in base64 and its rank.

    Args:
        added: special tokens by id, which tokenizer_config.json has; ids between them are reserved.

    Raises:
        ModelFormatError: the file is damaged, or of a model whose pattern for words is not known.
    """
    if _KIMI_MARK not in added.values():
        raise ModelFormatError(
            f"{path}: how the words of this vocabulary are cut is only in code that comes with the model, which is "
            "never run; use a version of the model with a tokenizer.json, or a GGUF file"
        )
    ids: dict[bytes, int] = {}
    for line in read_small_file(path).split(b"\n"):
        if line:
            text, _, rank = line.partition(b" ")
            if rank.strip() != b"%d" % len(ids):
                raise _damaged(path, f"its ranks do not count upwards at {line[:60]!r}")
            ids[_decoded(path, text.decode("latin-1"))] = len(ids)
    behind = {token_id: name for token_id, name in added.items() if len(ids) <= token_id < MAX_TOKENS}
    if not behind:
        raise _damaged(path, f"no special token comes after its {len(ids)} tokens")
    names = {i: behind.get(i, f"<|reserved_token_{i}|>") for i in range(len(ids), max(behind) + 1)}
    return _built(path, ids, names, PRE_TOKENIZERS["kimi-k2"].build())


def _built(
    path: Path,
    ids: Mapping[bytes, int],
    special: Mapping[int, str],
    words: pre_tokenizers.PreTokenizer,
) -> tokenizers.Tokenizer:
    """Byte-level BPE of tokens with their ids; ranks are in the order of ids."""
    if any(bytes([byte]) not in ids for byte in range(256)):
        raise _damaged(path, "its vocabulary lacks some single bytes")
    spelled = {"".join(map(_LETTERS.__getitem__, token)): token_id for token, token_id in ids.items()}
    spelled |= {name: token_id for token_id, name in special.items()}
    if len(spelled) != len(ids) + len(special):
        raise _damaged(path, "some of its tokens are there twice")
    # A word that is a token is that token, whatever ranks say.
    model = models.BPE(vocab=spelled, merges=_merges(ids), ignore_merges=True)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = words
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(special[i], special=True, normalized=False) for i in sorted(special)])
    return backend


def _merges(ids: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """All ways to join two tokens to a third, in the order of the third's rank, then of the first's.

    A longer part is no token of which a shorter one has a lower rank to be joined first, so that any of them leads to
    what ranks alone do.
    """
    found: list[tuple[str, str]] = []
    spelled = {token: "".join(map(_LETTERS.__getitem__, token)) for token in ids}
    for token in sorted(ids, key=ids.__getitem__):
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = sorted((ids[left], ids[right], left, right) for left, right in pairs if left in ids and right in ids)
        found += [(spelled[left], spelled[right]) for _, _, left, right in known]
    return found


def _decoded(path: Path, text: object) -> bytes:
    """A token's bytes."""
    try:
        token = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError):
        token = b""
    if not 0 < len(token) <= MAX_TOKEN_BYTES:
        raise _damaged(path, f"a token is {str(text)[:60]!r} instead of bytes in base64")
    return token


def added_tokens(config: Mapping[str, object]) -> dict[int, str]:
    """Tokens by id of tokenizer_config.json's `added_tokens_decoder`."""
    listed = config.get("added_tokens_decoder")
    found: dict[int, str] = {}
    for key, entry in listed.items() if isinstance(listed, dict) else ():
        content = entry.get("content") if isinstance(entry, dict) else None
        if isinstance(content, str) and (token_id := token_id_of(key)) >= 0:
            found[token_id] = content
    return found


def token_id_of(key: str) -> int:
    """The id that a key of `added_tokens_decoder` is; -1 for what is none."""
    return int(key) if key.isascii() and key.isdigit() and len(key) <= _ID_DIGITS else -1


def _damaged(path: Path, problem: str) -> ModelFormatError:
    return ModelFormatError(f"{path}: {problem}; the file is damaged: download it again")
