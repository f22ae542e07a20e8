"""Attention over paged latents of the native library against float64."""

from __future__ import annotations

import numpy as np
import pytest
from native_harness import Harness, available_isas, latent_harness, step

from aphrodite.kernels.cpu.program import KvType

pytestmark = pytest.mark.skipif(not available_isas(), reason="the native library is not built")

NUM_BLOCKS = 64
TURNING = 32


class Case:
    """Random queries (taken to the latent already) and latents for sequences whose blocks are scattered.

    Args:
        heads: query heads, and groups of them that a task computes.
        rank: dimensions of latents.
        turning_size: standard deviation of keys' turning parts; that of latents is 1.
    """

    def __init__(self, heads: tuple[int, int], rank: int, lengths: tuple[int, ...], turning_size: float = 1.0) -> None:
        self.heads, self.rank, self.lengths = heads, rank, lengths
        generator = np.random.default_rng(rank)
        dim = rank + TURNING
        queries = generator.standard_normal((sum(lengths), heads[0], dim)) * 2.0 / dim**0.5
        vectors = generator.standard_normal((sum(lengths), dim))
        vectors[:, rank:] *= turning_size
        queries[..., rank:] /= turning_size
        self.table = np.concatenate([queries.reshape(len(vectors), -1), vectors], axis=1).astype(np.float32)
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        free = list(generator.permutation(NUM_BLOCKS))
        self.blocks = [[int(free.pop()) for _ in range(-(-length // 16))] for length in lengths]

    def expected(self, sequence: int, kv_type: KvType) -> np.ndarray:
        """[length, heads * rank] float64."""
        heads, dim = self.heads[0], self.rank + TURNING
        rows = self.table[self.starts[sequence] : self.starts[sequence + 1]].astype(np.float64)
        queries, latents = rows[:, : heads * dim].reshape(len(rows), heads, dim), rows[:, heads * dim :]
        normed = latents[:, : self.rank] / np.sqrt((latents[:, : self.rank] ** 2).mean(axis=1, keepdims=True))
        keys = np.concatenate([normed, latents[:, self.rank :]], axis=1)
        if kv_type is KvType.FLOAT16:
            keys = keys.astype(np.float16).astype(np.float64)
        scores = np.einsum("qhd,kd->hqk", queries, keys)
        scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out = np.einsum("hqk,kd->qhd", weights / weights.sum(axis=-1, keepdims=True), keys[:, : self.rank])
        return out.reshape(len(rows), -1)

    def harness(self, isa: str, *, kv_type: KvType = KvType.INT16, threads: int = 2) -> Harness:
        return latent_harness(
            self.table,
            heads=self.heads,
            rank=self.rank,
            turning=TURNING,
            kv_type=kv_type,
            num_blocks=NUM_BLOCKS,
            isa=isa,
            threads=threads,
        )

    def run(self, harness: Harness, parts: list[tuple[int, int, int]]) -> list[np.ndarray]:
        """Outputs of one step over (sequence, begin, end)."""
        rows = [
            (range(int(self.starts[s]) + begin, int(self.starts[s]) + end), begin, self.blocks[s])
            for s, begin, end in parts
        ]
        logits = harness.run(step(rows))[:, : self.heads[0] * self.rank]
        return np.split(logits, np.cumsum([end - begin for _, begin, end in parts])[:-1])


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize(("heads", "rank"), [((4, 1), 128), ((6, 2), 96), ((3, 3), 32)])
@pytest.mark.parametrize(
    ("kv_type", "turning_size"), [*((kind, 1.0) for kind in KvType), (KvType.INT16, 100.0), (KvType.INT16, 0.01)]
)
def test_attention_equals_float64(
    kv_type: KvType, turning_size: float, heads: tuple[int, int], rank: int, isa: str
) -> None:
    """Whole prompts, then a mixed step: two decode while one goes on with its prefill."""
    if isa == "portable" and heads == (4, 1):
        pytest.skip("slow and the same code as the others")
    case = Case(heads, rank, (300, 17, 145), turning_size)
    harness = case.harness(isa, kv_type=kv_type)
    first = case.run(harness, [(0, 0, 299), (1, 0, 16), (2, 0, 60)])
    second = case.run(harness, [(0, 299, 300), (1, 16, 17), (2, 60, 145)])
    for sequence in range(3):
        got = np.concatenate([first[sequence], second[sequence]])
        expected = case.expected(sequence, kv_type)
        difference = np.abs(got - expected)
        if kv_type is KvType.INT16:  # against values that were not rounded; float16 storage alone makes 1.6e-3 and 1e-4
            assert difference.max() < 2e-3
            assert difference.mean() < 8e-5
        elif kv_type is KvType.FLOAT16:  # the norm's last bit decides how some values are rounded
            assert difference.max() < 4e-3
            assert difference.mean() < 5e-6
        else:
            np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kv_type", [KvType.FLOAT16, KvType.INT16])
def test_no_bit_depends_on_chunks_neighbours_or_threads(kv_type: KvType, isa: str) -> None:
    case = Case((6, 2), 96, (290, 130, 40))
    whole = case.run(case.harness(isa, kv_type=kv_type, threads=1), [(0, 0, 290)])[0]
    for threads in (1, 2, 5):
        harness = case.harness(isa, kv_type=kv_type, threads=threads)
        pieces, begin = [], 0
        for end in (1, 2, 5, 16, 17, 100, 128, 129, 256, 289, 290):
            beside = [] if end % 2 else [(1, 0, end % 130 + 1), (2, 0, 3)]
            pieces.append(case.run(harness, [*beside, (0, begin, end)])[-1])
            begin = end
        assert np.array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kv_type", KvType)
def test_a_blocks_old_content_is_never_read(kv_type: KvType, isa: str) -> None:
    """A freed block may hold another request's NaNs behind the positions written so far."""
    case, bad = Case((2, 1), 32, (150, 20)), Case((2, 1), 32, (150, 20))
    clean = case.run(case.harness(isa, kv_type=kv_type), [(1, 0, 20)])[0]
    bad.table[:] = np.nan
    case.table = np.concatenate([case.table, bad.table])
    harness = case.harness(isa, kv_type=kv_type)
    table = case.blocks[1]
    harness.run(step([(range(170 + 150, 170 + 170), 0, table), (range(170, 170 + 12), 20, [*table, table[-1]])]))
    assert np.array_equal(case.run(harness, [(1, 0, 20)])[0], clean)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kv_type", KvType)
def test_a_value_that_is_not_finite_reaches_those_who_see_it(kv_type: KvType, isa: str) -> None:
    case = Case((2, 1), 32, (150,))
    clean = case.run(case.harness(isa, kv_type=kv_type), [(0, 0, 150)])[0]
    vectors = 2 * (32 + TURNING)
    for column, value in ((vectors + 3, np.nan), (vectors + 32 + 5, np.nan), (vectors + 32 + 5, np.inf)):
        bad = Case((2, 1), 32, (150,))
        bad.table[100, column] = value
        got = bad.run(bad.harness(isa, kv_type=kv_type), [(0, 0, 150)])[0]
        assert np.array_equal(got[:100], clean[:100])
        assert not np.isfinite(got[100:]).all(axis=1).any()


@pytest.mark.parametrize("isa", available_isas())
def test_integer_sums_do_not_overflow(isa: str) -> None:
    """Keys equal to their query, latents of one large value, all weights alike: the largest sums that there are."""
    case = Case((1, 1), 128, (256,))
    queries, vectors = np.split(case.table, 2, axis=1)
    case.table[:] = 0
    queries[:, 3] = vectors[:, 3] = 3.0
    queries[:, 128:] = vectors[:, 128:] = 0.5
    got = case.run(case.harness(isa), [(0, 0, 256)])[0]
    np.testing.assert_allclose(got, case.expected(0, KvType.INT16), rtol=2e-3, atol=1e-5)
