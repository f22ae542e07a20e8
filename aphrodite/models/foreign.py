"""Models that are not built in: transformers' modelling code, with this engine's attention and weights.

transformers lets an attention function be registered by name (its AttentionInterface). Ours takes queries, keys and
values of a ragged step as `[1, heads, T, head_dim]` and hands them to the step's paged attention; all else in a layer
is transformers'. What a model asks of attention is found by trying it once without weights or memory, and what does not
fit is declined there. Nothing of a checkpoint is executed: only modelling code that comes with transformers runs.

This module is imported only for such models, since transformers is optional and slow to import.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from aphrodite.attention.backend import StepAttention
from aphrodite.errors import ModelFormatError, UnknownArchitectureError
from aphrodite.layers.dense import to_dense
from aphrodite.loading.foreign import ForeignCheckpoint
from aphrodite.loading.generation import GenerationDefaults
from aphrodite.loading.report import listed
from aphrodite.loading.safetensors import StoredTensor
from aphrodite.models.foreign_fit import AttentionCall, attention_misfit, class_misfit, module_misfit, spec_of
from aphrodite.models.shape import ForeignSpec
from aphrodite.quantization.types import QuantType, RawTensor

ATTENTION = "aphrodite"
_ROUTER = "aphrodite_router"
_PADDING_WARNING = "warn_if_padding_and_no_attention_mask"
_PROBE_TOKENS = 4
_MAJOR = 5  # version of transformers from which on its loading and its attention interface are as used here
# What config.json must not choose: implementations that transformers would fetch, or hooks into its loading.
_IGNORED_KEYS = frozenset(
    {"auto_map", "attn_implementation", "experts_implementation", "fusion_config", "kernel_config", "use_kernels"}
    | {"transformers_weights", "torch_dtype", "dtype", "quantization_config", "compression_config"}
)
_TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Router(Protocol):
    """Serves the attention of all layers of one model."""

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        """`[1, T, heads, head_dim]`."""


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function as transformers calls it; `dropout` is for training."""
    router: Router = getattr(module, _ROUTER)
    return router(AttentionCall(module, query, key, value, attention_mask, scaling, options)), None


transformers.AttentionInterface.register(ATTENTION, _attend)


