"""The whole engine against transformers on the real model.

A greedy continuation is right if, at every position, the reference gives the chosen token its highest
logit; one forward pass of the reference over prompt and answer shows that for all positions at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from aphrodite.llm import LLM
from aphrodite.outputs import CompletionOutput
from aphrodite.sampling.params import SamplingParams

PROMPTS = [
    "Once upon a time, in a village by the sea,",
    "The recipe calls for three eggs, a cup of flour and",
    "In 1969, the first humans",
    "def fibonacci(n):\n    ",
    "«Je ne sais pas», dit-elle,",
    'The dragon opened one eye and said: "',
    "Q: What is the boiling point of water?\nA:",
    "Dear Sir or Madam,\n\nI am writing to",
    "1, 1, 2, 3, 5, 8,",
    "She had never seen snow before. When",
    "The three laws of robotics are",
    "List of planets:\n- Mercury\n-",
    "私は",
    "Chapter 12\n\nThe storm had passed, but",
    "To be, or not to be:",
    "The stock market fell sharply today because",
    '*He looks up from his book.* "You are late," he',
    "import numpy as np\n\n",
    "The quick brown fox",
    "Roses are red,\nViolets are blue,\n",
]
GREEDY = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True, logprobs=0)


class Comparison(NamedTuple):
    agreement: float  # share of positions where the chosen token is the reference's most likely one
    mean_difference: float  # of the chosen tokens' log-probabilities
    max_difference: float


def compare(oracle: Any, prompt: list[int], answer: CompletionOutput) -> tuple[np.ndarray, np.ndarray]:
    """Per token: is it the reference's choice, and by how much do the log-probabilities differ."""
    ids = torch.tensor([prompt + answer.token_ids])
    with torch.inference_mode():
        logprobs = oracle(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    chosen = torch.tensor(answer.token_ids)
    expected = logprobs.gather(1, chosen[:, None])[:, 0].numpy()
    assert answer.logprobs is not None
    return (logprobs.argmax(-1) == chosen).numpy(), expected - np.array([entry.logprob for entry in answer.logprobs])


def run(oracle: Any, model: Path, prompts: list[str], **settings: Any) -> Comparison:
    with LLM(model, kv_cache_memory=512 << 20, max_num_seqs=32, **settings) as llm:
        outputs = llm.generate(prompts, GREEDY, progress=False)
    same, differences = zip(
        *(compare(oracle, output.prompt_token_ids, output.outputs[0]) for output in outputs), strict=True
    )
    assert all(len(one) == GREEDY.max_tokens for one in same)
    distance = np.abs(np.concatenate(differences))
    return Comparison(float(np.concatenate(same).mean()), float(distance.mean()), float(distance.max()))


def test_reference_mode_gives_the_reference_tokens(smollm2_oracle: Any, smollm2_path: Path) -> None:
    result = run(smollm2_oracle, smollm2_path, PROMPTS, dtype="float32", executor="torch")
    assert result.agreement == 1.0
    assert result.max_difference < 1e-3


@pytest.mark.parametrize(
    ("activations", "agreement", "mean_difference"),
    [("float32", 0.998, 0.004), ("int16", 0.998, 0.004), ("int8", 0.94, 0.2)],
)
def test_native_precisions_stay_within_their_bounds(
    smollm2_oracle: Any, smollm2_path: Path, activations: str, agreement: float, mean_difference: float
) -> None:
    result = run(smollm2_oracle, smollm2_path, PROMPTS[:8], activations=activations)
    print(f"{activations}: {result}")
    assert result.agreement >= agreement
    assert result.mean_difference <= mean_difference
