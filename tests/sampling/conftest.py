from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sampling_harness import Harness

from aphrodite.kernels.cpu.sampling import load

# Things said twice and lists, for the stages that look back.
TEXT = """The lighthouse keeper counted the steps every night: one hundred and twelve up, one hundred and twelve down.
"You counted wrong," said the gull. "You counted wrong last night, too."

"I never count wrong," said the keeper, and counted the steps again: one hundred and twelve up, one hundred and
thirteen down. He sat down on the last one, which had not been there before, and lit his pipe. The sea was very quiet.

What the keeper kept:
- a lamp, which he lit at dusk;
- a log, in which he wrote down ships, whales and the weather;
- a gull, which kept him.

3 ships on Monday, 5 on Tuesday, 8 on Wednesday, 13 on Thursday. On Friday the fog came in, and he wrote: "No ships. No
whales. Weather: none." The gull read it over his shoulder and laughed until it fell off the railing, and he laughed,
too, and the lamp laughed, and one hundred and thirteen steps below them the sea laughed, which it had not done for
years. "You counted wrong," said the gull.
"""


@pytest.fixture(scope="session")
def real_text(smollm2_path: Path, smollm2_oracle: Any) -> tuple[list[int], np.ndarray]:
    """The tokens of a text, and SmolLM2's logits [tokens, 49152] float32 behind each, as transformers computes them."""
    from aphrodite.tokenizer.loader import load_tokenizer

    tokens = load_tokenizer(smollm2_path).encode(TEXT, add_special_tokens=False)
    with torch.inference_mode():
        return tokens, smollm2_oracle(torch.tensor([tokens])).logits[0].numpy()


@pytest.fixture(params=["torch", "native"])
def make(request: pytest.FixtureRequest) -> Callable[[int, int], Harness]:
    """Harnesses on the torch stages alone and, where it is built, with the native fast path."""
    if request.param == "native" and load() is None:
        pytest.skip("the native library is not built")
    return lambda num_rows, vocab_size: Harness(num_rows, vocab_size, native=request.param == "native")
