# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Direct launches reach Triton's launcher with what a launch by Triton itself would bring there, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from pretended_device import LAUNCHES, PretendedDriver
from triton.runtime import driver

from aphrodite.kernels.triton.launch import DirectKernel, direct_launch, recording, tiles


@pytest.fixture(autouse=True)
def _no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_active", PretendedDriver())
    LAUNCHES.clear()


@triton.jit(do_not_specialize=["free"])
def _jitted(x, other, number, free, factor, COUNT: tl.constexpr, FLAG: tl.constexpr, LIMIT: tl.constexpr):
    value = tl.load(x + tl.program_id(0)) * factor + number + free
    if other is not None:
        value += tl.load(other)
    if FLAG:
        value += COUNT
    tl.store(x + tl.program_id(0), value)


@triton.jit
def _tiled(x, out, BLOCK: tl.constexpr):
    out.store([0, 0], x.load([BLOCK, 0]))


def launched(grid: tuple[int, ...], *arguments: Any, **options: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What reaches the launcher when a `DirectKernel` launches again, and when Triton does, without Triton's hooks."""
    kernel = DirectKernel(_jitted)
    for one in (kernel, kernel, _jitted):
        one[grid](*arguments, **options)
    _, direct, by_triton = (launch[:6] + launch[9:] for launch in LAUNCHES[-3:])
    return direct, by_triton


_ROOM = torch.zeros(64)


@pytest.mark.parametrize(
    ("x", "other", "number", "free"),
    [
        (_ROOM, None, 16, 5),
        (_ROOM, _ROOM, 1, 1),
        (_ROOM[1:], _ROOM, 7, 16),
        (_ROOM, _ROOM[2:], 0, -3),
        (_ROOM.bfloat16(), _ROOM, -16, 2),
        (_ROOM, None, 1 << 40, 1 << 31),
    ],
)
def test_direct_launch_equals_triton(x: torch.Tensor, other: torch.Tensor | None, number: int, free: int) -> None:
    for grid in ((3,), (3, 2), (1, 2, 4)):
        direct, by_triton = launched(grid, x, other, number, free, 0.5, COUNT=2, FLAG=True, LIMIT=None, num_warps=2)
        assert direct == by_triton


def test_variants_are_told_apart() -> None:
    kernel = DirectKernel(_jitted)

    def functions(*arguments: Any, **options: Any) -> int:
        for _ in range(2):
            kernel[(1,)](*arguments, **{"COUNT": 2, "FLAG": True, "LIMIT": None, **options})
        assert LAUNCHES[-1][4] == LAUNCHES[-2][4]
        return int(LAUNCHES[-1][4])

    usual = functions(_ROOM, None, 16, 5, 0.5)
    assert functions(_ROOM[4:], None, 32, 6, 0.25) == usual  # of the same kinds
    others = [
        functions(_ROOM[1:], None, 16, 5, 0.5),
        functions(_ROOM, _ROOM, 16, 5, 0.5),
        functions(_ROOM, None, 1, 5, 0.5),
        functions(_ROOM, None, 3, 5, 0.5),
        functions(_ROOM.half(), None, 16, 5, 0.5),
        functions(_ROOM, None, 16, 5, 0.5, COUNT=3),
        functions(_ROOM, None, 16, 5, 0.5, FLAG=False),
        functions(_ROOM, None, 16, 5, 0.5, num_warps=1),
    ]
    assert len({usual, *others}) == 9


def test_descriptors_are_told_apart_by_type_and_block() -> None:
    kernel = DirectKernel(_tiled)

    def function(dtype: torch.dtype, block: list[int]) -> int:
        for _ in range(2):
            x, out = (tiles(torch.zeros(64, 64, dtype=dtype), block) for _ in range(2))
            kernel[(1,)](x, out, BLOCK=16)
        assert LAUNCHES[-1][9:11] == (x, out)
        return int(LAUNCHES[-1][4])

    kinds = [(torch.float16, [16, 64]), (torch.float32, [16, 64]), (torch.float16, [32, 64])]
    assert len({function(*kind) for kind in kinds}) == 3
    assert function(*kinds[0]) == function(*kinds[0])


def test_arguments_by_name_are_left_to_triton() -> None:
    kernel = DirectKernel(_jitted)
    for number in (1, 16):
        for _ in range(2):
            kernel[(1,)](_ROOM, None, number, 5, factor=0.5, COUNT=2, FLAG=True, LIMIT=None)
            assert LAUNCHES[-1][9:14] == (_ROOM.data_ptr(), None, number, 5, 0.5)


def test_interpreted_kernels_stay_as_they_are() -> None:
    interpreted = object()
    assert direct_launch(interpreted) is interpreted


def test_recording_launches_nothing_and_leaves_zeros() -> None:
    kernel = DirectKernel(_jitted)
    arguments, options = (_ROOM, None, 7, 5, 0.5), {"COUNT": 2, "FLAG": True, "LIMIT": None}
    launches: list[tuple[Any, ...]] = []
    with recording(lambda *launch: launches.append(launch)):
        kernel[(1,)](*arguments, **options)
        written = torch.empty(1000, dtype=torch.int32)
    assert not LAUNCHES
    assert launches == [(kernel, arguments, options)]
    assert not written.any()
    kernel[(1,)](*arguments, **options)
    assert len(LAUNCHES) == 1


def test_other_versions_launch_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "9.0.0")
    kernel = direct_launch(_jitted)
    for _ in range(2):
        kernel[(1,)](_ROOM, None, 7, 5, 0.5, COUNT=2, FLAG=True, LIMIT=None)
        assert LAUNCHES[-1][7:9] != (None, None)  # Triton's hooks
