"""The executor on the native CPU library: compiles a spec and its weights into one program.

The program is a list of operations that the library runs for all tokens of a step in one call. Fusion happens here:
q, k and v are one product, gate and up are one gated product, residual additions are part of the product before
them, and norms write the packed form that the next product reads.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch

from aphrodite.errors import ConfigError
from aphrodite.kernels.cpu import library as native_library
from aphrodite.kernels.cpu.program import (
    BLOCK_COLUMNS,
    HIDDEN,
    KV_BLOCK,
    LOGITS,
    MAX_QUERY_GROUP,
    Activation,
    HeadNorm,
    KvType,
    NativeMemory,
    OpKind,
    Program,
    RowSet,
    StepDesc,
    tiles_bytes,
)
from aphrodite.layers.lora import AdapterRoom
from aphrodite.layers.rotary import query_scales, rotary_tables
from aphrodite.models.spec import ModelSpec, RotarySpec
from aphrodite.quantization.types import RawTensor, StackedTensor
from aphrodite.runner.inputs import ForwardInputs
from aphrodite.runner.native_adapters import NativeAdapters, PairTable
from aphrodite.runner.native_compiler import GATES, Compiler, Packs, compile_norm
from aphrodite.runner.native_experts import compile_experts, expert_names, unknown_parts_of_experts
from aphrodite.runner.native_latent import compile_latent_attention, heads_beside, latent_names, unknown_latents
from aphrodite.runner.native_weights import TiledWeights, tile_kind

logger = logging.getLogger(__name__)

Activations = Literal["float32", "int16", "int8"]
KvDtype = Literal["int16", "float16", "float32"]

_ACTIVATIONS = {"float32": Activation.FLOAT32, "int16": Activation.INT16, "int8": Activation.INT8}
_KV_TYPES = {"int16": KvType.INT16, "float16": KvType.FLOAT16, "float32": KvType.FLOAT32}
_HEAD_NORMS = {"head": HeadNorm.HEAD, "width": HeadNorm.WIDTH, "each_head": HeadNorm.EACH_HEAD}


class NativeExecutor:
    """Runs a Llama-like decoder on the CPU with the native library. Implements `ModelExecutor`.

    Args:
        weights: tensors in their file's bytes under canonical names; dropped when the constructor returns.
        activations: precision of the activations in products with quantized weights. "int16" is near exact,
            "int8" faster, "float32" exact; products with dense weights are always float32.
        kv_dtype: storage type of the KV cache. "int16" has a scale for each head and position, is closer than
            "float16" and quicker, for its attention multiplies integers; the others' attention is float32.
        threads: workers of a step, None for all cores of the process.
        isa: a lower instruction set than the best ("avx2", "portable"), for tests and comparison.
        adapters: what to have ready for them, None for none.
        progress: called with the bytes of weights that are in place, and with all.

    Raises:
        ConfigError: the executor declines (see `declines`) or `isa` cannot run here.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, RawTensor],
        *,
        block_size: int,
        max_model_len: int,
        activations: Activations = "int16",
        kv_dtype: KvDtype = "int16",
        threads: int | None = None,
        isa: str | None = None,
        adapters: AdapterRoom | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        reason = self.declines(spec, weights, block_size=block_size)
        library = native_library.load()
        if reason is not None or library is None:
            raise ConfigError(f"the native CPU executor cannot run this model: {reason}")
        chosen = library.select_isa(isa or library.isa)
        if chosen is None:
            raise ConfigError(f"instruction set {isa!r} does not run on this processor; leave it out for the best one")
        self.spec = spec
        self.block_size = block_size
        self.device = torch.device("cpu")
        self.max_model_len = max_model_len
        self.activations = activations
        self.kv_dtype = kv_dtype
        self.isa = chosen
        self.threads: int = max(1, threads if threads is not None else library.cdll.aph_available_cores())
        library.cdll.aph_set_default_threads(self.threads)
        self._library = library
        self._weights = TiledWeights(library, weights, _linear_names(spec), progress)
        compiler = Compiler(weights, self._weights, _ACTIVATIONS[activations])
        self._program = _compile(self, compiler)
        self.adapters = None
        if adapters is not None:
            self.adapters = NativeAdapters(
                adapters.slots, compiler.weight_numbers, compiler.builder.num_weights, self._weights
            )
        self._cache: NativeMemory | None = None
        self._num_blocks = 0
        self._logits = torch.empty(0)
        self._described: tuple[ForwardInputs, StepDesc, torch.Tensor] | None = None  # the latest step

    @staticmethod
    def declines(spec: ModelSpec, weights: Mapping[str, RawTensor], *, block_size: int = KV_BLOCK) -> str | None:
        """Why the executor cannot run this model, or None if it can."""
        library = native_library.load()
        if library is None:
            return native_library.unavailable_reason()
        if block_size != KV_BLOCK:
            return f"its KV cache has blocks of {KV_BLOCK} positions, not {block_size}"
        if unknown := _unknown_parts(spec):
            return f"its programs have no {', '.join(unknown)}"
        for name in _linear_names(spec):
            tensor = weights[name]
            rows, columns = tensor.shape[-2:]
            if isinstance(tensor, StackedTensor) and len({part.qtype for part in tensor.parts}) > 1:
                return f"{name} is stored in types that differ from expert to expert"
            if tiles_bytes(library, tile_kind(tensor, name), rows, columns) == 0:
                block = max(BLOCK_COLUMNS, tensor.qtype.block_size)
                return (
                    f"{name} is {tensor.qtype.name} [{rows}, {columns}]; it needs another type "
                    f"or a multiple of {block} columns"
                )
            if name.endswith("gate.weight") and rows % BLOCK_COLUMNS != 0:
                return f"{name} has {rows} rows, not a multiple of {BLOCK_COLUMNS}"
        return None

    @property
    def weight_bytes(self) -> int:
        """Bytes that the loaded weights occupy."""
        return self._weights.memory.size

    @property
    def kv_bytes_per_block(self) -> int:
        """Bytes of KV cache for one block over all layers."""
        spec, kind = self.spec, _KV_TYPES[self.kv_dtype]
        if spec.mla is not None:
            return spec.num_layers * kind.latent_block_bytes(spec.mla.latent_dim)
        return spec.num_layers * kind.block_bytes(spec.num_kv_heads, spec.head_dim)

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Reserve the cache; its pages are taken from the system as blocks are first written."""
        self._cache = NativeMemory(self._library, num_blocks * self.kv_bytes_per_block)
        self._described = None
        self._num_blocks = num_blocks

    def forward(self, inputs: ForwardInputs) -> torch.Tensor:
        """Run one step; the returned logits are overwritten by the next.

        Raises:
            ValueError: an input is out of range; the cache is unchanged.
            MemoryError: no memory for a step of this size.
        """
        return self._forward(inputs, None)

    @property
    def hidden_declined(self) -> None:
        """Every program brings hidden states."""

    def forward_hidden(self, inputs: ForwardInputs, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Like `forward`, and the hidden states `[H, hidden_size]` float32 of the token rows `index` `[H]` int32.

        Raises:
            ValueError, MemoryError: as `forward`.
        """
        if self._cache is None:
            raise RuntimeError("allocate_kv_cache must be called before forward")
        step, logits = self._describe(inputs, self._cache)
        index = index.to(torch.int32).contiguous()
        table = self._adapt(step)
        hidden = torch.empty(len(index), self.spec.hidden_size)
        step.hidden_index, step.hidden_rows, step.hidden = index.data_ptr(), len(index), hidden.data_ptr()
        self._program.run(step)
        del table  # nobody else may hold what the step was computed with
        # The norm's weight holds the scale of logits, which only the output head should see.
        return logits, hidden.div_(self.spec.logit_scale)

    def profile(self, inputs: ForwardInputs) -> dict[str, int]:
        """Like `forward`, but returns the nanoseconds that each kind of operation took."""
        nanoseconds = (ctypes.c_int64 * len(OpKind))()
        self._forward(inputs, ctypes.addressof(nanoseconds))
        return {kind.name.lower(): nanoseconds[kind] for kind in OpKind}

    def describe(self) -> dict[str, str]:
        """Kernels chosen and why, for logs and `doctor`."""
        return {
            "executor": "native",
            "instruction set": self.isa,
            "threads": str(self.threads),
            "activations": self.activations,
            "kv cache": self.kv_dtype,
            "weights": ", ".join(sorted(self._weights.type_names)),
        }

    def _forward(self, inputs: ForwardInputs, nanoseconds: int | None) -> torch.Tensor:
        if self._cache is None:
            raise RuntimeError("allocate_kv_cache must be called before forward")
        # A decoding batch comes in the same tensors step after step; describing them costs more than scheduling.
        if self._described is None or self._described[0] is not inputs:
            self._described = (inputs, *self._describe(inputs, self._cache))
        _, step, logits = self._described
        step.nanoseconds = nanoseconds
        table = self._adapt(step)
        self._program.run(step)
        del table  # nobody else may hold what the step was computed with
        return logits

    def _adapt(self, step: StepDesc) -> PairTable | None:
        """Let a step read the adapters that lie in the slots now; the caller holds on to them until it is over."""
        if self.adapters is None or not step.adapter_slots:
            return None
        table = self.adapters.table
        step.adapter_pairs, step.adapter_count = ctypes.addressof(table.pairs), self.adapters.num_slots
        return table

    def _describe(self, inputs: ForwardInputs, cache: NativeMemory) -> tuple[StepDesc, torch.Tensor]:
        """The library's view of a step, and where its logits go."""
        _check_layout(inputs)
        rows = inputs.logits_index.shape[0]
        if self._logits.shape[0] < rows:
            self._logits = torch.empty(rows, self.spec.vocab_size)
        step = StepDesc(
            inputs.token_ids.data_ptr(),
            inputs.positions.data_ptr(),
            inputs.slot_mapping.data_ptr(),
            inputs.query_start.data_ptr(),
            inputs.context_lens.data_ptr(),
            inputs.block_tables.data_ptr(),
            inputs.logits_index.data_ptr(),
            inputs.token_ids.shape[0],
            inputs.context_lens.shape[0],
            inputs.block_tables.stride(0),
            inputs.block_tables.shape[1],
            rows,
            self._logits.data_ptr(),
            cache.address,
            self._num_blocks,
            self.threads,
            adapter_slots=None if inputs.adapters is None else inputs.adapters.data_ptr(),
        )
        return step, self._logits[:rows]


