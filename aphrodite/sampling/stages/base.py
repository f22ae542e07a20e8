"""What a sampling stage is.

A stage is one small module in this package that ends in `STAGE = ...`: a stateless object that says
which parameters it reads, when it is neutral, what it keeps per row, and what it does to logits. Its
parameters are rows of the table in `sampling/params.py`. Adding a stage adds its file and those rows,
and changes nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from aphrodite.kernels.cpu.sampler_ops import NativeOp, NativeStep
from aphrodite.sampling.params import SamplingParams, parameter
from aphrodite.sampling.table import ParamRow

if TYPE_CHECKING:
    import torch

    from aphrodite.sampling.vocabulary import Vocabulary


class RowInfo(NamedTuple):
    """What a stage may know when a request takes its row."""

    vocab_size: int
    eos_token_ids: frozenset[int]
    num_prompt: int  # prompt tokens
    device: torch.device
    vocabulary: Vocabulary | None = None  # None where no tokenizer came with the model


class SamplerInfo(NamedTuple):
    """What a stage's state may know when it is created."""

    num_rows: int
    vocab_size: int
    device: torch.device
    token_ids: torch.Tensor  # [rows, max_model_len] int32, the runner's: history of every row, prompt first
    num_prompt: torch.Tensor  # [rows], the runner's
    native: bool = False  # whether the native library samples here, so stages may call it too


class RowState(Protocol):
    """What a stage remembers about rows from token to token, on the device.

    It is created when the first row needs it, and hears of no row that does not use its stage. What it
    remembers at a position must follow from the tokens and logits before that position, so that phrase
    bans and speculation can take it back. A preempted row keeps its state: it is neither ended nor rewound.
    """

    def start(self, row: int, prompt_token_ids: Sequence[int]) -> None:
        """A request takes the row."""

    def end(self, row: int) -> None:
        """The row's request is gone."""

    def observe(self, rows: Sequence[int], token_ids: torch.Tensor) -> None:
        """Tokens were chosen for these rows: `token_ids` [R] int32, still on the device."""

    def rewind(self, row: int, position: int) -> None:
        """Become as if no token at `position` of the row's sequence or after it had been chosen.

        The row's history in `SamplerInfo.token_ids` is right before `position`, which lies behind the
        prompt. This is rare, so it may wait for the device and read the history again.
        """


@dataclass(frozen=True, slots=True)
class StageContext:
    """The rows that a stage is applied to, and what it may read beside their logits and values."""

    rows: Sequence[int]
    index: torch.Tensor  # [R] int64: the same on the device
    positions: Sequence[int]  # of the tokens to be chosen = tokens before them
    prepared: Sequence[Any]  # what `prepare` returned for each row
    state: Any  # what `new_state` returned
    seeds: torch.Tensor  # [R] int64, for `random.uniforms`
    token_ids: torch.Tensor  # [num_rows, max_model_len] int32: all rows' history; take `index` of it
    num_prompt: torch.Tensor  # [num_rows], likewise


class Stage(ABC):
    """One step of a sampling plan.

    Attributes:
        name: in plans, logs and `sampler_priority`.
        rank: place in the default order; the table is in `sampling/pipeline.py`.
        sampler_id: the number that stands for this step in a numeric `sampler_priority`.
        parameters: the fields of SamplingParams it reads, all of them.
        rows: of a stage from another package: rows that it adds to the table (`sampling/extensions.py`).
        stands_in_for: the stage whose place it takes in every order, for requests that want another form of it.
        constraint: a hard rule (bias, bans, grammars): it runs before the others in every order, and
            what it masks stays masked.
        keeps_argmax: never masks or demotes the most likely token, so greedy rows skip it.
        greedy_skips: shapes what is drawn from in a way that could change the most likely token. Greedy rows,
            which take the model's most likely token after constraints and penalties, skip it all the same.
        can_empty: might mask all that is left of a row; it is then undone for that row.
        truncation: drops unlikely tokens; left out of plans with a stage that replaces truncation.
        replaces_truncation: decides alone how much of the distribution is left (mirostat).
        selector: runs after all others in every order, for it decides what the draw chooses from.
        native: the native library's operation for it. A row that has a stage without one runs as torch
            operations altogether; so do traced rows. Stages of other packages have none.
    """

    name: ClassVar[str]
    rank: ClassVar[int]
    parameters: ClassVar[tuple[str, ...]]
    rows: ClassVar[tuple[ParamRow, ...]] = ()
    sampler_id: ClassVar[int | None] = None
    stands_in_for: ClassVar[str | None] = None
    constraint: ClassVar[bool] = False
    keeps_argmax: ClassVar[bool] = False
    greedy_skips: ClassVar[bool] = False
    can_empty: ClassVar[bool] = False
    truncation: ClassVar[bool] = False
    replaces_truncation: ClassVar[bool] = False
    selector: ClassVar[bool] = False
    native: ClassVar[NativeOp | None] = None

    def is_neutral(self, params: SamplingParams) -> bool:
        """Whether it would change nothing; then the plan leaves it out."""
        return all(
            self.value(params, name) == (own.param if (own := self._own(name)) else parameter(name)).neutral
            for name in self.parameters
        )

    def values(self, params: SamplingParams) -> tuple[float, ...]:
        """Numbers kept in the row's device-side columns; their count is the same for all requests."""
        return tuple(float(self.value(params, name)) for name in self.parameters)

    def value(self, params: SamplingParams, name: str) -> Any:
        """A parameter of this stage, be it a field of SamplingParams or of its own `rows`."""
        own = self._own(name)
        if own is None:
            return getattr(params, name)
        value = params.extensions.get(name, own.default)
        return tuple(value) if isinstance(value, list) else value  # a tuple comes over the wire as a list

    def _own(self, name: str) -> ParamRow | None:
        return next((row for row in self.rows if row.name == name), None)

    def prepare(self, params: SamplingParams, info: RowInfo) -> Any:
        """Data of no fixed size, made once a request and kept with its plan."""
        return None

    def native_steps(self, values: Sequence[float], prepared: Any) -> Sequence[NativeStep] | None:
        """This stage in a row's native program, or None if it has to run as `apply`.

        Args:
            values, prepared: what `values` and `prepare` returned for the row.
        """
        return None if self.native is None else (NativeStep(self.native, values),)

    def new_state(self, info: SamplerInfo) -> RowState | None:
        """The memory shared by all rows of this stage, or None if it needs none."""
        return None

    @abstractmethod
    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        """The logits after this stage; it may change them in place. It does not wait for the device.

        Args:
            logits: [R, vocab] float32, finite or -inf, the rows of this stage only.
            values: [R, len(self.values(...))] float32.
        """
