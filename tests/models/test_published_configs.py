"""What published models say of themselves, read as they say it: their numbers of weights come out as they are known.

`published_configs.json` has config.json files of well-known models, less keys that nobody reads, with the numbers of
weights that their makers or the Hugging Face hub name (of those that see images, the text model's).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aphrodite.loading.checkpoint import open_checkpoint
from aphrodite.loading.inspect import Inspection, inspect

PUBLISHED: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "published_configs.json").read_text())
CONTEXTS = {
    "Llama-3.1-8B": 131_072,
    "Command-R": 131_072,  # model_max_length
    "gemma-3-12b (text)": 131_072,  # with its scaling, not before it
    "internlm2_5-7b": 65_536,
    "Phi-3-mini-128k": 131_072,
    "DeepSeek-V3": 163_840,
    "llava-1.5-7b (text)": 4096,
}


def described(name: str, folder: Path) -> Inspection:
    (folder / "config.json").write_text(json.dumps(PUBLISHED[name]["config"]))
    return inspect(folder, load_format="dummy")


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_of_weights_are_those_that_are_known(name: str, tmp_path: Path) -> None:
    billions = PUBLISHED[name]["billions"]
    assert described(name, tmp_path).parameters / 1e9 == pytest.approx(billions, rel=0.005)


@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts_are_those_that_are_known(name: str, tmp_path: Path) -> None:
    assert described(name, tmp_path).max_position == CONTEXTS[name]


def test_stablelms_first_files_have_other_names(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["stablelm-3b-4e1t"]["config"]))
    spec = open_checkpoint(tmp_path, load_format="dummy").spec
    assert (spec.norm_eps, spec.rotary.dim, spec.head_dim) == (1e-5, 20, 80)
