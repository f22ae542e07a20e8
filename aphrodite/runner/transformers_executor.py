"""The executor of models that are not built in: transformers' modelling code around this engine's paged attention.

Slower than a built-in family: nothing is fused, and a GPU's steps are launched kernel by kernel. Before it serves, it
computes two short texts together, one of them in pieces, and compares with transformers' own attention; a model that
does not come out the same is refused.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

from aphrodite.attention.backend import AttentionBackend, AttentionShape, KVCache, QueryKeyTransform, StepAttention
from aphrodite.attention.choice import choose_attention
from aphrodite.errors import ConfigError, ModelFormatError
from aphrodite.layers.dense import short_name
from aphrodite.loading.foreign import ForeignCheckpoint
from aphrodite.models.foreign import ForeignLoader
from aphrodite.models.shape import ForeignSpec
from aphrodite.runner.executor import LogitsOf
from aphrodite.runner.inputs import DeviceInputs, ForwardInputs, HostLengths

logger = logging.getLogger(__name__)

_IDENTITY_DIM = 16  # dimensions of a head that an attention back end "rotates" by nothing: transformers has done it
_CHECK_TOKENS = (23, 9)  # of the two texts that are compared
_CHECK_FIRST = (14, 9)  # tokens of each in the first step, then the rest
# Greatest relative Frobenius error of their logits. A misfit gives errors near 1.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
_FP8_TOLERANCE = 0.2


class TransformersExecutor:
    """A ModelExecutor, and with a GPU's inputs a DeviceModelExecutor.

    Args:
        loader: what to load.
        block_size: positions of a KV cache block.
        max_model_len: positions beyond this are never asked for.
        dtype: of weights and activations.
        kv_dtype: of the KV cache.
        device: where everything lies and runs.

    Raises:
        ModelFormatError: the comparison failed.
        ConfigError: the GPU's attention kernels cannot serve a model of this shape or these types.
    """

    def __init__(
        self,
        loader: ForeignLoader,
        *,
        block_size: int,
        max_model_len: int,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        checkpoint = loader.checkpoint
        self.spec = loader.spec
        self._model = loader.load(dtype, device)
        logger.warning(
            "%s is not built in: transformers %s computes it, with this engine's attention, scheduler and samplers; "
            "that is the slower way",
            self._model.name,
            transformers.__version__,
        )
        self.block_size = block_size
        self.device = device
        self.dtype = dtype
        self._shape = _attention_shape(self.spec, block_size, dtype, kv_dtype, device)
        self._attention, self._chosen = _attention(self._shape, _identity(self._shape, max_model_len))
        self._cache: KVCache | None = None
        self._check(checkpoint)

    @property
    def can_capture(self) -> bool:
        """Never: what transformers' code does in a step may wait for the device, which a graph cannot hold."""
        return False

    def rehearsal(self) -> None:
        """Never: what transformers' code does with tensors that no kernel has written is not known."""

    @property
    def padded_steps(self) -> None:
        """Steps with prompts are not captured: their shapes lead transformers' code different ways."""

    @property
    def weight_bytes(self) -> int:
        return self._model.nbytes

    @property
    def kv_bytes_per_block(self) -> int:
        return self._shape.bytes_per_block

    @property
    def adapters(self) -> None:
        """Which modules of transformers' code an adapter may add to is not known."""

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Allocate the cache; called once, before the first forward."""
        self._cache = self._attention.allocate(num_blocks)

    def stage_step(self, lengths: HostLengths) -> np.ndarray:
        """`[n]` int32 that a GPU's attention needs of a step which is not only decoding."""
        staged: np.ndarray = self._attention.stage_step(lengths)
        return staged

    def forward(self, inputs: ForwardInputs | DeviceInputs) -> torch.Tensor:
        """Run one step: writes K and V of every token, returns logits `[L, vocab]`, float32 on a CPU and of the
        compute dtype on a GPU."""
        if self._cache is None:
            raise RuntimeError("allocate_kv_cache must be called before forward")
        return self._forward(inputs, self._cache)

    def forward_rows(self, inputs: DeviceInputs, index: torch.Tensor | None) -> tuple[LogitsOf, torch.Tensor | None]:
        """See `DeviceModelExecutor`; transformers' code makes all logits at once."""
        if index is None:
            logits, hidden = self.forward(inputs), None
        else:
            logits, hidden = self.forward_hidden(inputs, index)
        return (lambda entries: logits.index_select(0, entries)), hidden

    @property
    def hidden_declined(self) -> str | None:
        """Why `forward_hidden` cannot be asked for; None if it can."""
        return self._model.hidden_declined

    def forward_hidden(
        self, inputs: ForwardInputs | DeviceInputs, index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `ModelExecutor`; on a GPU both are of the compute dtype."""
        if self._cache is None:
            raise RuntimeError("allocate_kv_cache must be called before forward")
        with torch.inference_mode():
            step: StepAttention = self._attention.begin_step(inputs, self._cache)
            logits, hidden = self._model.forward_hidden(
                inputs.token_ids, inputs.positions, step, inputs.logits_index, index
            )
            return (logits.float(), hidden.float()) if self.device.type == "cpu" else (logits, hidden)

    def describe(self) -> dict[str, str]:
        """Kernels chosen and why, for logs and `doctor`."""
        return {
            "executor": f"transformers {transformers.__version__} ({self._model.name}) on {self.device}, "
            + short_name(self.dtype),
            "attention": self._chosen,
            "batch invariance": "no: kernels are picked by the shape of the batch",
        }

    def _forward(self, inputs: ForwardInputs | DeviceInputs, cache: KVCache) -> torch.Tensor:
        with torch.inference_mode():
            step: StepAttention = self._attention.begin_step(inputs, cache)
            decoding = isinstance(inputs, DeviceInputs) and inputs.lengths is None  # logits of each token
            keep = None if decoding else inputs.logits_index
            logits = self._model.forward(inputs.token_ids, inputs.positions, step, keep)
            return logits.float() if self.device.type == "cpu" else logits

    def _check(self, checkpoint: ForeignCheckpoint) -> None:
        """Compare with transformers' own attention.

        Raises:
            ModelFormatError: the logits differ.
        """
        generator = torch.Generator().manual_seed(0)
        texts = [torch.randint(self.spec.vocab_size, (count,), generator=generator) for count in _CHECK_TOKENS]
        blocks = [-(-count // self.block_size) for count in _CHECK_TOKENS]
        cache = self._attention.allocate(sum(blocks))
        with torch.inference_mode():
            expected = torch.cat([self._model.reference(text.to(self.device)) for text in texts]).float()
        parts: list[list[torch.Tensor]] = [[], []]
        for spans in _check_steps():
            step = _step_of(texts, spans, blocks, self.block_size)
            counts = [span.end - span.start for span in spans]
            logits = self._forward(self._on_device(step, spans), cache).float().split(counts)
            for span, part in zip(spans, logits, strict=True):
                parts[span.text].append(part)
        found = torch.cat([part for text in parts for part in text])
        error = float((found - expected).norm() / expected.norm())
        limit = _FP8_TOLERANCE if self._shape.cache_dtype.itemsize == 1 else _TOLERANCE[self.dtype]
        if not error <= limit:
            raise ModelFormatError(
                f"{checkpoint.path}: {checkpoint.architecture} cannot be served through transformers: with paged "
                f"attention its logits differ by {error:.2g} of their size from transformers' own (at most {limit:g} "
                "are rounding), so its layers need more than keys and values of their own text"
            )
        logger.info("%s: logits are within %.1e of transformers' own attention", checkpoint.name, error)

    def _on_device(self, inputs: ForwardInputs, spans: list[_Span]) -> ForwardInputs | DeviceInputs:
        """A step's inputs as the executor gets them on its device."""
        inputs = ForwardInputs(*(tensor.to(self.device) for tensor in inputs if tensor is not None))
        if self.device.type == "cpu":
            return inputs
        query = np.array([span.end - span.start for span in spans], np.int32)
        lengths = HostLengths(query, np.array([span.end for span in spans], np.int32))
        return DeviceInputs(
            **inputs._asdict(),
            rows=torch.arange(len(spans), dtype=torch.int32, device=self.device),
            lengths=lengths,
            attention_table=torch.from_numpy(self.stage_step(lengths)).to(self.device),
        )


class _Span(NamedTuple):
    """Positions of one of the compared texts that a step computes."""

    text: int
    start: int
    end: int


def _check_steps() -> list[list[_Span]]:
    first = [_Span(text, 0, count) for text, count in enumerate(_CHECK_FIRST)]
    rest = [_Span(span.text, span.end, _CHECK_TOKENS[span.text]) for span in first]
    return [first, [span for span in rest if span.start < span.end]]


def _step_of(texts: list[torch.Tensor], spans: list[_Span], blocks: list[int], block_size: int) -> ForwardInputs:
    """Inputs of a step over `spans`, where each text has its `blocks` one after the other."""
    positions = torch.cat([torch.arange(span.start, span.end) for span in spans])
    first_slots = [sum(blocks[: span.text]) * block_size for span in spans]
    slots = [torch.arange(span.start, span.end) + slot for span, slot in zip(spans, first_slots, strict=True)]
    tables = torch.zeros((len(spans), max(blocks)), dtype=torch.int32)
    for row, span in enumerate(spans):
        count = blocks[span.text]
        tables[row, :count] = torch.arange(count) + sum(blocks[: span.text])
    counts = [span.end - span.start for span in spans]
    return ForwardInputs(
        token_ids=torch.cat([texts[span.text][span.start : span.end] for span in spans]).int(),
        positions=positions.int(),
        slot_mapping=torch.cat(slots),
        query_start=torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32),
        context_lens=torch.tensor([span.end for span in spans], dtype=torch.int32),
        block_tables=tables,
        logits_index=torch.arange(sum(counts), dtype=torch.int32),
    )


