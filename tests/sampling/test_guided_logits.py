"""The arithmetic of classifier-free guidance, against transformers and against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor

from aphrodite.sampling.guidance import guide

VOCAB = 1031
SCALES = (-2.0, 0.0, 0.5, 1.5, 3.0, 100.0)


def guided(logits: torch.Tensor, own: list[int], others: list[int], scales: list[float]) -> torch.Tensor:
    changed = logits.clone()
    guide(changed, torch.tensor(own), torch.tensor(others), torch.tensor(scales))
    return changed


@pytest.mark.parametrize("spread", [0.1, 4.0, 40.0])
def test_scores_are_those_of_the_definition(spread: float) -> None:
    logits = torch.randn(12, VOCAB, generator=torch.Generator().manual_seed(3)) * spread
    own, others = list(range(0, 12, 2)), list(range(1, 12, 2))
    found = guided(logits, own, others, list(SCALES))

    def logsoftmax(row: int) -> np.ndarray:
        scores = logits[row].double().numpy()
        return scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())

    for row, other, scale in zip(own, others, SCALES, strict=True):
        c, u = logsoftmax(row), logsoftmax(other)
        expected = scale * (c - u) + u
        np.testing.assert_allclose(found[row].double(), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
        theirs = UnbatchedClassifierFreeGuidanceLogitsProcessor(scale, model=None)
        theirs.get_unconditional_logits = lambda _, other=other: logits[None, other : other + 1]
        assert torch.equal(found[row], theirs(torch.tensor([[1]]), logits[row : row + 1])[0])


def test_a_pair_is_what_it_is_alone_and_others_stay() -> None:
    logits = torch.randn(33, 8193, generator=torch.Generator().manual_seed(5))
    own, others, scales = list(range(1, 31, 3)), list(range(2, 32, 3)), [1.0 + 0.25 * i for i in range(1, 11)]
    found = guided(logits, own, others, scales)
    kept = [row for row in range(33) if row not in own]
    assert torch.equal(found[kept], logits[kept])
    for row, other, scale in zip(own, others, scales, strict=True):
        assert torch.equal(found[row], guided(logits[[row, other]], [0], [1], [scale])[0])


def test_what_the_prompt_rules_out_stays_out() -> None:
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(7))
    logits[0, 3] = logits[:, 4] = -torch.inf
    found = guided(logits, [0], [1], [2.0])[0]
    assert found[[3, 4]].tolist() == [-torch.inf, -torch.inf]
    assert int(found.isfinite().sum()) == VOCAB - 2
