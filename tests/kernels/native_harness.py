"""Small programs for the native library, so that single kernels can be fed and read from tests.

Activations enter as rows of an F32 embedding table and leave through an exact product with an identity matrix, so
tests use the library's public interface only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from k_blocks import MADE, random_blocks

from aphrodite.kernels.cpu.library import NativeLibrary, load
from aphrodite.kernels.cpu.program import (
    LOGITS,
    Activation,
    GroupArrays,
    GroupKind,
    KvType,
    LatentDesc,
    NativeMemory,
    OpKind,
    Program,
    ProgramBuilder,
    RowSet,
    StepDesc,
    TileKind,
    repack,
    repack_groups,
    tiles_bytes,
)
from aphrodite.quantization.types import QuantType, RawTensor
from aphrodite.runner.inputs import ForwardInputs

ISAS = ("avx512", "avx2", "portable")
BLOCK = 16

# The types that the native library has tiles for.
TILED = (
    QuantType.F32,
    QuantType.F16,
    QuantType.BF16,
    QuantType.Q4_0,
    QuantType.Q4_1,
    QuantType.Q5_0,
    QuantType.Q5_1,
    QuantType.Q8_0,
    *MADE,
)


def available_isas() -> list[str]:
    """Instruction sets that run here; empty without the library."""
    library = load()
    return [isa for isa in ISAS if library is not None and library.select_isa(isa) == isa]


def raw_tensor(values: np.ndarray, qtype: QuantType, name: str = "w") -> RawTensor:
    """Values in a storage type, as the gguf package encodes them."""
    data = quantize(values.astype(np.float32), GGMLQuantizationType(qtype.gguf_id))
    rows = values.shape[0] if values.ndim == 2 else 1
    return RawTensor(name, values.shape, qtype, np.ascontiguousarray(data).view(np.uint8).reshape(rows, -1))


def columns_of(qtype: QuantType) -> int:
    """Columns for a small matrix: several blocks, of 32 columns no power of two."""
    return 512 if qtype.block_size == 256 else 96


def random_weight(qtype: QuantType, rows: int, columns: int, seed: int) -> RawTensor:
    """A matrix of values about 1, of random codes where the gguf package cannot quantize into the type."""
    if qtype in MADE:
        return random_blocks(qtype, (rows, columns), 1.0, balanced=False, seed=seed)
    return raw_tensor(np.random.default_rng(seed).standard_normal((rows, columns)), qtype)


def exact_values(tensor: RawTensor) -> np.ndarray:
    """What the stored bytes stand for, float64, by the gguf package."""
    ggml_type = GGMLQuantizationType(tensor.qtype.gguf_id)
    rows = tensor.data if tensor.qtype is not QuantType.F32 else tensor.data.view("<f4")
    if tensor.qtype is QuantType.F16:
        rows = tensor.data.view("<f2")
    return dequantize(rows, ggml_type).reshape(tensor.shape).astype(np.float64)


@dataclass
class Harness:
    """A program whose step maps token rows (of `table`) to logits."""

    program: Program
    cache: NativeMemory
    num_blocks: int
    vocab_size: int
    threads: int
    keep_alive: list[NativeMemory]

    def run(self, inputs: ForwardInputs) -> np.ndarray:
        logits = np.zeros((len(inputs.logits_index), self.vocab_size), np.float32)
        self.program.run(
            StepDesc(
                *(tensor.data_ptr() for tensor in inputs if tensor is not None),
                len(inputs.token_ids),
                len(inputs.context_lens),
                inputs.block_tables.stride(0),
                inputs.block_tables.shape[1],
                len(logits),
                logits.ctypes.data,
                self.cache.address,
                self.num_blocks,
                self.threads,
                None,
            )
        )
        return logits


def place(library: NativeLibrary, tensor: RawTensor) -> NativeMemory:
    """A weight in tiles."""
    rows, columns = tensor.shape
    memory = NativeMemory(library, tiles_bytes(library, tensor.qtype, rows, columns))
    repack(library, tensor, memory.address)
    return memory


def step(sequences: Sequence[tuple[Sequence[int], int, Sequence[int]]], *, all_logits: bool = True) -> ForwardInputs:
    """Inputs for (token ids, first position, block table) of each sequence."""
    width = max(len(table) for _, _, table in sequences)
    tokens, positions, slots, index, starts, contexts = [], [], [], [], [0], []
    for ids, first, table in sequences:
        for i, token in enumerate(ids):
            position = first + i
            tokens.append(token)
            positions.append(position)
            slots.append(table[position // BLOCK] * BLOCK + position % BLOCK)
        starts.append(len(tokens))
        contexts.append(first + len(ids))
        index.append(len(tokens) - 1)
    tables = [list(table) + [0] * (width - len(table)) for _, _, table in sequences]
    return ForwardInputs(
        token_ids=torch.tensor(tokens, dtype=torch.int32),
        positions=torch.tensor(positions, dtype=torch.int32),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        query_start=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        block_tables=torch.tensor(tables, dtype=torch.int32),
        logits_index=torch.tensor(range(len(tokens)) if all_logits else index, dtype=torch.int32),
    )


def product_harness(
    table: np.ndarray | RawTensor,
    weight: RawTensor,
    kind: Activation,
    isa: str,
    threads: int = 2,
    order: np.ndarray | None = None,
) -> Harness:
    """logits = table[token] @ weight.T, or table[token][order] @ weight.T"""
    library = load()
    assert library is not None
    stored = table if isinstance(table, RawTensor) else raw_tensor(table, QuantType.F32)
    return _product(library, stored, place(library, weight), weight.qtype, weight.shape[0], kind, isa, threads, order)


def group_product_harness(
    table: np.ndarray,
    group_kind: GroupKind,
    arrays: GroupArrays,
    kind: Activation,
    isa: str,
) -> Harness:
    """The same with groups of codes."""
    library = load()
    assert library is not None
    rows = len(arrays.codes)
    memory = NativeMemory(library, tiles_bytes(library, group_kind, rows, table.shape[1]))
    repack_groups(library, group_kind, arrays, memory.address)
    return _product(library, raw_tensor(table, QuantType.F32), memory, group_kind, rows, kind, isa, 2)


def _product(
    library: NativeLibrary,
    table: RawTensor,
    matrix: NativeMemory,
    tiles: TileKind,
    out: int,
    kind: Activation,
    isa: str,
    threads: int,
    order: np.ndarray | None = None,
) -> Harness:
    rows, columns = table.shape
    source = place(library, table)
    builder = ProgramBuilder()
    buffer, last = builder.add_buffer(columns), builder.add_buffer(columns)
    pack = builder.add_pack(kind, columns, RowSet.LOGITS)
    lookup = builder.add_weight(source.address, table.qtype, (rows, columns))
    product = builder.add_weight(matrix.address, tiles, (out, columns), pack=pack)
    builder.add_op(OpKind.EMBED, output=buffer, weights=[lookup])
    builder.add_op(OpKind.GATHER, rows=RowSet.LOGITS, source=buffer, output=last)
    window = 0 if order is None else builder.add_orders([order])
    builder.add_op(OpKind.PACK, rows=RowSet.LOGITS, source=last, packs=[pack], window=window)
    builder.add_op(OpKind.LINEAR, rows=RowSet.LOGITS, output=LOGITS, weights=[product])
    flat = np.ones((4096, 8), np.float32)
    # A vocabulary is both the rows of the table and the columns of the logits; the table may be the shorter one.
    program = builder.build(
        library,
        isa,
        flat,
        0 * flat,
        vocab_size=out,
        num_layers=1,
        heads=1,
        kv_heads=1,
        head_dim=16,
        kv_type=KvType.FLOAT32,
    )
    cache = NativeMemory(library, 256 * 2 * 16 * BLOCK * 4)
    return Harness(program, cache, 256, out, threads, [source, matrix])


def attention_harness(
    table: np.ndarray,
    *,
    heads: tuple[int, int],
    head_dim: int,
    window: int,
    kv_type: KvType,
    num_blocks: int,
    isa: str,
    threads: int = 2,
) -> Harness:
    """logits = attention output of tokens whose q, k and v are the rows of `table`; heads = (query, key)."""
    library = load()
    assert library is not None
    width = heads[0] * head_dim
    source = place(library, raw_tensor(table, QuantType.F32))
    identity = place(library, raw_tensor(np.eye(max(width, len(table)), width), QuantType.F32))
    builder = ProgramBuilder()
    qkv, out, last = (builder.add_buffer(columns) for columns in (table.shape[1], width, width))
    pack = builder.add_pack(Activation.FLOAT32, width, RowSet.LOGITS)
    lookup = builder.add_weight(source.address, QuantType.F32, (len(table), table.shape[1]))
    product = builder.add_weight(identity.address, QuantType.F32, (max(width, len(table)), width), pack=pack)
    builder.add_op(OpKind.EMBED, output=qkv, weights=[lookup])
    builder.add_op(OpKind.ROTARY_KV, source=qkv)
    builder.add_op(OpKind.ATTENTION, source=qkv, output=out, window=window, value=head_dim**-0.5)
    builder.add_op(OpKind.GATHER, rows=RowSet.LOGITS, source=out, output=last)
    builder.add_op(OpKind.PACK, rows=RowSet.LOGITS, source=last, packs=[pack])
    builder.add_op(OpKind.LINEAR, rows=RowSet.LOGITS, output=LOGITS, weights=[product])
    unrotated = np.ones((4096, head_dim // 2), np.float32)
    vocab_size = max(width, len(table))
    program = builder.build(
        library,
        isa,
        unrotated,
        0 * unrotated,
        vocab_size=vocab_size,
        num_layers=1,
        heads=heads[0],
        kv_heads=heads[1],
        head_dim=head_dim,
        kv_type=kv_type,
    )
    cache = NativeMemory(library, num_blocks * kv_type.block_bytes(heads[1], head_dim))
    return Harness(program, cache, num_blocks, vocab_size, threads, [source, identity])


def latent_harness(
    table: np.ndarray,
    *,
    heads: tuple[int, int],
    rank: int,
    turning: int,
    kv_type: KvType,
    num_blocks: int,
    isa: str,
    threads: int = 2,
) -> Harness:
    """logits = attended latents of tokens whose queries and vectors are the rows of `table`; heads = (query heads,
    groups of them). What takes queries to the latent are identities, latents are normed by ones, nothing turns, and
    scores are not scaled."""
    library = load()
    assert library is not None
    width, dim = heads[0] * rank, rank + turning
    vocab_size = max(width, len(table))
    source = place(library, raw_tensor(table, QuantType.F32))
    identity = place(library, raw_tensor(np.eye(vocab_size, width), QuantType.F32))
    builder = ProgramBuilder()
    widths = (table.shape[1], heads[0] * dim, width, width)
    both, absorbed, out, last = (builder.add_buffer(columns) for columns in widths)
    builder.latent = LatentDesc(turning, rank, both, heads[0] * dim)
    stack = place(library, raw_tensor(np.tile(np.eye(rank), (heads[0], 1)), QuantType.F32))
    head_pack = builder.add_pack(Activation.FLOAT32, rank, RowSet.HEADS)
    identities = builder.add_weight(stack.address, QuantType.F32, (rank, rank), pack=head_pack)
    pack = builder.add_pack(Activation.FLOAT32, width, RowSet.LOGITS)
    lookup = builder.add_weight(source.address, QuantType.F32, table.shape)
    product = builder.add_weight(identity.address, QuantType.F32, (vocab_size, width), pack=pack)
    builder.add_op(OpKind.EMBED, output=both, weights=[lookup])
    builder.add_op(OpKind.LATENT_KV, source=both, output=absorbed, vector=builder.add_vector(np.ones(rank)))
    builder.add_op(OpKind.HEAD_LINEAR, source=both, output=absorbed, weights=[identities], window=dim, flag=dim)
    builder.add_op(OpKind.ATTENTION, source=absorbed, output=out, value=1.0)
    builder.add_op(OpKind.GATHER, rows=RowSet.LOGITS, source=out, output=last)
    builder.add_op(OpKind.PACK, rows=RowSet.LOGITS, source=last, packs=[pack])
    builder.add_op(OpKind.LINEAR, rows=RowSet.LOGITS, output=LOGITS, weights=[product])
    flat = np.ones((4096, turning // 2), np.float32)
    program = builder.build(
        library,
        isa,
        flat,
        0 * flat,
        vocab_size=vocab_size,
        num_layers=1,
        heads=heads[0],
        kv_heads=heads[1],
        head_dim=rank,
        kv_type=kv_type,
    )
    cache = NativeMemory(library, num_blocks * kv_type.latent_block_bytes(dim))
    return Harness(program, cache, num_blocks, vocab_size, threads, [source, identity, stack])
