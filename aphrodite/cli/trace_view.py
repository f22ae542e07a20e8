"""Draws a token's trace: what each stage left, and the most likely tokens at the end."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from aphrodite.cli.sources import printable
from aphrodite.sampling.explain import percent, why

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import RenderableType

    from aphrodite.core.plan import StageTrace, TokenTrace

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_WIDE = 132  # columns from which stages and tokens stand side by side
_MEDIUM = 76  # columns from which the tokens' probabilities in the model are shown
_WIDE_BAR, _NARROW_BAR = 16, 12
_CHOSEN, _OTHER, _FAINT = "bold green", "cyan", "dim"


class TraceView:
    """Makes a panel of each token.

    Args:
        token_text: the text of a token id.
        width: columns of the terminal.
    """

    def __init__(self, token_text: Callable[[int], str], width: int) -> None:
        self._token_text = token_text
        self._wide = width >= _WIDE
        self._with_model = width >= _MEDIUM
        self._bar = _WIDE_BAR if self._with_model else _NARROW_BAR

    def panel(self, number: int, trace: TokenTrace) -> Panel:
        """One token; `number` counts the answer's tokens from 1."""
        title = Text.assemble((f" {number} ", _FAINT), (self._quoted(trace.token_id), _CHOSEN), " ")
        stages, tokens = self._stages(trace), self._tokens(trace)
        body: RenderableType
        if self._wide:
            body = Table.grid(padding=(0, 3))
            body.add_row(stages, tokens)
        else:
            body = Group(stages, Text(), tokens)
        return Panel(
            Group(body, Text(), Text(why(trace), style="italic")),
            title=title,
            title_align="left",
            border_style=_FAINT,
        )

    def _stages(self, trace: TokenTrace) -> Table:
        table = _table("stage", "candidates", "", "", "chosen", "")
        table.columns[0].min_width = 14 if self._with_model else None
        for column in (1, 3, 4, 5):
            table.columns[column].justify = "right"
            table.columns[column].min_width = 7 if self._with_model else None
        first = trace.stages[0]
        table.add_row(Text(first.stage, style=_FAINT), "", "", f"{first.candidates:,}", *_chances(first))
        for before, after in pairwise(trace.stages):
            cut = after.candidates < before.candidates
            acted = cut or after.top_probabilities != before.top_probabilities
            table.add_row(
                Text(after.stage, style="bold" if acted else _FAINT),
                Text(f"{before.candidates:,}", style=_FAINT),
                Text("→", style="yellow" if cut else _FAINT),
                Text(f"{after.candidates:,}", style="yellow" if cut else _FAINT),
                *_chances(after, before),
            )
        return table

    def _tokens(self, trace: TokenTrace) -> Table:
        """The most likely tokens after the last stage, and the chosen one even if it is not among them."""
        last, first = trace.stages[-1], trace.stages[0]
        in_model = dict(zip(first.top_ids, first.top_probabilities, strict=True))
        rows = [
            (rank, token_id, probability)
            for rank, (token_id, probability) in enumerate(zip(last.top_ids, last.top_probabilities, strict=True), 1)
        ]
        if trace.token_id not in last.top_ids:
            rows.append((last.rank, trace.token_id, last.probability))
            in_model.setdefault(trace.token_id, first.probability)
        table = _table("", "", "token", "", "at the end", *(["in model"] if self._with_model else []))
        table.columns[2].no_wrap = False
        table.columns[2].min_width = 14 if self._with_model else None
        for column in table.columns[1], *table.columns[4:]:
            column.justify = "right"
        for rank, token_id, probability in rows:
            chosen = token_id == trace.token_id
            style = _CHOSEN if chosen else _OTHER
            was = first.probability if chosen else in_model.get(token_id)
            cells = [
                Text("▶" if chosen else " ", style=style),
                Text(f"{rank:,}", style=_FAINT),
                Text(self._quoted(token_id), style=style),
                Text(bar(probability, self._bar), style=style),
                Text(percent(probability), style=style),
                Text("" if was is None else percent(was), style=_FAINT),
            ]
            table.add_row(*cells[: len(table.columns)])
        return table

    def _quoted(self, token_id: int) -> str:
        text = self._token_text(token_id).replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
        return f"“{printable(text)}”"


def bar(share: float, width: int) -> str:
    """A bar of `share` (0 to 1) of `width` columns, in eighths; anything above nothing shows."""
    eighths = max(round(share * width * 8), 1 if share > 0 else 0)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def _chances(stage: StageTrace, before: StageTrace | None = None) -> tuple[Text, Text]:
    """Rank and probability of the chosen token, green where it gained and red where it lost."""
    if stage.rank == 0:
        return Text("out", style="red"), Text("")
    style = _FAINT
    if before is not None and before.rank and abs(stage.probability - before.probability) > 1e-6:
        style = "green" if stage.probability > before.probability else "red"
    rank_moved = before is not None and before.rank != stage.rank
    return Text(f"#{stage.rank:,}", style="" if rank_moved else _FAINT), Text(percent(stage.probability), style=style)


def _table(*headers: str) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style=_FAINT)
    for header in headers:
        table.add_column(header, no_wrap=True)
    return table
