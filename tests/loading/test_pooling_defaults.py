"""What checkpoints say about embeddings, in the files of sentence-transformers and in GGUF's metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aphrodite.errors import ModelFormatError
from aphrodite.loading.pooling import PoolingDefaults, pooling_from_directory, pooling_from_gguf
from aphrodite.loading.repository import select

MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def write(folder: Path, modules: list[tuple[str, str]], pooling: dict[str, Any]) -> Path:
    steps = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(steps))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def modes(*chosen: str) -> dict[str, Any]:
    switches = {f"pooling_mode_{mode}": mode in chosen for mode in MODES}
    return {"word_embedding_dimension": 64, **switches, "include_prompt": True}


POOL = [("Transformer", ""), ("Pooling", "1_Pooling")]
NORMALIZED = [*POOL, ("Normalize", "2_Normalize")]


@pytest.mark.parametrize(
    ("modules", "pooling", "expected"),
    [
        (NORMALIZED, modes("lasttoken"), PoolingDefaults("last", True)),  # Qwen3-Embedding, e5-mistral
        (POOL, modes("mean_tokens"), PoolingDefaults("mean", False)),
        (NORMALIZED, {"pooling_mode": "cls"}, PoolingDefaults("cls", True)),
    ],
)
def test_sentence_transformers_files_are_read(
    tmp_path: Path, modules: Any, pooling: Any, expected: PoolingDefaults
) -> None:
    assert pooling_from_directory(write(tmp_path, modules, pooling)) == expected


@pytest.mark.parametrize(
    ("modules", "pooling", "reason"),
    [
        (POOL, modes("weightedmean_tokens"), "not supported"),
        (POOL, modes("mean_tokens", "cls_token"), "not supported"),
        ([*POOL, ("Dense", "2_Dense")], modes("mean_tokens"), "a Dense layer"),
    ],
)
def test_other_ways_are_declined(tmp_path: Path, modules: Any, pooling: Any, reason: str) -> None:
    assert reason in (pooling_from_directory(write(tmp_path, modules, pooling)).declined or "")


def test_they_are_fetched_with_a_model() -> None:
    names = ("config.json", "model.safetensors", "modules.json", "1_Pooling/config.json", "2_Normalize/config.json")
    chosen = select(
        "org/name", dict.fromkeys(names, 10), variant=None, load_format="auto", room=_unasked, fetch=_unasked
    )  # fmt: skip
    assert {"modules.json", "1_Pooling/config.json"} < set(chosen.files)


def _unasked(*arguments: Any) -> Any:
    raise AssertionError


def test_a_checkpoint_that_says_nothing_is_pooled_at_its_last_token(tmp_path: Path) -> None:
    assert pooling_from_directory(tmp_path) == PoolingDefaults("last", True, None)


@pytest.mark.parametrize(
    "text", ["{", "{}", "[1]", '[{"type": "x.Pooling"}]', '[{"type": "x.Pooling", "path": "../x"}]']
)
def test_damaged_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(ModelFormatError, match=r"modules\.json"):
        pooling_from_directory(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [({}, "last"), ({"qwen3.pooling_type": 1}, "mean"), ({"qwen3.pooling_type": 2}, "cls"),
     ({"qwen3.pooling_type": 3}, "last"), ({"qwen3.pooling_type": 0}, "last")],
)  # fmt: skip
def test_gguf_metadata_is_read(metadata: Any, expected: str) -> None:
    found = pooling_from_gguf({"general.architecture": "qwen3", **metadata}, Path("x.gguf"))
    assert found == PoolingDefaults(expected)  # type: ignore[arg-type]


def test_a_model_that_ranks_is_declined() -> None:
    found = pooling_from_gguf({"general.architecture": "qwen3", "qwen3.pooling_type": 4}, Path("x.gguf"))
    assert "ranks" in (found.declined or "")
