"""Paged attention of the native library against float64."""

from __future__ import annotations

import numpy as np
import pytest
from native_harness import Harness, attention_harness, available_isas, step

from aphrodite.kernels.cpu.program import KvType

pytestmark = pytest.mark.skipif(not available_isas(), reason="the native library is not built")

NUM_BLOCKS = 64


class Case:
    """Random q, k and v for sequences whose blocks are scattered over the cache."""

    def __init__(self, heads: tuple[int, int], head_dim: int, lengths: tuple[int, ...]) -> None:
        self.heads, self.head_dim, self.lengths = heads, head_dim, lengths
        generator = np.random.default_rng(head_dim)
        total = sum(lengths)
        width = (heads[0] + 2 * heads[1]) * head_dim
        self.table = (2 * generator.standard_normal((total, width))).astype(np.float32)
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        free = list(generator.permutation(NUM_BLOCKS))
        self.blocks = [[int(free.pop()) for _ in range(-(-length // 16))] for length in lengths]

    def part(self, sequence: int, begin: int, end: int) -> tuple[range, int, list[int]]:
        start = int(self.starts[sequence])
        return range(start + begin, start + end), begin, self.blocks[sequence]

    def expected(self, sequence: int, window: int, kv_type: KvType) -> np.ndarray:
        """[length, heads * head_dim] float64."""
        heads, kv_heads = self.heads
        rows = self.table[self.starts[sequence] : self.starts[sequence + 1]].astype(np.float64)
        q, k, v = np.split(rows, np.cumsum([heads, kv_heads]) * self.head_dim, axis=1)
        if kv_type is KvType.FLOAT16:
            k, v = (x.astype(np.float16).astype(np.float64) for x in (k, v))
        q, k, v = (x.reshape(len(rows), -1, self.head_dim).transpose(1, 0, 2) for x in (q, k, v))
        k, v = (x.repeat(heads // kv_heads, axis=0) for x in (k, v))
        scores = q @ k.transpose(0, 2, 1) * self.head_dim**-0.5
        position = np.arange(len(rows))
        distance = position[:, None] - position[None, :]
        hidden = (distance < 0) | (distance >= (window or len(rows)))
        scores = np.where(hidden, -np.inf, scores)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out = weights / weights.sum(axis=-1, keepdims=True) @ v
        return out.transpose(1, 0, 2).reshape(len(rows), -1)

    def harness(self, isa: str, *, window: int = 0, kv_type: KvType = KvType.INT16, threads: int = 2) -> Harness:
        return attention_harness(
            self.table,
            heads=self.heads,
            head_dim=self.head_dim,
            window=window,
            kv_type=kv_type,
            num_blocks=NUM_BLOCKS,
            isa=isa,
            threads=threads,
        )

    def run(self, harness: Harness, parts: list[tuple[int, int, int]]) -> list[np.ndarray]:
        """Outputs of one step over (sequence, begin, end)."""
        logits = harness.run(step([self.part(*part) for part in parts]))[:, : self.heads[0] * self.head_dim]
        return np.split(logits, np.cumsum([end - begin for _, begin, end in parts])[:-1])


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize(("heads", "head_dim"), [((9, 3), 64), ((4, 4), 80), ((6, 2), 96), ((8, 1), 128), ((2, 1), 16)])
@pytest.mark.parametrize("window", [0, 37, 200])
@pytest.mark.parametrize("kv_type", KvType)
def test_attention_equals_float64(
    kv_type: KvType, window: int, heads: tuple[int, int], head_dim: int, isa: str
) -> None:
    """Whole prompts, then a mixed step: two decode while one goes on with its prefill."""
    if isa == "portable" and (window == 37 or heads == (8, 1)):
        pytest.skip("slow and the same code as the others")
    case = Case(heads, head_dim, (300, 17, 145))
    harness = case.harness(isa, window=window, kv_type=kv_type)
    first = case.run(harness, [(0, 0, 299), (1, 0, 16), (2, 0, 60)])
    second = case.run(harness, [(0, 299, 300), (1, 16, 17), (2, 60, 145)])
    for sequence in range(3):
        got = np.concatenate([first[sequence], second[sequence]])
        difference = np.abs(got - case.expected(sequence, window, kv_type))
        if kv_type is KvType.INT16:
            # Against values that were not rounded; float16 storage alone makes 8e-3 and 4e-4 here.
            assert difference.max() < 6e-3
            assert difference.mean() < 3.5e-4
        else:
            np.testing.assert_allclose(got, case.expected(sequence, window, kv_type), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("kv_type", [KvType.FLOAT16, KvType.INT16])
def test_no_bit_depends_on_chunks_neighbours_or_threads(kv_type: KvType, window: int, isa: str) -> None:
    case = Case((6, 2), 32, (290, 130, 40))
    whole = case.run(case.harness(isa, window=window, kv_type=kv_type, threads=1), [(0, 0, 290)])[0]
    for threads in (1, 2, 5):
        harness = case.harness(isa, window=window, kv_type=kv_type, threads=threads)
        pieces, begin = [], 0
        for end in (1, 2, 5, 16, 17, 100, 128, 129, 256, 289, 290):
            beside = [] if end % 2 else [(1, 0, end % 130 + 1), (2, 0, 3)]
            pieces.append(case.run(harness, [*beside, (0, begin, end)])[-1])
            begin = end
        assert np.array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize("isa", available_isas())
def test_heads_of_one_dimension_do_not_overflow(isa: str) -> None:
    """Integers at the ends of their ranges, in queries, keys, weights and values of one sign, many rows and one."""
    case = Case((4, 1), 32, (140,))
    generator = np.random.default_rng(7)
    heads = case.table.reshape(140, 6, 32)
    heads[:, :5] = 0
    heads[:, :5, 9] = generator.choice([-3.0, 3.0], (140, 5))
    heads[:, 5] = np.float32(5) * generator.choice([-1.0, 1.0], 32)
    whole = case.run(case.harness(isa), [(0, 0, 140)])[0]
    np.testing.assert_allclose(whole, case.expected(0, 0, KvType.FLOAT32), rtol=1e-3)
    harness = case.harness(isa)
    assert np.array_equal(np.concatenate([case.run(harness, [(0, t, t + 1)])[0] for t in range(140)]), whole)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kv_type", KvType)
def test_a_blocks_old_content_is_never_read(kv_type: KvType, isa: str) -> None:
    """A freed block may hold another request's NaNs behind the positions written so far."""
    case = Case((2, 1), 32, (150, 20))
    bad = Case((2, 1), 32, (150, 20))
    bad.table[:] = np.nan
    clean = case.run(case.harness(isa, kv_type=kv_type), [(1, 0, 20)])[0]
    joined = np.concatenate([case.table, bad.table])
    harness = attention_harness(
        joined, heads=(2, 1), head_dim=32, window=0, kv_type=kv_type, num_blocks=NUM_BLOCKS, isa=isa
    )
    tables = case.blocks[1]
    harness.run(step([(range(170 + 150, 170 + 170), 0, tables), (range(170, 170 + 12), 20, [*tables, tables[-1]])]))
    got = harness.run(step([(range(150, 170), 0, tables)]))[:, : 2 * 32]
    assert np.array_equal(got, clean)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kv_type", KvType)
def test_a_value_that_is_not_finite_reaches_those_who_see_it(kv_type: KvType, isa: str) -> None:
    case = Case((2, 1), 32, (150,))
    clean = case.run(case.harness(isa, kv_type=kv_type), [(0, 0, 150)])[0]
    for column, value in ((2 * 32 + 3, np.nan), (3 * 32 + 5, np.nan), (3 * 32 + 5, np.inf)):
        bad = Case((2, 1), 32, (150,))
        bad.table[100, column] = value
        got = bad.run(bad.harness(isa, kv_type=kv_type), [(0, 0, 150)])[0]
        assert np.array_equal(got[:100], clean[:100])
        assert not np.isfinite(got[100:]).all(axis=1).any()


@pytest.mark.parametrize("isa", available_isas())
def test_integer_sums_do_not_overflow(isa: str) -> None:
    """Keys equal to their query, and values and weights all alike: the largest sums that there are."""
    case = Case((1, 1), 128, (256,))
    case.table[:] = 0
    case.table[:, ::2] = 3.0
    got = case.run(case.harness(isa), [(0, 0, 256)])[0]
    np.testing.assert_allclose(got, case.expected(0, 0, KvType.INT16), rtol=1e-3, atol=1e-6)
