"""What several stages ask of a row's distribution: sums, entropy, the first tokens by some key.

A row's result must not depend on the rows beside it: sums run over blocks of one width, because torch
splits a long sum among threads differently when there is only one, and each row's search for a cut widens
on its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_BLOCK = 1024
_WIDTHS = (128, 2048)  # of the searches that come before a full sort on CPUs

# (keys in falling order [R, K], their token ids [R, K], the rows [R]) -> how many tokens stay [R] int64, and
# for which rows this is certain without what comes after the K keys [R] bool.
Decide = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def row_sums(values: torch.Tensor) -> torch.Tensor:
    """[R, 1]: sums of [R, V]."""
    blocks = values.shape[-1] // _BLOCK
    whole = values[:, : blocks * _BLOCK].view(len(values), blocks, _BLOCK).sum(-1)
    return whole.sum(-1, keepdim=True) + values[:, blocks * _BLOCK :].sum(-1, keepdim=True)


def entropy(log_probabilities: torch.Tensor) -> torch.Tensor:
    """[R, 1]: natural-log entropy of [R, V]; masked tokens (-inf) add nothing."""
    return row_sums(log_probabilities.exp() * -log_probabilities.clamp_min(-1e4))


def keep_longest_prefix(logits: torch.Tensor, keys: torch.Tensor, decide: Decide) -> torch.Tensor:
    """Mask all but the first tokens by (key descending, token id ascending), as many as `decide` says.

    On a CPU it is asked about ever more keys until it is certain; elsewhere about all of them at once,
    because asking whether it is would wait for the device.

    Args:
        logits: [R, V] float32; changed in place.
        keys: [R, V]; may be `logits` itself.
    """
    cut, count = _find_cut(keys, decide)
    above, level = keys > cut, keys == cut
    room = count - above.sum(-1, keepdim=True)
    if keys.device.type == "cpu" and bool((level.sum(-1, keepdim=True) <= room).all()):
        return logits.masked_fill_(~(above | level), -torch.inf)
    return logits.masked_fill_(~(above | (level & (level.cumsum(-1) <= room))), -torch.inf)


def _find_cut(keys: torch.Tensor, decide: Decide) -> tuple[torch.Tensor, torch.Tensor]:
    """The last key that stays [R, 1], and how many stay [R, 1] int64."""
    rows = torch.arange(len(keys), device=keys.device)
    vocab = keys.shape[-1]
    cut = keys.new_empty(len(keys), 1)
    count = torch.empty(len(keys), 1, dtype=torch.int64, device=keys.device)
    widths = [width for width in _WIDTHS if width < vocab] if keys.device.type == "cpu" else []
    for width in (*widths, vocab):
        part = keys if len(rows) == len(keys) else keys[rows]
        ordered, token_ids = part.topk(width) if width < vocab else part.sort(dim=-1, descending=True)
        found, certain = decide(ordered, token_ids, rows)
        found = found.clamp(1, width)[:, None]
        if width == vocab:
            cut[rows], count[rows] = ordered.gather(-1, found - 1), found
            break
        done = rows[certain]
        cut[done], count[done] = ordered.gather(-1, found - 1)[certain], found[certain]
        rows = rows[~certain]
        if not len(rows):
            break
    return cut, count
