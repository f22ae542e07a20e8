"""MODEL as people write it: a file, a folder of one GGUF model, a path below the home folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from aphrodite.config import EngineConfig
from aphrodite.engine.preparation import resolve_model, tokenizer_path
from aphrodite.errors import AphroditeError
from aphrodite.loading.checkpoint import LoadFormat


def found(model: str, load_format: LoadFormat = "auto") -> Path:
    config, path = resolve_model(EngineConfig(model=model, load_format=load_format), allow_download=False)
    assert config.model == str(path)
    return path


def test_a_folder_of_one_gguf_model_is_that_file_to_model_and_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "tale.Q4_K_M.gguf"
    file.touch()
    (tmp_path / "mmproj-tale.gguf").touch()
    assert found(str(tmp_path)) == file
    assert found(str(tmp_path), "gguf") == file
    assert tokenizer_path(EngineConfig(model=str(found(str(tmp_path))))) == file
    (tmp_path / "config.json").touch()  # as repositories of GGUF files have it
    assert found(str(tmp_path)) == file


def test_a_model_in_shards_is_its_first_file(tmp_path: Path) -> None:
    for number in (2, 1):
        (tmp_path / f"tale-0000{number}-of-00002.gguf").touch()
    assert found(str(tmp_path)).name == "tale-00001-of-00002.gguf"


def test_a_checkpoint_stays_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    assert found(str(tmp_path)) == tmp_path  # bare, for its tokenizer or random weights
    (tmp_path / "model.safetensors").touch()
    assert found(str(tmp_path)) == tmp_path
    (tmp_path / "tale.gguf").touch()
    assert found(str(tmp_path), "safetensors") == tmp_path
    with pytest.raises(AphroditeError, match="both GGUF and safetensors"):
        found(str(tmp_path))


def test_a_folder_without_a_model_or_with_several_says_so(tmp_path: Path) -> None:
    with pytest.raises(AphroditeError, match="holds neither GGUF nor safetensors files"):
        found(str(tmp_path))
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(AphroditeError, match=r"2 GGUF files: name the one to load \(a\.gguf, b\.gguf\)"):
        found(str(tmp_path))


def test_a_path_below_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    file = tmp_path / "tale.gguf"
    file.touch()
    assert found("~/tale.gguf") == file  # as a YAML file has it, which no shell has read
    assert tokenizer_path(EngineConfig(tokenizer="~/tale.gguf")) == file