class ForeignModel:
    """A loaded model. Its attention goes to the `StepAttention` that a forward pass is given.

    Args:
        module: a causal language model of transformers.
        layers: its attention modules in the order in which a forward pass comes to them.
    """

    def __init__(self, module: Any, layers: Sequence[str]) -> None:
        self.module = module
        modules = dict(module.named_modules())
        self._layers = {modules[name]: index for index, name in enumerate(layers)}
        self._step: StepAttention | None = None
        self._picks_rows = "logits_to_keep" in inspect.signature(type(module).forward).parameters
        self._trunk: Any = module.get_decoder()  # what stands before the output head
        self._shows_hidden = self._trunk is not module
        _route(module, self._serve)

    @property
    def name(self) -> str:
        """The class of transformers."""
        return type(self.module).__name__

    @property
    def nbytes(self) -> int:
        tensors = [*self.module.parameters(), *self.module.buffers()]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: StepAttention,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits of a ragged step.

        Args:
            token_ids, positions: `[T]` integers.
            attention: of the step.
            keep: `[L]` integers, the rows whose logits are wanted; None for all.

        Returns:
            `[T, vocab]` or `[L, vocab]` of the compute dtype.
        """
        picked = {"logits_to_keep": keep.long()} if keep is not None and self._picks_rows else {}
        self._step = attention
        try:
            output = self.module(
                input_ids=token_ids.long()[None], position_ids=positions.long()[None], use_cache=False, **picked
            )
        finally:
            self._step = None
        logits: torch.Tensor = output.logits[0]
        return logits if keep is None or picked else logits.index_select(0, keep)

    @property
    def hidden_declined(self) -> str | None:
        """Why `forward_hidden` cannot be asked for; None if it can."""
        return None if self._shows_hidden else f"{self.name} does not show what its output head reads"

    def forward_hidden(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: StepAttention,
        keep: torch.Tensor,
        index: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward`, and the hidden states `[H, hidden]` of the rows `index` as the model without its head has them."""
        states: list[torch.Tensor] = []
        with self._watching(states):
            logits = self.forward(token_ids, positions, attention, keep)
        return logits, states[0][0].index_select(0, index)

    @contextlib.contextmanager
    def _watching(self, states: list[torch.Tensor]) -> Iterator[None]:
        """Notes in `states` the hidden states `[1, T, hidden]` of a forward pass."""
        hook = self._trunk.register_forward_hook(lambda module, inputs, output: states.append(output[0]))
        try:
            yield
        finally:
            hook.remove()

    def reference(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Logits `[T, vocab]` of one text from its beginning, with transformers' own attention."""
        self.module.set_attn_implementation("eager")
        states: list[torch.Tensor] = []
        try:
            with self._watching(states):
                logits: torch.Tensor = self.module(input_ids=token_ids.long()[None], use_cache=False).logits[0]
        finally:
            self.module.set_attn_implementation(ATTENTION)
        self._shows_hidden = self._shows_hidden and bool(states)
        return logits

    def _serve(self, call: AttentionCall) -> torch.Tensor:
        if self._step is None:
            raise RuntimeError("attention was asked for outside of a forward pass")
        heads = torch.cat((call.query, call.key, call.value), dim=1)[0]  # [heads + 2 * kv_heads, T, head_dim]
        qkv = heads.transpose(0, 1).reshape(heads.shape[1], -1)
        out = self._step(self._layers[call.module], qkv)
        return out.view(1, qkv.shape[0], call.query.shape[1], call.query.shape[3])


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignLoader:
    """A checkpoint that transformers can compute, described and not yet loaded. Make one with `describe`.

    Attributes:
        spec: what the model asks of the engine.
        layers: names of its attention modules in the order in which a forward pass comes to them.
    """

    checkpoint: ForeignCheckpoint
    spec: ForeignSpec
    layers: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.checkpoint.name

    @property
    def generation_defaults(self) -> GenerationDefaults:
        return self.checkpoint.generation_defaults

    @property
    def tensors_by_type(self) -> dict[QuantType, int]:
        return self.checkpoint.tensors_by_type

    def load(self, dtype: torch.dtype, device: torch.device) -> ForeignModel:
        """The model with its weights, in `dtype` on `device`.

        Tensors that already are of `dtype` stay in the file's memory map on a CPU, and go to a GPU from there one by
        one; others, and those of quantized checkpoints, are converted in host memory first.
        """
        model_class, config = _model_class(self.checkpoint)
        tensors = {name: _tensor(stored, dtype) for name, stored in self.checkpoint.tensors.items()}
        module = _assemble(self.checkpoint, model_class, config, tensors, dtype)
        return ForeignModel(module.to(device), self.layers)


def describe(checkpoint: ForeignCheckpoint) -> ForeignLoader:
    """Find out whether and how the model can be served. Spends no memory on weights, and checks all of their names,
    shapes and types.

    Raises:
        UnknownArchitectureError: transformers does not know it either, or it cannot be served here; the message says
            why.
        ModelFormatError: tensors are missing, left over, of a wrong shape or of a type that is not supported.
    """
    spec, layers = _probe(checkpoint)
    return ForeignLoader(checkpoint=checkpoint, spec=spec, layers=tuple(layers))


def _check_types(checkpoint: ForeignCheckpoint) -> None:
    stored = {name: t.dtype for name, t in checkpoint.tensors.items() if isinstance(t, StoredTensor)}
    unsupported = [f"{name} ({dtype})" for name, dtype in stored.items() if dtype not in _TORCH]
    if unsupported:
        raise ModelFormatError(f"{checkpoint.path}: {'; '.join(listed('tensors of unsupported types', unsupported))}")


def _tensor(stored: StoredTensor | RawTensor, dtype: torch.dtype) -> torch.Tensor:
    """The values: a view of the file, or expanded to `dtype`."""
    if isinstance(stored, RawTensor):
        return to_dense(stored, dtype, torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the map is read-only, and nothing writes weights
        data = torch.from_numpy(np.ascontiguousarray(stored.data))
    return data.view(_TORCH[stored.dtype]).view(stored.shape)


def _model_class(checkpoint: ForeignCheckpoint) -> tuple[Any, Any]:
    """transformers' class for the architecture, and its configuration."""
    if int(transformers.__version__.partition(".")[0]) < _MAJOR:
        raise _declined(checkpoint, f"transformers {transformers.__version__} is too old: pip install -U transformers")
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        own = ", and code that comes with a checkpoint is never run" if "auto_map" in checkpoint.config else ""
        raise _declined(checkpoint, f"transformers {transformers.__version__} does not know it either{own}")
    try:
        config = CONFIG_MAPPING[model_type].from_dict(_without_hooks(checkpoint.config))
    except Exception as error:  # whatever transformers makes of values that nobody has checked
        raise ModelFormatError(f"{checkpoint.path}: config.json is refused by transformers: {_line(error)}") from None
    if not checkpoint.architecture and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config
    if checkpoint.architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise _declined(checkpoint, "transformers has no causal language model of that name")
    model_class = getattr(transformers, checkpoint.architecture)
    if not issubclass(type(config), model_class.config_class):
        raise _declined(checkpoint, f"its model_type, {model_type}, is another model's")
    return model_class, config


def _without_hooks(value: Any) -> Any:
    """A configuration without keys that choose implementations."""
    if isinstance(value, Mapping):
        # Names with two underscores are how transformers writes values that JSON lacks, as infinity.
        private = {key for key in value if key.startswith("_") and not key.startswith("__")}
        kept = {key: item for key, item in value.items() if key not in _IGNORED_KEYS | private}
        return {key: _without_hooks(item) for key, item in kept.items()}
    return [_without_hooks(item) for item in value] if isinstance(value, list) else value


def _assemble(
    checkpoint: ForeignCheckpoint,
    model_class: Any,
    config: Any,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> Any:
    """The module with `tensors` as its weights: transformers renames, ties and stacks them as the class needs."""
    try:
        with _quiet():
            module, report = model_class.from_pretrained(
                None,
                config=config,
                state_dict=dict(tensors),
                dtype=dtype,
                attn_implementation=ATTENTION,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # of any kind: modelling code meets a configuration that nobody has checked
        raise _declined(checkpoint, f"transformers cannot build it: {_line(error)}") from None
    wrong = [f"{name} is {list(found)} instead of {list(wanted)}" for name, found, wanted in report["mismatched_keys"]]
    left_over = [name for name in report["unexpected_keys"] if not name.endswith("rotary_emb.inv_freq")]
    problems = [
        *listed("missing", sorted(report["missing_keys"])),
        *listed("wrong shape", sorted(wrong)),
        *listed("not part of it", sorted(left_over)),
        *listed("not convertible", sorted(report["error_msgs"])),
    ]
    if problems:
        raise ModelFormatError(
            f"{checkpoint.path}: the tensors do not fit the {model_class.__name__} that config.json describes: "
            + "; ".join(problems)
        )
    return module.eval()


def _probe(checkpoint: ForeignCheckpoint) -> tuple[ForeignSpec, list[str]]:
    """Run the model once without weights: what it asks of attention, and the names of its attention modules."""
    model_class, config = _model_class(checkpoint)
    _decline(checkpoint, class_misfit(model_class, config))
    _check_types(checkpoint)
    # All elements of such a tensor are one value in memory.
    hollow = {
        name: torch.zeros((), dtype=_hollow_dtype(stored)).expand(stored.shape)
        for name, stored in checkpoint.tensors.items()
    }
    module = _assemble(checkpoint, model_class, config, hollow, torch.bfloat16).to("meta")
    _decline(checkpoint, module_misfit(module))
    calls: list[AttentionCall] = []

    def record(call: AttentionCall) -> torch.Tensor:
        calls.append(call)
        return torch.empty_like(call.query).transpose(1, 2)

    _route(module, record)
    tokens = torch.zeros((1, _PROBE_TOKENS), dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            logits = module(input_ids=tokens, position_ids=tokens, use_cache=False).logits
    except Exception as error:  # of any kind: this is somebody else's code
        raise _declined(checkpoint, f"trying it without weights failed: {_line(error)}") from None
    _decline(checkpoint, attention_misfit(config, calls))
    names = {child: name for name, child in module.named_modules()}
    return spec_of(config, calls, logits.shape[-1]), [names[call.module] for call in calls]


def _decline(checkpoint: ForeignCheckpoint, reason: str | None) -> None:
    """
    Raises:
        UnknownArchitectureError: there is a reason.
    """
    if reason is not None:
        raise _declined(checkpoint, reason)


def _hollow_dtype(stored: StoredTensor | RawTensor) -> torch.dtype:
    dtype = _TORCH[stored.dtype] if isinstance(stored, StoredTensor) else torch.bfloat16
    return torch.bfloat16 if dtype.is_floating_point else dtype


def _route(module: nn.Module, router: Router) -> None:
    """Have the attention of all of `module` served by `router`."""
    for child in module.modules():
        setattr(child, _ROUTER, router)
        if isinstance(child, transformers.PreTrainedModel):
            # It reads token ids on the host, to warn of masks that are missing; a ragged step has none.
            setattr(child, _PADDING_WARNING, _nothing)


def _nothing(*arguments: Any, **options: Any) -> None:
    """Does nothing."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers without bars and tables; what they say is in the errors raised here."""
    log: Any = transformers.utils.logging  # not annotated
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _declined(checkpoint: ForeignCheckpoint, reason: str) -> UnknownArchitectureError:
    return UnknownArchitectureError(
        f"{checkpoint.path}: {checkpoint.architecture or 'the model'} is not built in and cannot run through"
        f" transformers: {reason}. docs/models.md lists what is built in"
    )


def _line(error: Exception) -> str:
    """An error in one line of bounded length."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
