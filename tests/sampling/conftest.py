from __future__ import annotations

from collections.abc import Callable

import pytest
from sampling_harness import Harness

from aphrodite.kernels.cpu.sampling import load


@pytest.fixture(params=["torch", "native"])
def make(request: pytest.FixtureRequest) -> Callable[[int, int], Harness]:
    """Harnesses on the torch stages alone and, where it is built, with the native fast path."""
    if request.param == "native" and load() is None:
        pytest.skip("the native library is not built")
    return lambda num_rows, vocab_size: Harness(num_rows, vocab_size, native=request.param == "native")
