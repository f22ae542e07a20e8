"""Tokenizers from a checkpoint directory: tokenizer.json, else tokenizer.model or a vocabulary by rank, with the JSON
files beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from aphrodite.errors import ModelFormatError
from aphrodite.tokenizer.gguf import surround
from aphrodite.tokenizer.ranks import added_tokens, read_tekken, read_tiktoken, token_id_of
from aphrodite.tokenizer.sentencepiece import PieceType, Vocabulary, build, read_model_file
from aphrodite.tokenizer.tokenizer import SpecialTokens, Tokenizer

FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "tiktoken.model")  # the first that is there counts
_MOST_RESERVED = 1 << 12
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def load_directory(path: Path, file: Path | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint directory.

    Args:
        file: the one of `FILES` to read; None: the one that the directory has.

    Files read where there: one of `FILES`; tokenizer_config.json, special_tokens_map.json and
    added_tokens.json for special and added tokens; config.json and generation_config.json for token ids;
    chat_template.jinja, chat_template.json and additional_chat_templates/ for templates.

    Raises:
        ModelFormatError: there is no tokenizer, or one of the files is damaged.
    """
    config = _read_json(path / "tokenizer_config.json")
    names = _read_json(path / "special_tokens_map.json") | config
    ids = _read_json(path / "config.json") | _read_json(path / "generation_config.json")
    backend, own = _backend(file or _find(path), config)
    _add_tokens(backend, path, config, names)
    special = _special_tokens(backend, path, config, names, ids if own is None else own | ids)
    if own is not None:  # a tokenizer.json says itself what surrounds a text
        eos_id = special.eos_ids[0] if special.eos_ids else None
        surround(
            backend,
            special.bos_id if config.get("add_bos_token", True) else None,
            eos_id if config.get("add_eos_token", False) else None,
        )
    return Tokenizer(backend, special, str(path))


def _find(path: Path) -> Path:
    for name in FILES:
        if (file := path / name).is_file():
            return file
    raise ModelFormatError(
        f"{path}: there is none of {', '.join(FILES)} here. Download the tokenizer files of the model, "
        "or name a directory or GGUF file that has them with --tokenizer"
    )


def _backend(file: Path, config: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, int | None] | None]:
    """The tokenizer itself, and the token ids that a file names as config.json would; None where it says itself what
    surrounds a text."""
    if file.name == "tekken.json":
        return read_tekken(file), {"bos_token_id": 1, "eos_token_id": 2}
    if file.name == "tiktoken.model":
        return read_tiktoken(file, added_tokens(config)), None
    if file.suffix == ".model":
        vocabulary = read_model_file(file)
        _name_reserved(vocabulary, config)
        return build(vocabulary), {"bos_token_id": vocabulary.bos_id, "eos_token_id": vocabulary.eos_id}
    try:
        return tokenizers.Tokenizer.from_file(str(file)), None
    except Exception as error:  # the library raises bare Exception for every fault in the file
        raise ModelFormatError(f"{file}: not a tokenizer, or damaged ({error}); download it again") from None


def _name_reserved(vocabulary: Vocabulary, config: Mapping[str, Any]) -> None:
    """Give entries of the vocabulary the names that `added_tokens_decoder` has for their ids, as InternLM 2 does with
    those that its training left unused."""
    known = set(vocabulary.pieces)
    for token_id, name in added_tokens(config).items():
        if token_id < len(vocabulary.pieces) and name not in known:
            entry = config["added_tokens_decoder"].get(str(token_id), {})
            vocabulary.pieces[token_id] = name
            vocabulary.types[token_id] = PieceType.CONTROL if entry.get("special") else PieceType.USER_DEFINED


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise ModelFormatError(f"{file}: not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise ModelFormatError(f"{file}: a JSON object is expected here; download it again")
    return value


def _text(value: Any) -> str | None:
    """A token that is given as its text or as an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _add_tokens(backend: tokenizers.Tokenizer, path: Path, config: Mapping[str, Any], names: Mapping[str, Any]) -> None:
    """Add what the configuration knows and the tokenizer does not: added tokens by id, then the named ones."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict):
        raise ModelFormatError(f"{path / 'tokenizer_config.json'}: added_tokens_decoder must be an object")
    for key, entry in sorted(listed.items(), key=lambda item: token_id_of(item[0])):
        if isinstance(entry, dict) and (content := _text(entry)) is not None and content not in known:
            if backend.token_to_id(content) is None:
                _reserve_up_to(backend, token_id_of(key))
            flags = {name: bool(entry.get(name, False)) for name in ("lstrip", "rstrip", "single_word", "normalized")}
            special = bool(entry.get("special", False))
            token = AddedToken(content, special=special, **flags)
            (backend.add_special_tokens if special else backend.add_tokens)([token])
            known.add(content)
    legacy = {name: i for name, i in _read_json(path / "added_tokens.json").items() if type(i) is int}
    for content in sorted(legacy.keys() - known, key=legacy.__getitem__):
        if backend.token_to_id(content) is None:
            _reserve_up_to(backend, legacy[content])
        backend.add_tokens([AddedToken(content, special=False, normalized=False)])
    for name in _NAMED:
        if (content := _text(names.get(name))) is not None:
            backend.add_special_tokens([AddedToken(content, special=True, normalized=False)])


def _reserve_up_to(backend: tokenizers.Tokenizer, token_id: int) -> None:
    """Fill ids that nothing names, so that the next token that is added gets `token_id`."""
    first = backend.get_vocab_size(with_added_tokens=True)
    if first < token_id < first + _MOST_RESERVED:
        names = [f"<|reserved_token_{number}|>" for number in range(first, token_id)]
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])


def _special_tokens(
    backend: tokenizers.Tokenizer,
    path: Path,
    config: Mapping[str, Any],
    names: Mapping[str, Any],
    ids: Mapping[str, Any],
) -> SpecialTokens:
    def named(name: str) -> list[int]:
        text = _text(names.get(name))
        token_id = None if text is None else backend.token_to_id(text)
        return [] if token_id is None else [token_id]

    def listed(name: str) -> list[int]:
        value = ids.get(name)
        values = value if isinstance(value, list) else [value]
        return [item for item in values if type(item) is int and item >= 0]  # -1 stands for none

    bos = named("bos_token") or listed("bos_token_id")
    return SpecialTokens(
        bos_id=bos[0] if bos else None,
        eos_ids=tuple(named("eos_token") + listed("eos_token_id")),
        templates=_templates(path, config.get("chat_template")),
    )


def _templates(path: Path, configured: Any) -> dict[str, str]:
    """All chat templates by name; a file of its own wins over one in a JSON file."""
    if configured is None:
        configured = _read_json(path / "chat_template.json").get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(configured, str):
        templates["default"] = configured
    elif isinstance(configured, list):
        templates = {
            str(entry["name"]): str(entry["template"])
            for entry in configured
            if isinstance(entry, dict) and "name" in entry and "template" in entry
        }
    files = {file.stem: file for file in sorted((path / "additional_chat_templates").glob("*.jinja"))}
    if (main := path / "chat_template.jinja").is_file():
        files["default"] = main
    for name, file in files.items():
        try:
            templates[name] = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ModelFormatError(f"{file}: not UTF-8 text; download it again") from None
    return templates