def _compile(executor: NativeExecutor, compiler: Compiler) -> Program:
    spec = executor.spec
    builder = compiler.builder
    residual = builder.add_buffer(spec.hidden_size)
    embedding = compiler.table("embed.weight")
    builder.add_op(OpKind.EMBED, output=residual, weights=[embedding], value=spec.embedding_scale)
    part = builder.add_buffer(spec.hidden_size) if spec.block in ("post_norm", "sandwich") else residual
    rotaries = list(dict.fromkeys(spec.rotary_of(layer) for layer in range(spec.num_layers)))
    for layer in range(spec.num_layers):
        table = rotaries.index(spec.rotary_of(layer))
        _compile_attention(compiler, spec, layer, table, residual, part)
        moe = spec.moe_of(layer)
        if moe is not None:
            compile_experts(compiler, spec, moe, layer, residual)
        else:
            _compile_mlp(compiler, spec, layer, residual, part)
    _compile_head(compiler, spec, residual)
    mla = spec.mla
    return builder.build(
        executor._library,
        executor.isa,
        *_stacked_tables(spec, rotaries, executor.max_model_len),
        query_scales(spec, executor.max_model_len),
        vocab_size=spec.vocab_size,
        num_layers=spec.num_layers,
        heads=spec.num_heads,
        kv_heads=spec.num_kv_heads if mla is None else spec.num_heads // heads_beside(spec.num_heads),
        head_dim=spec.head_dim if mla is None else mla.kv_lora_rank,
        kv_type=_KV_TYPES[executor.kv_dtype],
    )


