"""Engines that the tests of a module share: on a GPU starting one is what takes long."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save_file

from aphrodite.config import EngineConfig
from aphrodite.engine.builder import build_engine
from aphrodite.engine.core import EngineCore
from aphrodite.loading.checkpoint import open_checkpoint
from aphrodite.loading.dummy import dummy_weights
from aphrodite.loading.parameters import HF_NAMES
from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.types import QuantType
from aphrodite.tokenizer.tokenizer import Tokenizer

# The shape of most tests' model, so that they need the same kernels.
TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 40_000,
    "rope_theta": 500_000.0,
    "initializer_range": 0.02,
}

THREADS = 4  # of torch on the host
REFERENCE: dict[str, Any] = {"device": "cpu", "executor": "torch", "threads": THREADS}  # what GPUs are compared with


def write_model(folder: Path, config: Mapping[str, Any]) -> Path:
    """Random weights in a file: dummy ones are others on a GPU than on a CPU."""
    (folder / "config.json").write_text(json.dumps(config))
    weights = dummy_weights(open_checkpoint(folder, load_format="dummy").spec, QuantType.F32)
    tensors = {HF_NAMES.checkpoint_name(name): dequantize(raw) for name, raw in weights.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


class Engines:
    """Engines of one model, one for each choice of settings."""

    def __init__(self, model: Path, tokenizer: Tokenizer | None = None, **settings: Any) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._settings = {
            "device": "cuda",
            "dtype": "float32",
            "kv_cache_memory": 1 << 28,
            "max_num_seqs": 16,
        } | settings
        self._cores: dict[str, EngineCore] = {}

    def __call__(self, **settings: Any) -> EngineCore:
        """The engine with these settings beside the module's; it is idle."""
        key = repr(sorted(settings.items()))
        if key not in self._cores:
            config = EngineConfig(model=str(self._model), **{**self._settings, **settings})
            self._cores[key] = build_engine(config, (), tokenizer=self._tokenizer).core
        core = self._cores[key]
        assert not core.has_work()
        return core

    def close(self) -> None:
        for core in self._cores.values():
            core.close()
        self._cores.clear()
        torch.cuda.empty_cache()
