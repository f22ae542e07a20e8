"""What is to be built, whatever computes it: the loaded description, how much a step may hold, weights that report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from aphrodite.config import EngineConfig
from aphrodite.layers.lora import AdapterRoom
from aphrodite.loading.checkpoint import Checkpoint
from aphrodite.quantization.at_load import QuantizedWeights
from aphrodite.quantization.types import RawTensor
from aphrodite.runner.data_plane import DataPlane
from aphrodite.runner.memory import MemoryPlan
from aphrodite.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from aphrodite.models.foreign import ForeignLoader

ProgressCallback = Callable[[str, int, int], None]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KV_DTYPES = {**DTYPES, "fp8": torch.float8_e4m3fn}


class BuildOrder(NamedTuple):
    """An opened checkpoint and how it shall be served.

    Attributes:
        eos_token_ids: tokens that end an answer.
        tokenizer: for samplers whose parameters are texts.
        adapters: the room to make for adapters; None: there are none.
    """

    config: EngineConfig
    checkpoint: Checkpoint | ForeignLoader
    eos_token_ids: frozenset[int]
    tokenizer: Tokenizer | None
    progress: ProgressCallback | None
    adapters: AdapterRoom | None

    @property
    def wanted_model_len(self) -> int:
        return self.config.max_model_len or self.checkpoint.spec.max_position


class StepLimits(NamedTuple):
    """How much a step may hold, and how many steps are planned ahead of the device."""

    max_num_seqs: int
    max_num_batched_tokens: int
    prompt_tokens_beside_answers: int | None
    async_depth: int


class Built(NamedTuple):
    runner: DataPlane
    memory: MemoryPlan
    limits: StepLimits


def limits_of(config: EngineConfig, defaults: StepLimits) -> StepLimits:
    """What the user chose, or the device's defaults."""
    return StepLimits(
        config.max_num_seqs or defaults.max_num_seqs,
        config.max_num_batched_tokens or defaults.max_num_batched_tokens,
        config.prompt_tokens_beside_answers or defaults.prompt_tokens_beside_answers,
        defaults.async_depth if config.async_depth is None else config.async_depth,
    )


def not_for_foreign(setting: str, loader: ForeignLoader) -> str:
    return f"{setting} is for built-in models; {loader.spec.family} is left to transformers"


def weights_of(
    config: EngineConfig, checkpoint: Checkpoint, progress: ProgressCallback | None, *, on_host: bool
) -> ReportingWeights:
    """The checkpoint's parameters as the executor shall hold them."""
    weights: Mapping[str, RawTensor] = checkpoint.weights
    if config.quantization != "none":
        weights = QuantizedWeights(weights, config.quantization, on_host=on_host)
    return ReportingWeights(weights, checkpoint.weight_bytes, progress)


class LoadingProgress:
    """Tells how much of the weights is loaded, ten times a second at most."""

    def __init__(self, progress: ProgressCallback | None) -> None:
        self._progress = progress
        self._reported = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._progress is not None and (now - self._reported > 0.1 or done == total):
            self._reported = now
            self._progress("loading weights", done, total)


class ReportingWeights(Mapping[str, RawTensor]):
    """The checkpoint's weights, telling how many bytes have been taken so far."""

    def __init__(self, weights: Mapping[str, RawTensor], total: int, progress: ProgressCallback | None) -> None:
        self._weights = weights
        self._total = total
        self._progress = LoadingProgress(progress)
        self._taken: set[str] = set()
        self._done = 0

    def __getitem__(self, name: str) -> RawTensor:
        raw = self._weights[name]
        if name not in self._taken:
            self._taken.add(name)
            self._done += raw.nbytes
            self._progress(self._done, self._total)
        return raw

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
