"""What follows an answer token by token on the host, and says which tokens may come next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch


class TokenFollower(Protocol):
    """How far one answer is in something that decides over its tokens.

    It hears of each token by `tell`, in order, and can be taken back; `refresh` makes what it says of the next one.

    Attributes:
        failure: why nothing may come any more, if that is so; the request ends with it.
    """

    @property
    def failure(self) -> str | None: ...

    @property
    def words(self) -> npt.NDArray[np.int32] | None:
        """[vocab // 32 + 1] int32: bit i % 32 of word i // 32 says whether token i may come next; None: all may."""

    def tell(self, position: int, token_id: int) -> None:
        """The token at `position` is `token_id`. One that was told before, or follows one that was not, is ignored."""

    def waits(self, position: int) -> bool:
        """Whether it has to hear of all tokens before `position` in order to choose the one there."""

    def refresh(self, position: int) -> None:
        """Make `words` those of the token at `position`."""

    def completed_at(self, position: int) -> bool:
        """Whether the token at `position` completed the answer, so that nothing may follow it."""

    def rewind(self, position: int) -> None:
        """Forget the token at `position` and those after it."""


def mask_logits(logits: torch.Tensor, words: Sequence[npt.NDArray[np.int32]]) -> torch.Tensor:
    """Leaves of `logits` [R, vocab] what `words` of R rows allow, in place."""
    stacked = torch.from_numpy(np.stack(words))
    if logits.device.type == "cuda":
        stacked = stacked.pin_memory().to(logits.device, non_blocking=True)
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = ((stacked[:, :, None] >> bits) & 1).flatten(1)[:, : logits.shape[-1]]
    return logits.masked_fill_(allowed == 0, -torch.inf)
