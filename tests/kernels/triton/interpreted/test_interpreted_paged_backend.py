"""The Triton attention back end as a whole: who serves which rows, and a step's result, interpreted on CPU tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from paged_case import PagedStep, make_step

from aphrodite.attention.backend import AttentionShape, KVCache, QueryKeyTransform
from aphrodite.attention.triton_paged import (
    DENSE_AFTER,
    DENSE_CANDIDATES,
    DENSE_MIN,
    DENSE_MULTIPLE,
    DENSE_SHAPES,
    DENSE_TOKENS,
    DenseRun,
    DenseShapes,
    TritonAttention,
    dense_runs,
    divide_rows,
)
from aphrodite.kernels import reference
from aphrodite.kernels.triton.ragged_attention import RaggedConfig
from aphrodite.runner.inputs import DeviceInputs, HostLengths, StepSize

DIM, HEADS, KV_HEADS = 64, 4, 2


def shape_of(windows: tuple[int | None, ...] = (None,), **changed: object) -> AttentionShape:
    fields: dict[str, object] = {
        "windows": windows,
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": DIM,
        "block_size": 16,
        "dtype": torch.float32,
        "cache_dtype": torch.float32,
        "device": torch.device("cpu"),
    }
    return AttentionShape(**(fields | changed))  # type: ignore[arg-type]


def lengths_of(pairs: list[tuple[int, int]]) -> HostLengths:
    query, context = np.array(pairs, dtype=np.int32).T
    return HostLengths(query, context)


def inputs_of(step: PagedStep, lengths: HostLengths | None, table: np.ndarray) -> DeviceInputs:
    return DeviceInputs(
        token_ids=step.positions,
        positions=step.positions,
        slot_mapping=step.slot_mapping,
        query_start=step.query_start,
        context_lens=step.context_lens,
        rows=step.rows,
        block_tables=step.block_tables,
        logits_index=step.rows,
        lengths=lengths,
        attention_table=torch.from_numpy(table),
    )


@pytest.mark.parametrize(
    ("pairs", "decode_only"),
    [([(1, 40), (1, 0), (1, 9)], True), ([(1, 40), (33, 33), (1, 3), (5, 30)], False), ([(18, 18)], False)],
)
def test_a_step_of_layers_with_different_windows(pairs: list[tuple[int, int]], decode_only: bool) -> None:
    """Norm, rotation, cache write and attention of three layers, with padding rows behind the step's tokens."""
    windows = (None, 12, None)
    step = make_step(pairs, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM)
    angles = torch.outer(torch.arange(64.0), torch.rand(DIM // 2))
    norms = tuple(torch.rand(DIM) + 0.5 for _ in windows), tuple(torch.rand(DIM) + 0.5 for _ in windows)
    transform = QueryKeyTransform(angles.cos(), angles.sin(), *norms, norm_eps=1e-6)
    backend = TritonAttention(shape_of(windows), transform)
    lengths = None if decode_only else lengths_of(pairs)
    table = np.zeros(0, dtype=np.int32) if lengths is None else backend.stage_step(lengths)
    cache = KVCache(*(torch.stack([c] * 3) for c in (step.keys, step.values)))
    serve = backend.begin_step(inputs_of(step, lengths, table), cache)
    tokens = len(step.positions)
    for layer, window in enumerate(windows):
        qkv = torch.cat((step.qkv, torch.full((2, step.qkv.shape[1]), 3.0)))
        out = serve(layer, qkv)
        assert torch.isfinite(out).all()
        heads = step.qkv.double().view(tokens, -1, DIM)
        query, key = (
            reference.apply_rotary(
                reference.rms_norm(x, norm[layer].double(), 1e-6), step.positions, *(t.double() for t in transform[:2])
            )
            for x, norm in zip((heads[:, :HEADS], heads[:, HEADS : HEADS + KV_HEADS]), norms, strict=True)
        )
        keys, values = (c[layer].double() for c in cache)
        written = keys.transpose(1, 2).flatten(0, 1)[step.slot_mapping]
        live = step.slot_mapping >= 0
        torch.testing.assert_close(written[live], key[live], rtol=0, atol=1e-5)
        fields = vars(step) | {"keys": keys, "values": values, "qkv": query.flatten(1)}
        torch.testing.assert_close(out[:tokens].double(), PagedStep(**fields).expected(window), rtol=0, atol=1e-5)


def test_padded_steps_attend_as_others() -> None:
    """Over a longer context than a program gets, so that keys are split; rows of padding become zeros."""
    pairs = [(1, 40), (20, 300), (1, 0), (5, 5)]
    step = make_step(pairs, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM)
    transform = QueryKeyTransform(torch.ones(512, DIM // 2), torch.zeros(512, DIM // 2))
    backend = TritonAttention(shape_of((None, 12)), transform)
    size = StepSize(tokens=40, sequences=6, decode=False)
    table = backend.stage_padded(lengths_of(pairs), size)
    assert table is not None
    assert len(table) == backend.padded_table_length(size)
    exact = inputs_of(step, lengths_of(pairs), backend.stage_step(lengths_of(pairs)))
    tokens = len(step.positions)
    padded = inputs_of(step, None, table)._replace(
        padded=size,
        positions=F.pad(step.positions, (0, size.tokens - tokens)),
        slot_mapping=F.pad(step.slot_mapping, (0, size.tokens - tokens), value=-1),
        query_start=F.pad(step.query_start, (0, 2), value=tokens),
        context_lens=F.pad(step.context_lens, (0, 2)),
        rows=F.pad(step.rows, (0, 2)),
    )
    results = []
    for inputs in (exact, padded):
        cache = KVCache(*(torch.stack([c] * 2) for c in (step.keys, step.values)))
        serve = backend.begin_step(inputs, cache)
        rows = len(inputs.positions)
        qkv = F.pad(step.qkv, (0, 0, 0, rows - tokens))
        results.append(torch.stack([serve(layer, qkv.clone()) for layer in range(2)]))
    torch.testing.assert_close(results[1][:, :tokens], results[0][:, :tokens], rtol=0, atol=1e-6)
    assert not results[1][:, tokens:].any()


def test_a_step_that_does_not_fit_is_not_padded() -> None:
    backend = TritonAttention(shape_of(), QueryKeyTransform(torch.ones(8, 4), torch.zeros(8, 4)))
    assert backend.stage_padded(lengths_of([(2, 2)] * 200), StepSize(tokens=400, sequences=2, decode=False)) is None


def test_queries_grow_by_their_position() -> None:
    """As if they had come so: the factor is applied before anything else."""
    pairs = [(1, 40), (33, 33)]
    step = make_step(pairs, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM)
    plain = QueryKeyTransform(torch.ones(64, DIM // 2), torch.zeros(64, DIM // 2))
    grown = step.qkv.clone()
    grown[:, : HEADS * DIM] *= 1.0 + step.positions[:, None] / 10
    results = []
    scaled = plain._replace(query_scales=1.0 + torch.arange(64.0) / 10)
    for transform, qkv in ((plain, grown), (scaled, step.qkv.clone())):
        backend = TritonAttention(shape_of(), transform)
        table = backend.stage_step(lengths_of(pairs))
        cache = KVCache(step.keys[None].clone(), step.values[None].clone())
        results.append(backend.begin_step(inputs_of(step, lengths_of(pairs), table), cache)(0, qkv))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)


def test_cache_is_what_bytes_per_block_says() -> None:
    shape = shape_of((None, None), cache_dtype=torch.float8_e4m3fn, dtype=torch.float16)
    transform = QueryKeyTransform(torch.ones(8, DIM // 2), torch.zeros(8, DIM // 2))
    cache = TritonAttention(shape, transform).allocate(7)
    assert cache.keys.nbytes + cache.values.nbytes == 7 * shape.bytes_per_block


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, "not cpu"),
        ({"device": torch.device("cuda"), "head_dim": 288}, "288"),
        ({"device": torch.device("cuda"), "head_dim": 68}, "68"),
        ({"device": torch.device("cuda"), "dtype": torch.float64}, "float64"),
        ({"device": torch.device("cuda"), "cache_dtype": torch.float16}, "float16"),
        ({"device": torch.device("cuda"), "cache_dtype": torch.float8_e4m3fn}, "float32"),
        ({"device": torch.device("cuda"), "cache_dtype": torch.float8_e4m3fn, "dtype": torch.float16}, None),
        ({"device": torch.device("cuda")}, None),
    ],
)
def test_what_is_declined(changed: dict[str, object], reason: str | None) -> None:
    declined = TritonAttention.decline(shape_of(**changed))
    assert (declined is None) == (reason is None)
    if declined is not None:
        assert reason in declined.reason


def test_a_step_must_be_staged() -> None:
    transform = QueryKeyTransform(torch.ones(64, DIM // 2), torch.zeros(64, DIM // 2))
    backend = TritonAttention(shape_of(), transform)
    step = make_step([(18, 18)], heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM)
    cache = KVCache(step.keys[None], step.values[None])
    table = backend.stage_step(lengths_of([(18, 19)]))
    with pytest.raises(RuntimeError, match="stage_step"):
        backend.begin_step(inputs_of(step, lengths_of([(18, 18)]), table), cache)


def covered(pairs: list[tuple[int, int]], window: int | None, dense: bool) -> list[np.ndarray]:
    """How many times each query row is served, by sequence."""
    lengths = lengths_of(pairs)
    config = RaggedConfig(rows=64, tile=16, num_warps=4, num_stages=1)
    runs = dense_runs(lengths, window) if dense else []
    assert len(runs) == (0 if not dense else {None: 3, 1100: 2, 100: 0}[window])
    work = divide_rows(lengths, window, runs, config, group=2, kv_heads=2, programs=1)
    counts = [np.zeros(queries, dtype=int) for queries, _ in pairs]
    flat = np.zeros(sum(queries for queries, _ in pairs), dtype=int)
    for run in work.dense:
        for prompt in range(run.prompts):
            first = run.first_token + prompt * run.length
            flat[first : first + run.rows] += 1
    for mine, part in zip(counts, np.split(flat, np.cumsum([queries for queries, _ in pairs])[:-1]), strict=True):
        mine += part
    for sequence, row in work.table.tiles[:, :2]:
        counts[sequence][row : row + 32] += 1
    return counts


@pytest.mark.parametrize("window", [None, 1100, 100])
@pytest.mark.parametrize("dense", [False, True])
def test_every_row_of_a_longer_query_is_served_once(dense: bool, window: int | None) -> None:
    pairs = [
        (1, 9),
        (1090, 1090),
        (1090, 1090),
        *[(DENSE_MIN, DENSE_MIN)] * 4,
        (33, 33),
        (2900, 3000),
        (1, 1),
        (2, 2),
        (5000, 5000),
    ]
    for (queries, _), counts in zip(pairs, covered(pairs, window, dense), strict=True):
        assert (counts == (queries > 1)).all()


def test_equal_prompts_in_a_row_are_one_run() -> None:
    pairs = [(1, 9), (1100, 1100), (1100, 1100), (2048, 2048), (2047, 2047), (1100, 1100), (2100, 2200)]
    rows = 1100 // DENSE_MULTIPLE * DENSE_MULTIPLE
    assert dense_runs(lengths_of(pairs), None) == [
        DenseRun(1, 2, 1100, rows),
        DenseRun(2201, 1, 2048, 2048),
    ]  # alone, 1,100 and 2,047 tokens are too few


def test_a_window_bounds_what_torch_attends_to() -> None:
    assert dense_runs(lengths_of([(4000, 4000)]), 2100) == [DenseRun(0, 1, 4000, 2048)]
    assert dense_runs(lengths_of([(4000, 4000)]), DENSE_TOKENS - 1) == []


def test_torch_serves_a_shape_that_keeps_coming() -> None:
    shapes = DenseShapes()
    run = DenseRun(0, 1, 2048, 2048)
    assert [shapes.admit([run]) for _ in range(DENSE_AFTER + 1)] == [[False]] * (DENSE_AFTER - 1) + [[True]] * 2
    assert shapes.admit([DenseRun(9, 1, 2100, 2048)]) == [True]  # the rest of a single prompt does not matter
    assert shapes.admit([DenseRun(0, 2, 2048, 2048)]) == [False]
    assert shapes.admit([DenseRun(0, 1, 1024, 1024), run]) == [False, True]


def test_one_shape_a_step_is_planned() -> None:
    shapes = DenseShapes()
    runs = [DenseRun(0, 1, 512, 512), DenseRun(512, 1, 768, 768), DenseRun(1280, 1, 512, 512)]
    served = [shapes.admit(runs) for _ in range(DENSE_AFTER + 1)]
    assert served == [[False] * 3] * (DENSE_AFTER - 1) + [[True, False, True], [True] * 3]


def test_planned_shapes_and_counts_are_bounded() -> None:
    shapes = DenseShapes()
    runs = [DenseRun(0, 1, 256 * n, 256 * n) for n in range(2, DENSE_SHAPES + 4)]
    admitted = [all([shapes.admit([run]) for _ in range(DENSE_AFTER)][-1]) for run in runs]
    assert admitted == [True] * DENSE_SHAPES + [False] * 2

    shapes = DenseShapes()
    first = DenseRun(0, 2, 600, 512)
    for _ in range(DENSE_AFTER - 1):
        shapes.admit([first])
    for length in range(1000, 1000 + DENSE_CANDIDATES):
        shapes.admit([DenseRun(0, 2, length, 768)])
    assert shapes.admit([first]) == [False]  # forgotten
