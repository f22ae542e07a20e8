"""A model on a GPU: the decoder over Triton kernels and the vendor's matrix products."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import triton

from aphrodite.attention.backend import KVCache
from aphrodite.attention.device_choice import decline_device_attention, device_attention
from aphrodite.attention.triton_paged import TritonAttention
from aphrodite.errors import ConfigError
from aphrodite.kernels.dispatch import log_once
from aphrodite.layers.dense import short_name
from aphrodite.layers.lora import AdapterRoom
from aphrodite.layers.triton_lora import DeviceAdapters
from aphrodite.models.adapters import with_adapters
from aphrodite.models.decoder import Decoder, attention_shape, attention_transform
from aphrodite.models.spec import ModelSpec
from aphrodite.models.weights import load_weights
from aphrodite.platforms import platform_of
from aphrodite.quantization.types import RawTensor
from aphrodite.runner.executor import LogitsOf
from aphrodite.runner.inputs import DeviceInputs, HostLengths, StepSize
from aphrodite.runner.memory import format_bytes

# Operations of a step below which the host launches its kernels more slowly than an H100 runs them, some 10 ms. For a
# token each weight of 16 bits takes part in two, so there are about as many operations as bytes.
CAPTURED_OPERATIONS = 6 * 10**12
MOST_PADDED_TOKENS = 2048


class PaddedAttention(NamedTuple):
    """See `PaddedSteps`."""

    attention: TritonAttention
    most_tokens: int

    def stage(self, lengths: HostLengths, size: StepSize) -> np.ndarray | None:
        return self.attention.stage_padded(lengths, size)

    def table_length(self, size: StepSize) -> int:
        return self.attention.padded_table_length(size)


class DeviceExecutor:
    """Runs steps whose inputs are on the device; nothing in it waits for the device.

    Args:
        spec: the model.
        weights: tensors in their file's bytes (canonical names); none is kept.
        block_size: positions of a KV cache block.
        max_model_len: positions beyond this are never asked for.
        dtype: of dense weights and activations.
        kv_dtype: of the KV cache.
        offload_bytes: of weights to keep in host memory, see `load_weights`.
        fp8: quantize the layers' matrices to fp8.
        adapters: what to have ready for them, None for none.

    Raises:
        ConfigError: the kernels cannot serve a model of this shape or these types.
        ModelFormatError: weights are missing, of the wrong shape or not representable in `dtype`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, RawTensor],
        *,
        block_size: int,
        max_model_len: int,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        device: torch.device,
        offload_bytes: int = 0,
        fp8: bool = False,
        adapters: AdapterRoom | None = None,
    ) -> None:
        self.spec = spec
        self.block_size = block_size
        self.device = device
        self.dtype = dtype
        self._shape = attention_shape(spec, block_size=block_size, dtype=dtype, cache_dtype=kv_dtype, device=device)
        declined = decline_device_attention(self._shape)
        if declined is not None:
            raise ConfigError(f"this model cannot run on the GPU: {declined.reason}; --device cpu serves it")
        if fp8 and platform_of(device).fp8_dtype is None:
            raise ConfigError(f"{platform_of(device).describe()} has no fp8 products; leave --quantization at none")
        if fp8 and dtype != torch.bfloat16:
            raise ConfigError(f"fp8 weights compute in bfloat16, not {short_name(dtype)}; use --dtype bfloat16")
        loaded = load_weights(spec, weights, dtype, device, offload_bytes=offload_bytes, fp8=fp8)
        self._weights = loaded
        self.adapters = None if adapters is None else DeviceAdapters(adapters, dtype, device)
        if self.adapters is not None:
            loaded = with_adapters(spec, loaded, self.adapters.wrap)
        self._decoder = Decoder(spec, loaded)
        transform = attention_transform(spec, loaded, max_model_len)
        self._attention = device_attention(self._shape, transform)
        self._cache: KVCache | None = None
        if spec.block in ("post_norm", "sandwich") or spec.norm != "rms" or (spec.qk_norm and spec.head_norm != "head"):
            log_once(
                logging.INFO, f"norms of {spec.family}: in part by torch, for kernels fuse RMSNorm before products"
            )

    @property
    def weight_bytes(self) -> int:
        return self._weights.nbytes

    @property
    def kv_bytes_per_block(self) -> int:
        return self._shape.bytes_per_block

    @property
    def can_capture(self) -> bool:
        """Not where steps copy weights from the host: they wait for the bus, and a graph for each size would only make
        the start longer."""
        return self._decoder.weights.stream is None

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """See `DeviceModelExecutor`; weights in host memory stay there meanwhile."""
        stream = self._decoder.weights.stream
        if stream is None:
            yield
            return
        stream.resting = True
        try:
            yield
        finally:
            stream.resting = False

    @property
    def padded_steps(self) -> PaddedAttention | None:
        """None with experts and with another attention."""
        if not isinstance(self._attention, TritonAttention) or self.spec.moe is not None:
            return None
        return PaddedAttention(self._attention, min(MOST_PADDED_TOKENS, CAPTURED_OPERATIONS // self.weight_bytes))

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Allocate the cache; called once, before the first forward."""
        self._cache = self._attention.allocate(num_blocks)

    def stage_step(self, lengths: HostLengths) -> np.ndarray:
        """`[n]` int32 that attention needs of a step which is not only decoding, for `attention_table`."""
        return self._attention.stage_step(lengths)

    def forward(self, inputs: DeviceInputs) -> torch.Tensor:
        """Run one step: writes K and V of every token, returns logits `[L, vocab]` of the compute dtype."""
        if self._cache is None:
            raise RuntimeError("allocate_kv_cache must be called before forward")
        decodes = inputs.lengths is None and inputs.padded is None
        keep = None if decodes else inputs.logits_index
        return self._decoder.logits(self._residual(inputs, self._cache, keep))

    def forward_rows(self, inputs: DeviceInputs, index: torch.Tensor | None) -> tuple[LogitsOf, torch.Tensor | None]:
        """See `DeviceModelExecutor`."""
        if self._cache is None:
            raise RuntimeError("allocate_kv_cache must be called before forward")
        wanted = inputs.logits_index
        kept = self._residual(inputs, self._cache, wanted if index is None else torch.cat((wanted, index)))
        hidden = None if index is None else self._decoder.normed(kept[wanted.shape[0] :])
        return (lambda entries: self._decoder.logits(kept.index_select(0, entries))), hidden

    def _residual(self, inputs: DeviceInputs, cache: KVCache, keep: torch.Tensor | None) -> torch.Tensor:
        """Hidden states before the final norm, of the rows `keep` or of all."""
        step = self._attention.begin_step(inputs, cache)
        if self.adapters is None or inputs.adapters is None:
            return self._decoder.forward(inputs.token_ids, step, keep)
        with self.adapters.step(inputs.adapters):  # which names all rows, so none may go before the end
            hidden = self._decoder.forward(inputs.token_ids, step)
        return hidden if keep is None else hidden.index_select(0, keep)

    @property
    def hidden_declined(self) -> None:
        """Every decoder brings hidden states."""

    def describe(self) -> dict[str, str]:
        """Kernels chosen and why, for logs and `doctor`."""
        weights = self._weights
        layouts = Counter(str(product.choice) for layer in weights.layers for product in layer.products)
        name = torch.cuda.get_device_name(self.device)
        chosen = {
            "executor": f"Triton {triton.__version__} on {name}, {short_name(self.dtype)}",
            "attention": f"{self._attention.name}, KV cache in {short_name(self._shape.cache_dtype)}",
            "linear layers": "; ".join(f"{count} x {layout}" for layout, count in layouts.items()),
            "head": str(weights.head.choice),
        }
        if self.adapters is not None:
            chosen["adapters"] = f"{self.adapters.num_slots} slots of {format_bytes(self.adapters.nbytes)} together"
        if weights.stream is not None:
            chosen["offloaded"] = f"{format_bytes(weights.stream.nbytes)} of weights, copied from the host every step"
        return chosen
