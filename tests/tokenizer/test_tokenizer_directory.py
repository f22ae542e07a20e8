"""Checkpoint directories against transformers' reading of the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from aphrodite.errors import ModelFormatError
from aphrodite.tokenizer.loader import load_tokenizer


def write(path: Path, name: str, value: Any) -> None:
    (path / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def byte_level(corpus: list[str]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False), AddedToken("<mask>", lstrip=True)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s>:0 $A:0", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


def metaspace(corpus: list[str]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=True)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False, limit_alphabet=80)
    backend.train_from_iterator(corpus[:400], trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # the byte pieces are not special
    return tokenizers.Tokenizer.from_str(json.dumps(state))


@pytest.mark.parametrize("make", [byte_level, metaspace])
@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": "<s>", "eos_token": "</s>"},
        {"bos_token": {"content": "<s>", "__type": "AddedToken"}, "eos_token": "</s>", "add_eos_token": True},
        {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False},
        {
            "eos_token": "</s>",
            "added_tokens_decoder": {
                "9999": {"content": "<extra>", "special": True, "normalized": False},
                "10000": {"content": "<plain>", "special": False, "normalized": False, "rstrip": True},
            },
        },
    ],
)
def test_a_directory_reads_as_transformers_reads_it(
    tmp_path: Path, corpus: list[str], make: Any, config: dict[str, Any]
) -> None:
    from transformers import PreTrainedTokenizerFast

    make(corpus).save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    theirs, ours = PreTrainedTokenizerFast.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    texts = [*corpus[::4], "a <mask> b<think>c</s><extra> <plain>  d", "<s>", "<plain>"]
    for special in (True, False):
        expected = theirs(texts, add_special_tokens=special)["input_ids"]
        assert ours.encode_batch(texts, add_special_tokens=special) == expected
    for ids in expected:
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.special_ids == set(theirs.all_special_ids) | {
        i for i, token in theirs.added_tokens_decoder.items() if token.special
    }


@pytest.fixture
def directory(tmp_path: Path, corpus: list[str]) -> Path:
    byte_level(corpus).save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "from config"})
    return tmp_path


def test_all_ends_of_an_answer_are_known(directory: Path) -> None:
    write(directory, "generation_config.json", {"eos_token_id": [2, 1]})
    assert load_tokenizer(directory).eos_token_ids == (1, 2)


def test_ids_come_from_the_model_configuration_where_no_token_is_named(directory: Path) -> None:
    write(directory, "tokenizer_config.json", {})
    write(directory, "config.json", {"bos_token_id": 0, "eos_token_id": 2})
    ours = load_tokenizer(directory)
    assert (ours.bos_token_id, ours.eos_token_ids) == (0, (2,))


def test_templates_come_from_files_before_configuration(directory: Path) -> None:
    assert load_tokenizer(directory).chat_template == "from config"
    write(directory, "chat_template.jinja", "from file")
    (directory / "additional_chat_templates").mkdir()
    write(directory / "additional_chat_templates", "rag.jinja", "rag")
    ours = load_tokenizer(directory)
    assert dict(ours.chat_templates) == {"default": "from file", "rag": "rag"}


def test_templates_may_be_a_list_or_a_file_of_their_own(directory: Path) -> None:
    entries = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    write(directory, "tokenizer_config.json", {"chat_template": entries})
    assert dict(load_tokenizer(directory).chat_templates) == {"default": "a", "tool_use": "b"}
    write(directory, "tokenizer_config.json", {})
    write(directory, "chat_template.json", {"chat_template": "c"})
    assert load_tokenizer(directory).chat_template == "c"
    (directory / "chat_template.json").unlink()
    assert load_tokenizer(directory).chat_template is None


def test_one_file_may_be_named_directly(directory: Path) -> None:
    assert load_tokenizer(directory / "tokenizer.json").eos_token_id == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "damaged"),
        ("tokenizer.json", "not json", "damaged"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", "[]", "object"),
        ("generation_config.json", '{"eos_token_id": 99999}', "outside the vocabulary"),
    ],
)
def test_damaged_files_are_one_clear_error(directory: Path, name: str, content: str, message: str) -> None:
    write(directory, name, content)
    with pytest.raises(ModelFormatError, match=message):
        load_tokenizer(directory)


def test_ids_below_zero_stand_for_none(directory: Path) -> None:
    write(directory, "config.json", {"bos_token_id": -1, "eos_token_id": [-1, 1]})
    (directory / "tokenizer_config.json").unlink()
    (directory / "special_tokens_map.json").unlink(missing_ok=True)
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (None, (1,))


@pytest.mark.parametrize("key", ["²", "9" * 5000, "-3", "x"])
def test_added_tokens_under_keys_that_are_no_ids_are_added_at_the_end(directory: Path, key: str) -> None:
    size = load_tokenizer(directory).vocab_size
    write(directory, "tokenizer_config.json", {"added_tokens_decoder": {key: {"content": "<|odd|>", "special": True}}})
    assert load_tokenizer(directory).token_to_id("<|odd|>") == size


def test_missing_tokenizers_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="Download the tokenizer files"):
        load_tokenizer(tmp_path)
    with pytest.raises(ModelFormatError, match="no such file"):
        load_tokenizer(tmp_path / "nothing.gguf")


def test_a_decoder_that_cannot_stream_is_refused(directory: Path) -> None:
    state = json.loads((directory / "tokenizer.json").read_text())
    state["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    write(directory, "tokenizer.json", state)
    with pytest.raises(ModelFormatError, match="WordPiece"):
        load_tokenizer(directory)


def test_nothing_in_a_directory_is_executed(directory: Path) -> None:
    marker = directory / "marker"
    write(directory, "tokenization_evil.py", f"open({str(marker)!r}, 'w')")
    config = {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}, "tokenizer_class": "Evil"}
    write(directory, "tokenizer_config.json", config | {"eos_token": "</s>"})
    load_tokenizer(directory)
    assert not marker.exists()
