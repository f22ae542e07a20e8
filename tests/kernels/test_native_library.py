"""Loading the library, what it refuses, and its threads."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from native_harness import TILED, available_isas, exact_values, product_harness, random_weight, raw_tensor, step

from aphrodite.kernels.cpu import library
from aphrodite.kernels.cpu.program import Activation, NativeMemory, repack, tiles_bytes
from aphrodite.quantization.types import QuantType, RawTensor

built = pytest.mark.skipif(not available_isas(), reason="the native library is not built")

REPORT = "from aphrodite.kernels.cpu import library as l; x = l.load(); print(x.isa if x else l.unavailable_reason())"
FORK = """
import os, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from native_harness import *
x = np.ones((32, 32), np.float32)
weight = raw_tensor(np.ones((32, 32)), QuantType.Q8_0)
harness = product_harness(x, weight, Activation.INT16, None, threads=3)
before = harness.run(step([(range(20), 0, [0, 1])]))
child = os.fork()
after = harness.run(step([(range(20), 0, [0, 1])]))
if child == 0:
    os._exit(0 if np.array_equal(after, before) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), np.array_equal(after, before))
"""


def _python(code: str, *arguments: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return run.stdout.strip()


@built
@pytest.mark.parametrize("isa", available_isas())
def test_environment_chooses_the_instruction_set(isa: str) -> None:
    assert _python(REPORT, APHRODITE_CPU_ISA=isa) == isa


@built
def test_unknown_instruction_set_is_a_reason_not_a_crash() -> None:
    assert "'z80'" in _python(REPORT, APHRODITE_CPU_ISA="z80")


def test_missing_library_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike[str]) -> None:
    monkeypatch.setattr(library, "LIBRARY_PATH", library.Path(tmp_path) / "none.so")
    library._load.cache_clear()
    try:
        assert library.load() is None
        reason = library.unavailable_reason()
        assert reason is not None
        assert "compiler" in reason
    finally:
        library._load.cache_clear()


@built
def test_a_forked_child_gets_threads_of_its_own() -> None:
    assert _python(FORK, os.path.dirname(__file__)) == "0 True"


@built
@pytest.mark.parametrize("threads", [1, 2, 7, 40])
def test_any_number_of_threads_gives_the_same_bits(threads: int) -> None:
    generator = np.random.default_rng(5)
    x = generator.standard_normal((200, 64)).astype(np.float32)
    weight = raw_tensor(generator.standard_normal((200, 64)), QuantType.Q4_0)
    inputs = step([(range(200), 0, range(13))])
    expected = product_harness(x, weight, Activation.INT16, available_isas()[0], threads=1).run(inputs)
    harness = product_harness(x, weight, Activation.INT16, available_isas()[0], threads=threads)
    for _ in range(20):
        assert np.array_equal(harness.run(inputs), expected)


@built
@pytest.mark.parametrize("qtype", [qtype for qtype in QuantType if qtype not in TILED], ids=lambda qtype: qtype.name)
def test_other_types_have_no_tiles(qtype: QuantType) -> None:
    loaded = library.load()
    assert loaded is not None
    assert tiles_bytes(loaded, qtype, 48, 256) == 0
    data = np.zeros((48, qtype.row_bytes(256)), np.uint8)
    with pytest.raises(ValueError, match="no tiles"):
        repack(loaded, RawTensor("w", (48, 256), qtype, data), NativeMemory(loaded, 1 << 16).address)


@built
@pytest.mark.parametrize("qtype", TILED, ids=lambda qtype: qtype.name)
def test_tiles_take_the_files_bytes_and_give_rows_back(qtype: QuantType) -> None:
    """Reads rows back through an exact product and through the lookup of an embedding."""
    loaded = library.load()
    assert loaded is not None
    columns = max(64, qtype.block_size)
    weight = random_weight(qtype, columns, columns, 6)
    widened = {
        QuantType.Q3_K: 1.04,
        QuantType.Q4_K: 1.03,
        QuantType.Q5_K: 1.03,
        QuantType.IQ4_XS: 1.02,
        QuantType.IQ1_M: 1.04,
        QuantType.IQ2_XS: 1.06,
        QuantType.IQ3_XXS: 1.05,
    }
    assert weight.nbytes <= tiles_bytes(loaded, qtype, columns, columns) <= widened.get(qtype, 1.0) * weight.nbytes
    assert tiles_bytes(loaded, qtype, 33, columns) == tiles_bytes(loaded, qtype, 48, columns)  # padded to 16 rows
    assert tiles_bytes(loaded, qtype, 48, columns - 24) == 0
    identity, every = np.eye(columns, dtype=np.float32), step([(range(columns), 0, range(columns // 16))])
    product = product_harness(identity, weight, Activation.FLOAT32, available_isas()[0])
    np.testing.assert_allclose(product.run(every).T, exact_values(weight), rtol=1e-6, atol=1e-6)
    lookup = product_harness(weight, raw_tensor(identity, QuantType.F32), Activation.FLOAT32, available_isas()[0])
    np.testing.assert_allclose(lookup.run(every), exact_values(weight), rtol=1e-6, atol=1e-6)


@built
def test_repack_refuses_data_of_another_size() -> None:
    loaded = library.load()
    assert loaded is not None
    weight = raw_tensor(np.ones((32, 64)), QuantType.Q8_0)
    short = type(weight)("w", (33, 64), QuantType.Q8_0, weight.data)
    with pytest.raises(ValueError, match="w: "):
        repack(loaded, short, NativeMemory(loaded, 1 << 16).address)
