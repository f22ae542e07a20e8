"""Engines that a test file's cases share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aphrodite.config import EngineConfig
from aphrodite.engine.builder import build_engine
from aphrodite.engine.core import EngineCore
from aphrodite.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def make_core(tiny_model: Path, tokenizer: Tokenizer) -> Iterator[Callable[..., EngineCore]]:
    """An engine of the tiny model with the file's `tokenizer`, one for each choice of settings."""
    cores: dict[str, EngineCore] = {}

    def make(**changes: Any) -> EngineCore:
        name = repr(changes)
        if name not in cores:
            sizes = {"max_num_seqs": 8, "kv_cache_memory": 4 << 20, **changes}
            config = EngineConfig(model=str(tiny_model), load_format="dummy", threads=1, **sizes)
            cores[name] = build_engine(config, tokenizer.eos_token_ids, tokenizer=tokenizer).core
        return cores[name]

    yield make
    for core in cores.values():
        core.close()
