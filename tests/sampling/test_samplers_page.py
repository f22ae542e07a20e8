"""docs/samplers.md is what the table and the stages say; extensions that do not fit are left out."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import typing
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from aphrodite.sampling import extensions
from aphrodite.sampling.docs import KIND_WORDS, range_text, samplers_page, value_text
from aphrodite.sampling.extensions import Extension, builtin_stage_modules, installed_extensions, parameter_row
from aphrodite.sampling.fields import parameter_table
from aphrodite.sampling.params import SamplingParams, builtin_table
from aphrodite.sampling.stages.base import RowInfo, SamplerInfo, Stage, StageContext
from aphrodite.sampling.stages.guard import GuardedStage
from aphrodite.sampling.stages.registry import all_stages
from aphrodite.sampling.table import Kind

ROOT = Path(__file__).parents[2]


def test_the_committed_page_is_up_to_date() -> None:
    # A process of its own: other tests may have met extensions.
    command = [sys.executable, "-m", "aphrodite.cli", "samplers", "docs"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    committed = (ROOT / "docs" / "samplers.md").read_text(encoding="utf-8")
    assert committed == made, "run: aphrodite samplers docs > docs/samplers.md"


def test_the_page_has_every_parameter_alias_and_stage() -> None:
    page = samplers_page()
    for row in builtin_table():
        (line,) = [
            line for line in page.splitlines() if line.startswith(f"| `{row.name}` | ") and row.param.doc[:20] in line
        ]
        assert all(f"`{alias}`" in line for alias in row.param.aliases)
        assert line.count(" | ") - line.count("\\|") == 5
    for stage in all_stages():
        assert f"\n### {stage.name}\n" in page
    assert not re.search(r"(?m)[ \t]$", page)
    assert set(KIND_WORDS) == set(typing.get_args(Kind))


def test_every_parameter_that_shapes_the_choice_belongs_to_a_stage() -> None:
    read = {name for stage in all_stages() for name in stage.parameters}
    assert read <= {row.name for row in parameter_table()}
    assert {row.name for row in builtin_table() if row.param.neutral is not None} <= read


def test_values_and_ranges_in_words() -> None:
    rows = {row.name: row for row in builtin_table()}
    assert range_text(rows["top_p"]) == "0 … 1"
    assert range_text(rows["seed"]) == "-2^63 … 2^63 - 1"
    assert range_text(rows["min_tokens"]) == "≥ 0"
    assert range_text(rows["stop_token_ids"]) == "up to 256 entries; token ids"
    assert [value_text(value) for value in (None, (), True, 0.5, 1.0, "raw")] == [
        "none",
        "none",
        "true",
        "0.5",
        "1",
        "raw",
    ]


class Shift(Stage):
    """Adds a number to token 0."""

    name = "shift"
    rank = 850
    parameters = ("shift",)
    rows = (parameter_row("shift", "float", 0.0, "Added to token 0.", ge=-10.0, le=10.0, aliases=("shove",)),)

    def apply(self, logits: torch.Tensor, values: torch.Tensor, context: StageContext) -> torch.Tensor:
        logits[:, :1] += values
        return logits


def load(monkeypatch: pytest.MonkeyPatch, *stages: Any) -> tuple[Extension, ...]:
    """What is left of these stages when they come as entry points."""

    class Entry:
        def __init__(self, number: int, stage: Any) -> None:
            self.name, self.value, self.dist, self._stage = f"e{number}", "module:STAGE", None, stage

        def load(self) -> Any:
            if isinstance(self._stage, Exception):
                raise self._stage
            return self._stage

    entries = [Entry(number, stage) for number, stage in enumerate(stages)]
    monkeypatch.setattr(metadata, "entry_points", lambda *, group: entries if group == extensions.GROUP else [])
    return installed_extensions.__wrapped__()


def variant(**attributes: Any) -> Stage:
    return type("Variant", (Shift,), attributes)()  # type: ignore[no-any-return]


def test_a_good_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = load(monkeypatch, Shift())
    assert found.stage.name == "shift"
    assert found.rows[0].param.stage == "shift"
    assert load(monkeypatch, variant(constraint=True))[0].rows[0].param.stage == ""


@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        (ImportError("no such module"), "no such module"),
        (Shift, "no instance"),
        (variant(rows=()), "no parameters"),
        (variant(name="min_p"), "taken"),
        (variant(name="penalties"), "taken"),
        (variant(name="Shift!"), "lower-case"),
        (variant(rows=(parameter_row("top_p", "float", 0.0, "Mine."),), parameters=("top_p",)), "taken"),
        (variant(rows=(parameter_row("shift", "float", 0.0, "Mine.", aliases=("rep_pen",)),)), "taken"),
        (variant(rows=(parameter_row("shift", "float", 11.0, "Mine.", le=10.0),)), "out of bounds"),
        (variant(rows=(parameter_row("shift", "bias", {}, "Mine."),)), "kinds"),  # type: ignore[arg-type]
        (variant(rows=("shift",)), "parameter_row"),
        (variant(rows=(parameter_row("shift", "float", 1.0, "Mine.", neutral=0.0),)), "do not set its parameters"),
        (variant(values=lambda self, params: (None,)), "floats"),
    ],
)
def test_one_that_does_not_fit_is_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stage: Any, reason: str
) -> None:
    monkeypatch.setattr(logging.getLogger("aphrodite"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="aphrodite"):
        found = load(
            monkeypatch,
            stage,
            variant(name="other", parameters=("other",), rows=(parameter_row("other", "int", 0, "."),)),
        )
    assert [extension.stage.name for extension in found] == ["other"]
    (record,) = caplog.records
    assert "is left out" in record.getMessage()
    assert reason in record.getMessage()


def test_of_two_with_one_name_the_first_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(load(monkeypatch, Shift(), Shift())) == 1
    assert len(load(monkeypatch, Shift(), variant(name="again"))) == 1


def test_our_own_names_are_known_without_importing_the_stages() -> None:
    names = builtin_stage_modules() | {row.name for row in builtin_table()}
    assert {stage.name for stage in all_stages() if not isinstance(stage, GuardedStage)} <= names


def context(rows: int, prepared: list[Any], state: Any = None) -> StageContext:
    index = torch.arange(rows)
    return StageContext(
        rows=list(range(rows)),
        index=index,
        positions=[1] * rows,
        prepared=prepared,
        state=state,
        seeds=index,
        token_ids=torch.zeros(rows, 4, dtype=torch.int32),
        num_prompt=torch.ones(rows, dtype=torch.int32),
    )


class Failing(Shift):
    """Fails to prepare requests with a negative value, and in `observe` for row 1."""

    def prepare(self, params: SamplingParams, info: RowInfo) -> Any:
        if self.value(params, "shift") < 0:
            raise RuntimeError("prepare")
        return None

    def new_state(self, info: SamplerInfo) -> Any:
        return FailingState()


class FailingState:
    def start(self, row: int, prompt_token_ids: Any) -> None: ...

    def end(self, row: int) -> None: ...

    def observe(self, rows: Any, token_ids: torch.Tensor) -> None:
        if 1 in rows:
            raise RuntimeError("observe")

    def rewind(self, row: int, position: int) -> None: ...


def test_what_fails_is_nan_and_the_rest_goes_on() -> None:
    stage = GuardedStage(Failing())
    info: Any = None
    shifts = [1.0, -1.0, 2.0]
    prepared = [stage.prepare(SamplingParams(extensions={"shift": shift}), info) for shift in shifts]
    state = stage.new_state(info)
    assert state is not None
    logits, values = torch.zeros(3, 5), torch.tensor(shifts)[:, None]
    after = stage.apply(logits.clone(), values, context(3, prepared, state))
    assert after[:, 0].tolist()[::2] == [1.0, 2.0]
    assert bool(after[1].isnan().all())
    assert bool(after[0, 1:].eq(0).all())
    prepared[1] = None
    for row in range(3):
        state.start(row, [])
        state.observe([row], torch.zeros(1, dtype=torch.int32))
    after = stage.apply(logits.clone(), values, context(3, prepared, state))
    assert after.isnan().all(-1).tolist() == [False, True, False]
    state.start(1, [])  # another request takes the row
    assert not bool(stage.apply(logits.clone(), values, context(3, prepared, state)).isnan().any())


@pytest.mark.parametrize("returned", [None, torch.zeros(1, 4), torch.zeros(2, 5, dtype=torch.float64)])
def test_a_result_of_another_shape_or_type_fails_the_rows(returned: Any) -> None:
    stage = GuardedStage(variant(apply=lambda self, logits, values, context: returned))
    after = stage.apply(torch.zeros(2, 5), torch.ones(2, 1), context(2, [None, None]))
    assert after.shape == (2, 5)
    assert bool(after.isnan().all())
