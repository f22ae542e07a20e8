"""The portable executor: the decoder in torch ops, on any device.

In float32 on the CPU it is the engine's reference mode: quantized weights are expanded exactly, and a
token's logits are bitwise the same whatever else is in the batch and however its prompt was cut. That
rests on how the machine's BLAS behaves, so it is measured at load, and `describe` tells what was found.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from aphrodite.attention.backend import KVCache
from aphrodite.attention.choice import choose_attention
from aphrodite.attention.latent_torch import TorchLatentAttention
from aphrodite.attention.torch_paged import TiledAttention
from aphrodite.kernels.dispatch import log_once
from aphrodite.layers.dense import short_name
from aphrodite.layers.invariant import ROW_MULTIPLE, row_blocks
from aphrodite.layers.linear import DenseLinear
from aphrodite.layers.lora import AdapterRoom, TorchAdapters
from aphrodite.layers.mla import LatentProjection
from aphrodite.models.adapters import with_adapters
from aphrodite.models.decoder import Decoder, attention_shape, attention_transform
from aphrodite.models.spec import ModelSpec
from aphrodite.models.weights import load_weights
from aphrodite.quantization.types import RawTensor
from aphrodite.runner.inputs import ForwardInputs


class TorchExecutor:
    """A ModelExecutor over `Decoder`."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, RawTensor],
        *,
        block_size: int,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
        adapters: AdapterRoom | None = None,
    ) -> None:
        """Load `weights` (canonical names) onto `device`.

        Args:
            spec: the model.
            weights: tensors in their file's bytes; none is kept.
            block_size: positions of a KV cache block.
            max_model_len: positions beyond this are never asked for.
            dtype: of dense weights, activations and KV cache.
            device: where everything lies and runs.
            adapters: what to have ready for them, None for none.

        Raises:
            ModelFormatError: weights are missing, of the wrong shape or not representable in `dtype`.
        """
        self.spec = spec
        self.block_size = block_size
        self.device = device
        self._dtype = dtype
        self._shape = attention_shape(spec, block_size=block_size, dtype=dtype, cache_dtype=dtype, device=device)
        loaded = load_weights(spec, weights, dtype, device)
        transform = attention_transform(spec, loaded, max_model_len)
        self._attention, self._attention_choice = choose_attention(self._shape, transform)
        self._weights = loaded
        self.adapters = None if adapters is None else TorchAdapters(adapters.slots, dtype)
        if self.adapters is not None:
            loaded = with_adapters(spec, loaded, self.adapters.wrap)
        self._decoder = Decoder(spec, loaded)
        self._cache: KVCache | None = None
        core = self._attention.core if isinstance(self._attention, TorchLatentAttention) else self._attention
        self._tiled = core if isinstance(core, TiledAttention) else None
        self._row_multiple = 1 if self._tiled is None else ROW_MULTIPLE
        self._invariance = self._measure_invariance()

    @property
    def weight_bytes(self) -> int:
        return self._weights.nbytes

    @property
    def kv_bytes_per_block(self) -> int:
        return self._shape.bytes_per_block

    def allocate_kv_cache(self, num_blocks: int) -> None:
        self._cache = self._attention.allocate(num_blocks)

    def forward(self, inputs: ForwardInputs) -> torch.Tensor:
        if self._cache is None:
            raise RuntimeError("allocate_kv_cache must be called before forward")
        with torch.inference_mode():
            return self._logits(inputs, self._residual(inputs, self._cache))

    @property
    def hidden_declined(self) -> None:
        """Every decoder brings hidden states."""

    def forward_hidden(self, inputs: ForwardInputs, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `ModelExecutor`."""
        if self._cache is None:
            raise RuntimeError("allocate_kv_cache must be called before forward")
        with torch.inference_mode():
            residual = self._residual(inputs, self._cache)
            return self._logits(inputs, residual), self._decoder.normed(residual.index_select(0, index)).float()

    def _residual(self, inputs: ForwardInputs, cache: KVCache) -> torch.Tensor:
        step = self._attention.begin_step(inputs._replace(positions=self._pad(inputs.positions)), cache)
        if self.adapters is None:
            return self._decoder.forward(self._pad(inputs.token_ids), step)
        with self.adapters.step(inputs.adapters, inputs.query_start):
            return self._decoder.forward(self._pad(inputs.token_ids), step)

    def _logits(self, inputs: ForwardInputs, residual: torch.Tensor) -> torch.Tensor:
        wanted = inputs.logits_index.shape[0]
        if wanted == 0:
            return torch.empty((0, self.spec.vocab_size), dtype=torch.float32, device=self.device)
        logits = self._decoder.logits(residual.index_select(0, self._pad(inputs.logits_index)))
        return logits[:wanted].float()

    def describe(self) -> dict[str, str]:
        weights = self._weights
        layouts = Counter(str(product.choice) for layer in weights.layers for product in layer.products)
        return {
            "executor": f"torch {torch.__version__} on {self.device}, {short_name(self._dtype)}",
            "attention": str(self._attention_choice),
            "linear layers": "; ".join(f"{count} x {layout}" for layout, count in layouts.items()),
            "head": str(weights.head.choice),
            "batch invariance": self._invariance,
        }

    def _pad(self, rows: torch.Tensor) -> torch.Tensor:
        """`[N]` integers, with zeros up to the row multiple."""
        missing = -rows.shape[0] % self._row_multiple
        return F.pad(rows, (0, missing)) if missing else rows

    def _measure_invariance(self) -> str:
        if self._tiled is None:
            return "no: kernels are picked by the shape of the batch"
        with torch.inference_mode():
            blocks = {
                row_blocks(part.weight)
                for product in self._weights.products
                for part in (product.parts if isinstance(product, LatentProjection) else (product,))
                if isinstance(part, DenseLinear)
            }
            verified = self._tiled.verify() and all(found.verified for found in blocks)
        if verified:
            sizes = " or ".join(sorted("/".join(map(str, found.sizes)) for found in blocks))
            return f"yes: rows in blocks of {sizes}, verified at load on {torch.get_num_threads()} threads"
        log_once(logging.WARNING, "batch invariance: this machine's BLAS treats rows by position; seeds may not repeat")
        return "no: this machine's BLAS treats rows by their position"
