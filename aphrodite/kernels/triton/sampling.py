"""The sampler on the device: plans of all rows of a step in a few launches that a CUDA graph can hold.

    mark      what history and position say about single tokens            (sampling_history.py)
    measure   one read of all logits: chunk maxima, sums where needed      (sampling_measure.py)
    choose    greedy rows; lists of what can survive in others             (sampling_choose.py)
    listed    rows with few survivors: the program over their list         (sampling_listed.py)
    widen     rows with many: the program over the vocabulary, in a copy   (sampling_wide.py)
    draw      of those, and of rows without a truncation

A row ends (`settle`, sampling_draw.py) in the first of these that knows its token. `Launches` says which of them a step
needs, by the plans of its rows; which way a row goes depends on its logits and its plan alone.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

import torch
import triton

from aphrodite.kernels.triton import sampling_record as r
from aphrodite.kernels.triton.launch import launch_options, pdl_supported
from aphrodite.kernels.triton.sampling_choose import choose_kernel
from aphrodite.kernels.triton.sampling_history import mark_kernel
from aphrodite.kernels.triton.sampling_listed import listed_kernel
from aphrodite.kernels.triton.sampling_measure import CHUNK, PIECE, measure_kernel
from aphrodite.kernels.triton.sampling_report import REPORT_PIECE, report_kernel, settle_kernel
from aphrodite.kernels.triton.sampling_stages import LIST_CAPACITY
from aphrodite.kernels.triton.sampling_wide import DRAW_BLOCKS, draw_kernel, widen_kernel

# Without fused multiply-adds a logit is the same number in every kernel that reads it, and that of the torch stages.
EXACT = {"enable_fp_fusion": False}
MEASURE_REGISTERS = 64  # a thread: four blocks run on a multiprocessor of NVIDIA's then
LISTING_REGISTERS = 192  # a thread that makes lists: left to itself NVIDIA's assembler takes 128 and spills


class Launches(IntEnum):
    """What a step launches; each does what the ones before it do, too."""

    GREEDY = 0  # measure, choose
    WHOLE = 1  # and draw: rows without truncations
    LISTED = 2  # and listed and widen: rows with truncations and the like
    MARKED = 3  # and mark: rows whose history or position decides about tokens


class Outputs(NamedTuple):
    """Of B rows."""

    token_ids: torch.Tensor  # [B] int32; 0 where not ok
    ok: torch.Tensor  # [B] bool
    exhausted: torch.Tensor  # [B] bool


class SamplingKernels:
    """The launches, and the memory that they pass from one to the next.

    Args:
        num_rows: rows of the tables; a row number from there on is padding.
        history: [num_rows or more, positions] int32, tokens of each row.
    """

    def __init__(self, num_rows: int, vocab: int, history: torch.Tensor) -> None:
        self.vocab, self.num_rows, self.history = vocab, num_rows, history
        device = history.device
        self._pdl = pdl_supported(device)
        nvidia = device.type == "cuda" and torch.version.hip is None
        self._few_registers = {"maxnreg": MEASURE_REGISTERS} if nvidia else {}
        self._more_registers = {"maxnreg": LISTING_REGISTERS} if nvidia else {}
        self._chunks, self._pieces = triton.cdiv(vocab, CHUNK.value), triton.cdiv(vocab, PIECE.value)

        def ints(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        def floats(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.float32, device=device)

        self.records = ints(num_rows, r.RECORD.value)
        self.counts, self.marks = ints(num_rows, vocab), ints(num_rows, vocab)
        self._work = floats(num_rows, vocab)
        self._tops = floats(num_rows, self._chunks)
        self._piece_words = floats(num_rows, self._pieces, r.PIECE_WORDS.value)
        self._chunk_list = ints(num_rows, self._chunks)
        self._values, self._tokens = floats(num_rows, LIST_CAPACITY.value), ints(num_rows, LIST_CAPACITY.value)
        self._states, self._floats = ints(num_rows, r.STATE_WORDS.value), floats(num_rows, r.STATE_FLOATS.value)
        self._scores, self._winners = floats(num_rows, DRAW_BLOCKS.value), ints(num_rows, DRAW_BLOCKS.value)

    def run(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        outputs: Outputs,
        launches: Launches = Launches.MARKED,
        out_logits: torch.Tensor | None = None,
    ) -> None:
        """Sample B rows; allocates nothing and waits for nothing.

        Args:
            logits: [B, vocab], float32, bfloat16 or float16, contiguous rows; read only.
            rows, positions: [B] int32, different rows; tokens before the one to be chosen.
            launches: at least what each of the rows needs.
            out_logits: [B, vocab] float32, written with what each row was drawn from.
        """
        batch, stride, history_stride = logits.shape[0], logits.stride(0), self.history.stride(0)
        tables = (self.records, self.counts, self.marks)
        settles = out_logits is None
        options: dict[str, Any] = {"PDL": self._pdl, **launch_options(self._pdl), **EXACT}
        if launches >= Launches.MARKED:
            history = (self.history, history_stride, self.vocab, self.num_rows)
            mark_kernel[(batch,)](rows, positions, self.records, self.marks, *history, num_warps=16, **options)
        sizes = (stride, self.vocab, self.num_rows, self._chunks, self._pieces)
        sums = (self._tops, self._piece_words)
        grid = (batch, self._pieces)
        measure_kernel[grid](logits, rows, *tables, *sums, *sizes, num_warps=8, **self._few_registers, **options)
        lists = launches >= Launches.LISTED
        states = (self._states, self._floats)
        choose_kernel[(batch,)](
            *(logits, rows, positions, *tables, self.history, *sums),
            *(self._chunk_list, self._values, self._tokens, *states, *outputs, history_stride, *sizes),
            CHUNKS=max(triton.next_power_of_2(self._chunks), 32),
            PIECES=max(triton.next_power_of_2(self._pieces), 32),
            LISTS=lists,
            SETTLES=settles,
            num_warps=8 if lists else 4,
            **(self._more_registers if lists else {}),
            **options,
        )
        if lists:
            listed_kernel[(batch,)](
                *(rows, positions, *tables, self.history, self._values, self._tokens, *states, *outputs),
                *(history_stride, self.vocab),
                SETTLES=settles,
                num_warps=8,
                **self._more_registers,
                **options,
            )
            widen_kernel[(batch,)](
                *(logits, rows, positions, *tables, self.history, self._work, self._values, self._tokens),
                *(*states, *outputs, history_stride, stride, self.vocab),
                SETTLES=settles,
                num_warps=16,
                **options,
            )
        if launches >= Launches.WHOLE:
            draw_kernel[(batch, DRAW_BLOCKS.value)](
                *(logits, rows, positions, *tables, self.history, self._tops, self._work, *states),
                *(self._scores, self._winners, *outputs, history_stride, stride, self.vocab, self._chunks),
                SETTLES=settles,
                num_warps=8,
                **options,
            )
        if out_logits is not None:
            self._report(logits, rows, positions, outputs, out_logits)

    def _report(
        self, logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, outputs: Outputs, out: torch.Tensor
    ) -> None:
        states = (self._states, self._floats)
        report_kernel[(logits.shape[0], triton.cdiv(self.vocab, REPORT_PIECE.value))](
            *(logits, rows, self.records, self.counts, self.marks, self._work, self._values, self._tokens),
            *(*states, out, logits.stride(0), self.vocab),
            **EXACT,
        )
        settle_kernel[(logits.shape[0],)](
            *(rows, positions, self.records, self.counts, self.marks, self.history, *states),
            *(*outputs, self.history.stride(0), self.vocab, self.num_rows),
        )
