"""Counter-based random numbers: every random choice is a pure function of (seed, position, use, index).

The generator is Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2,
3", SC 2011): a keyed bijection of 128-bit counters, so there is no state to keep, share or roll back.

    key     = (seed mod 2^32, seed div 2^32)
    counter = (position of the token in its sequence, use, index div 4, 0)
    word    = output[index mod 4]

A uniform is the word's upper 23 bits in the middle of their interval, `((word >> 9) + 0.5) * 2^-23`:
exact in float32 and strictly inside (0, 1), from 2^-24 to 1 - 2^-24.

A draw is the Gumbel-max trick: argmax over the surviving tokens of `logit + gumbel(uniform)` with the
token id as index. It depends on neither the batch nor on which tokens were masked.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF


class Use(IntEnum):
    """What a random number is for; part of the counter, so uses never share numbers. Ids are for ever."""

    DRAW = 0
    XTC = 1
    PLUGIN = 1024  # third-party stages take ids from here on


def philox_numpy(counter: npt.NDArray[np.uint32], key: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """The reference: `[..., 4]` uint32 counters and `[..., 2]` uint32 keys to `[..., 4]` uint32 words."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = (key[..., i].astype(np.uint64) for i in range(2))
    low, shift = np.uint64(_LOW), np.uint64(32)
    for _ in range(_ROUNDS):
        first, second = np.uint64(_MULTIPLIERS[0]) * c0, np.uint64(_MULTIPLIERS[1]) * c2
        c0, c1, c2, c3 = (second >> shift) ^ c1 ^ k0, second & low, (first >> shift) ^ c3 ^ k1, first & low
        k0, k1 = (k0 + np.uint64(_KEY_STEPS[0])) & low, (k1 + np.uint64(_KEY_STEPS[1])) & low
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


def uniforms_numpy(seed: int, position: int, use: int, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """float32 uniforms of one row, any `indices`; the reference for `uniforms` and the native library."""
    counter = np.zeros((*indices.shape, 4), np.uint32)
    counter[..., 0], counter[..., 1], counter[..., 2] = position, use, indices // 4
    words = philox_numpy(counter, np.array([seed & _LOW, seed >> 32 & _LOW], np.uint32))
    word = np.take_along_axis(words, (indices % 4)[..., None], axis=-1)[..., 0]
    return ((word >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)


def philox(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], key: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four output words; all tensors int64 that hold uint32 values and broadcast against each other.

    A product wraps modulo 2^64, which keeps both halves right: the upper one is masked after the
    arithmetic shift.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (second >> 32 & _LOW) ^ c1 ^ k0,
            second & _LOW,
            (first >> 32 & _LOW) ^ c3 ^ k1,
            first & _LOW,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def uniforms(seeds: torch.Tensor, positions: torch.Tensor, use: int, count: int) -> torch.Tensor:
    """Uniforms of indices 0 .. count - 1 for each row.

    Args:
        seeds: [R] int64, the unsigned 64-bit seed's bits.
        positions: [R] int64, position of the token to be chosen.

    Returns:
        [R, count] float32 in (0, 1).
    """
    blocks = torch.arange((count + 3) // 4, device=seeds.device)
    zero = torch.zeros((), dtype=torch.int64, device=seeds.device)
    key = ((seeds & _LOW)[:, None], (seeds >> 32 & _LOW)[:, None])
    words = torch.stack(philox((positions[:, None], zero + int(use), blocks[None, :], zero), key), dim=-1)
    return ((words.flatten(1)[:, :count] >> 9).to(torch.float32) + 0.5) * 2.0**-23


def uniforms_at(seeds: torch.Tensor, positions: torch.Tensor, use: int, indices: torch.Tensor) -> torch.Tensor:
    """The uniform of one index each: all arguments [M] int64, as in `uniforms`; returns [M] float32."""
    zero = torch.zeros((), dtype=torch.int64, device=seeds.device)
    key = (seeds & _LOW, seeds >> 32 & _LOW)
    words = torch.stack(philox((positions, zero + int(use), indices >> 2, zero), key), dim=-1)
    word = words.gather(-1, (indices & 3)[:, None])[:, 0]
    return ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23


def gumbel(uniform: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise of uniforms in (0, 1); between -2.82 and 16.64 for those of this module."""
    return -torch.log(-torch.log(uniform))


def signed_seed(seed: int) -> int:
    """The unsigned 64-bit seed as the int64 with the same bits."""
    seed &= 2**64 - 1
    return seed - 2**64 if seed >= 2**63 else seed