def _stacked_tables(
    spec: ModelSpec, rotaries: Sequence[RotarySpec | None], max_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines `[tables, max_len, half]`; a layer without positions turns by nothing."""
    shape = (max_len, spec.rotary.dim // 2)
    nothing = np.ones(shape, np.float32), np.zeros(shape, np.float32)
    tables = [nothing if rotary is None else rotary_tables(rotary, max_len) for rotary in rotaries]
    return np.stack([cos for cos, _ in tables]), np.stack([sin for _, sin in tables])


def _compile_attention(compiler: Compiler, spec: ModelSpec, layer: int, table: int, residual: int, part: int) -> None:
    """Adds a layer's attention to the residual stream, through `part` in models with norms behind their parts."""
    prefix, mla = f"layers.{layer}.", spec.mla
    if mla is None:
        attended, width = _compile_heads(compiler, spec, layer, table, residual), spec.num_heads * spec.head_dim
    else:
        attended = compile_latent_attention(compiler, spec, mla, layer, table, residual)
        width = spec.num_heads * mla.v_head_dim
    out_packs = compiler.packs("attended", [f"{prefix}o.weight"], width)
    compiler.pack(attended, out_packs)
    out = compiler.weight(f"{prefix}o.weight", out_packs)
    _compile_addition(compiler, spec, out, residual, part, f"{prefix}attn_post_norm")


def _compile_heads(compiler: Compiler, spec: ModelSpec, layer: int, table: int, residual: int) -> int:
    """Adds what leads to the attended values of all heads; returns the buffer that they are in."""
    builder, prefix = compiler.builder, f"layers.{layer}."
    qkv = compiler.buffer("qkv", (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim)
    attended = compiler.buffer("attended", spec.num_heads * spec.head_dim)
    names = [f"{prefix}{part}.weight" for part in "qkv"]
    packs = _normed_packs(compiler, spec, layer, names)
    columns = (0, spec.num_heads * spec.head_dim, (spec.num_heads + spec.num_kv_heads) * spec.head_dim)
    projections = [compiler.weight(name, packs, column) for name, column in zip(names, columns, strict=True)]
    compile_norm(compiler, spec, residual, packs, f"{prefix}attn_norm")
    builder.add_op(OpKind.LINEAR, output=qkv, weights=projections)
    # The operation reads the norm of q from this vector and the norm of k from the next.
    head_norms = [compiler.vector(f"{prefix}{part}_norm.weight") for part in "qk" if spec.qk_norm]
    builder.add_op(
        OpKind.ROTARY_KV,
        source=qkv,
        layer=layer,
        vector=head_norms[0] if head_norms else 0,
        window=table,
        flag=_HEAD_NORMS[spec.head_norm] if spec.qk_norm else HeadNorm.NONE,
        value=spec.norm_eps,
    )
    builder.add_op(
        OpKind.ATTENTION,
        source=qkv,
        output=attended,
        layer=layer,
        window=spec.windows[layer] or 0,
        vector=compiler.vector(f"{prefix}sinks.weight") if spec.attention_sinks else 0,
        flag=int(spec.attention_sinks),
        value=spec.query_scale,
        bound=spec.attention_softcap,
    )
    return attended


def _compile_addition(compiler: Compiler, spec: ModelSpec, weight: int, residual: int, part: int, norm: str) -> None:
    """A product added to the residual stream, through `part` and a norm in models with norms behind their parts."""
    if part == residual:
        compiler.builder.add_op(OpKind.LINEAR, output=residual, weights=[weight], flag=1)
        return
    compiler.builder.add_op(OpKind.LINEAR, output=part, weights=[weight])
    vector, kind = compiler.norm(spec, norm)
    compiler.builder.add_op(
        OpKind.NORM_ADD, source=part, output=residual, vector=vector, flag=kind, value=spec.norm_eps
    )


def _compile_mlp(compiler: Compiler, spec: ModelSpec, layer: int, residual: int, part: int) -> None:
    builder, prefix, names = compiler.builder, f"layers.{layer}.", _gated_names(layer)
    packs = _normed_packs(compiler, spec, layer, names)
    if spec.block != "parallel":
        compile_norm(compiler, spec, residual, packs, f"{prefix}mlp_norm")
    down_packs = compiler.packs("gated", [f"{prefix}down.weight"], spec.intermediate_size)
    pair = [compiler.weight(name, packs) for name in names]
    builder.add_op(OpKind.GATED, weights=pair, packs=down_packs.numbers, flag=GATES[spec.activation])
    down = compiler.weight(f"{prefix}down.weight", down_packs)
    _compile_addition(compiler, spec, down, residual, part, f"{prefix}mlp_post_norm")


def _compile_head(compiler: Compiler, spec: ModelSpec, residual: int) -> None:
    builder = compiler.builder
    name = "embed.weight" if spec.tied_head else "head.weight"
    packs = compiler.packs("last", [name], spec.hidden_size, RowSet.LOGITS)
    last = builder.add_buffer(spec.hidden_size)
    builder.add_op(OpKind.GATHER, rows=RowSet.LOGITS, source=residual, output=last)
    compile_norm(compiler, spec, last, packs, "norm", RowSet.LOGITS)
    head = compiler.weight(name, packs)
    builder.add_op(OpKind.LINEAR, rows=RowSet.LOGITS, output=LOGITS, weights=[head], bound=spec.logit_softcap)
    builder.add_op(OpKind.GATHER, rows=RowSet.HIDDEN, source=residual, output=last)
    vector, kind = compiler.norm(spec, "norm")
    builder.add_op(
        OpKind.NORM_ADD, rows=RowSet.HIDDEN, source=last, output=HIDDEN, vector=vector, flag=kind, value=spec.norm_eps
    )


def _normed_packs(compiler: Compiler, spec: ModelSpec, layer: int, names: list[str]) -> Packs:
    """What a layer's norm writes for the named weights; in parallel blocks one norm writes for all."""
    if spec.block == "parallel":
        names = [*(f"layers.{layer}.{part}.weight" for part in "qkv"), *_gated_names(layer)]
    return compiler.packs("normed", names, spec.hidden_size)


def _gated_names(layer: int) -> list[str]:
    return [f"layers.{layer}.gate.weight", f"layers.{layer}.up.weight"]


def _unknown_heads(spec: ModelSpec) -> str | None:
    """What the sizes of heads have that programs have not, or None."""
    if spec.head_dim % 16 != 0 or spec.rotary.dim > spec.head_dim:
        return f"head size {spec.head_dim}, which is not a multiple of 16 or is below the rotary size {spec.rotary.dim}"
    if spec.num_heads // spec.num_kv_heads > MAX_QUERY_GROUP:
        return f"key heads that more than {MAX_QUERY_GROUP} query heads share"
    return None


def _unknown_parts(spec: ModelSpec) -> list[str]:
    """What the model has and programs have not."""
    unknown = _unknown_heads(spec) if spec.mla is None else unknown_latents(spec.mla)
    return ([] if unknown is None else [unknown]) + unknown_parts_of_experts(spec)


def _linear_names(spec: ModelSpec) -> list[str]:
    """Names of all matrices, in the order in which a step reads them."""
    names: list[str] = []
    for layer in range(spec.num_layers):
        moe = spec.moe_of(layer)
        attention = ["q", "k", "v", "o"] if spec.mla is None else latent_names(spec.mla)
        parts = [*attention, *(("gate", "up", "down") if moe is None else expert_names(moe))]
        names += [f"layers.{layer}.{part}.weight" for part in parts]
    return [*names, "embed.weight"] if spec.tied_head else [*names, "head.weight", "embed.weight"]


# Of ForwardInputs' fields, in order.
_INPUT_TYPES = (torch.int32, torch.int32, torch.int64, torch.int32, torch.int32, torch.int32, torch.int32, torch.int32)


def _check_layout(inputs: ForwardInputs) -> None:
    """The library reads raw memory, so types and lengths must be what it takes them for."""
    for tensor, dtype in zip(inputs, _INPUT_TYPES, strict=True):
        if tensor is None:  # nobody has an adapter
            continue
        # The stride of a dimension with one entry means nothing, and numpy may say 0.
        if tensor.dtype is not dtype or (tensor.shape[-1] > 1 and tensor.stride(-1) != 1):
            raise ValueError(f"a step's tensor is {tensor.dtype} with strides {tensor.stride()}, not dense {dtype}")
    tokens, sequences = inputs.token_ids.shape[0], inputs.context_lens.shape[0]
    lengths = (inputs.positions.shape[0], inputs.slot_mapping.shape[0], inputs.query_start.shape[0] - 1)
    if inputs.adapters is not None and inputs.adapters.shape[0] != sequences:
        raise ValueError(f"a step of {sequences} sequences names {inputs.adapters.shape[0]} slots of adapters")
    if lengths != (tokens, tokens, sequences) or inputs.block_tables.shape[0] != sequences:
        raise ValueError(f"a step of {tokens} tokens and {sequences} sequences has tensors of other lengths {lengths}")
