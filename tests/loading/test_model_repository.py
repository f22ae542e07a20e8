"""Which files of a repository are chosen, from names and sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aphrodite.errors import ConfigError
from aphrodite.loading.repository import PREFERRED, Room, Selection, gguf_models, select

GB = 10**9


def chosen(files: dict[str, int], folder: Path | None = None, **options: Any) -> Selection:
    settings: dict[str, Any] = {"variant": None, "load_format": "auto", "room": lambda: Room(12 * GB, "memory")}

    def fetch(name: str) -> Path:
        assert folder is not None
        return folder / name

    return select("org/name", files, fetch=fetch, **{**settings, **options})


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("model.Q4_K_M.gguf", "Q4_K_M"),
        ("Llama-3.2-3B-Instruct-Q6_K_L.gguf", "Q6_K_L"),
        ("Qwen3-8B-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("mistral-7b-iq3_xxs.gguf", "IQ3_XXS"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("tiny-fp16.gguf", "F16"),
        ("Qwen2-7B.gguf", ""),
        ("gemma-2-9b.BF16.gguf", "BF16"),
        ("Q5_K_M/model.gguf", "Q5_K_M"),
        ("some-7B-TQ1_0.gguf", "TQ1_0"),
    ],
)
def test_a_files_name_tells_its_quantization(name: str, label: str) -> None:
    (model,) = gguf_models({name: 1})
    assert model.label == label


def test_split_models_are_whole_or_not_there() -> None:
    parts = {f"Q8_0/big-Q8_0-0000{number}-of-00003.gguf": 5 * GB for number in (1, 2, 3)}
    (model,) = gguf_models({**parts, "big-Q4_K_M-00001-of-00002.gguf": GB})
    assert (model.label, model.size, len(model.files)) == ("Q8_0", 15 * GB, 3)


def test_safetensors_come_before_gguf_files_and_say_so() -> None:
    files = {"config.json": 1, "model.safetensors": 9, "a-Q4_K_M.gguf": 4}
    found = chosen(files)
    assert (found.files, found.entry) == (("config.json", "model.safetensors"), None)
    assert "it also has GGUF files: Q4_K_M (name one: org/name:Q4_K_M)" in found.reason
    assert chosen(files, load_format="gguf").entry == "a-Q4_K_M.gguf"


def test_one_set_of_weights_is_enough(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "part.safetensors"}}))
    shards = {"config.json": 1, "model.safetensors.index.json": 1, "part.safetensors": 5, "consolidated.safetensors": 5}
    assert chosen(shards, tmp_path).files == ("config.json", "model.safetensors.index.json", "part.safetensors")
    assert chosen({**shards, "model.safetensors": 5}).files == ("config.json", "model.safetensors")


def test_shards_without_an_index_are_known_by_their_names() -> None:
    shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    files = {"config.json": 1, **dict.fromkeys(shards, 5)}
    assert chosen(files).files == ("config.json", *shards)
    with pytest.raises(ConfigError, match="holds 2 safetensors files"):
        chosen({name: size for name, size in files.items() if "-00002-" not in name})


def test_an_index_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../../x.safetensors"}}))
    with pytest.raises(Exception, match="not the name of a safetensors file beside it"):
        chosen({"config.json": 1, "model.safetensors.index.json": 1, "x.safetensors": 1}, tmp_path)


@pytest.mark.parametrize(
    ("sizes", "label"),
    [
        ({"Q4_K_M": 5, "Q5_K_M": 6, "Q8_0": 9}, "Q4_K_M"),
        ({"Q5_K_M": 6, "Q8_0": 9, "Q3_K_M": 3}, "Q5_K_M"),
        ({"Q4_K_M": 14, "IQ4_XS": 12, "Q3_K_M": 11, "Q2_K": 8}, "Q3_K_M"),
        ({"Q8_0": 30, "Q2_K": 13}, "Q2_K"),
        ({"F16": 4, "Q4_0": 2}, "Q4_0"),
        ({"UD-Q4_K_M": 5, "IQ1_S": 1}, "UD-Q4_K_M"),
        ({"UD-Q4_K_XL": 5, "UD-Q2_K_XL": 3, "UD-IQ1_S": 1, "UD-Q8_K_XL": 9}, "UD-Q4_K_XL"),
        ({"Q4_0_4_4": 4, "Q4_0_8_8": 4, "F16": 9}, "F16"),
    ],
)
def test_the_best_balance_that_fits_is_chosen(sizes: dict[str, int], label: str) -> None:
    files = {f"m-{name}.gguf": size * GB for name, size in sizes.items()}
    assert chosen(files).entry == f"m-{label}.gguf"


def test_all_that_is_preferred_is_told_apart() -> None:
    labels = [gguf_models({f"m-{label}.gguf": 1})[0].label for label in PREFERRED]
    assert labels == list(PREFERRED)
    assert len(set(labels)) == len(labels)


def test_a_makers_prefix_may_be_left_out_where_nothing_else_is_meant() -> None:
    files = {"m-UD-Q4_K_XL.gguf": 1, "m-UD-Q2_K.gguf": 1, "m-Q2_K.gguf": 1}
    assert chosen(files, variant="q4_k_xl").entry == "m-UD-Q4_K_XL.gguf"
    assert chosen(files, variant="Q2_K").entry == "m-Q2_K.gguf"
    with pytest.raises(ConfigError, match="has 2 GGUF files of Q8_0; name one"):
        chosen({"a-Q8_0.gguf": 1, "b-Q8_0.gguf": 1}, variant="Q8_0")


def test_pieces_are_told_in_the_order_in_which_they_are_joined() -> None:
    files = {f"a.Q4_K_M.gguf.part{number}of11": 1 for number in range(1, 12)} | {"a.Q4_K_S.gguf-split-a": 1}
    told = ", ".join(f"a.Q4_K_M.gguf.part{number}of11" for number in range(1, 12))
    for options in ({}, {"variant": "Q4_K"}):
        with pytest.raises(ConfigError) as caught:
            chosen(files, **options)
        assert f"joined ({told}):" in str(caught.value)


@pytest.mark.parametrize(
    ("files", "options", "words"),
    [
        ({"pytorch_model.bin": 1, "config.json": 1}, {}, "only .bin or .pt weights"),
        ({"adapter_model.safetensors": 1, "adapter_config.json": 1}, {}, "is an adapter"),
        ({"README.md": 1}, {}, "neither safetensors nor GGUF"),
        ({"consolidated.safetensors": 1, "params.json": 1}, {}, r"no config.json that describes them \(params.json is"),
        ({"a.Q8_0.gguf.part1of2": 1, "a.Q8_0.gguf.part2of2": 1}, {}, r"a.Q8_0.gguf in pieces that have to be joined"),
        ({"a.Q8_0.gguf.part1of2": 1, "a.Q2_K.gguf": 1}, {"variant": "Q8_0"}, r"a.Q8_0.gguf in pieces"),
        ({"a-Q8_0.gguf": 1}, {"load_format": "safetensors"}, "has no safetensors model"),
        ({"a-Q8_0.gguf": 1}, {"load_format": "dummy", "variant": "Q8_0"}, "names a GGUF file, but"),
        ({"config.json": 1, "a.safetensors": 1, "b.safetensors": 1}, {}, "holds 2 safetensors files"),
    ],
)
def test_what_cannot_be_loaded_is_told(files: dict[str, int], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        chosen(files, **options)