def _attention_shape(
    spec: ForeignSpec, block_size: int, dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device
) -> AttentionShape:
    return AttentionShape(
        windows=spec.windows,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        block_size=block_size,
        dtype=dtype,
        cache_dtype=kv_dtype,
        device=device,
        query_scale=spec.query_scale,
        softcap=spec.softcap,
    )


def _identity(shape: AttentionShape, max_model_len: int) -> QueryKeyTransform:
    """Leaves queries and keys as they are."""
    size = (max_model_len, min(_IDENTITY_DIM, shape.head_dim) // 2)
    return QueryKeyTransform(torch.ones(size, device=shape.device), torch.zeros(size, device=shape.device))


def _attention(shape: AttentionShape, transform: QueryKeyTransform) -> tuple[Any, str]:
    """The attention back end and its name; on a GPU its `begin_step` takes a GPU's inputs."""
    if shape.device.type == "cpu":
        backend: AttentionBackend
        backend, choice = choose_attention(shape, transform)
        return backend, str(choice)
    from aphrodite.attention.triton_paged import TritonAttention  # Triton is there only where a GPU is

    declined = TritonAttention.decline(shape)
    if declined is not None:
        raise ConfigError(f"this model cannot run on the GPU: {declined.reason}; --device cpu serves it")
    name = f"{TritonAttention.name}, KV cache in {short_name(shape.cache_dtype)}"
    return TritonAttention(shape, transform), name
