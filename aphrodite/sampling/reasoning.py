"""How far an answer is in its reasoning, and the marks that close it once `thinking_token_budget` is spent.

The marks are looked for in the answer's bytes, whatever tokens they are made of, as the server does that takes the
answer apart (`chat/reasoning.py`, `chat/harmony.py`). What is forced is the closing mark as the tokenizer spells it.
The idea is that of vLLM's parameter of this name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from aphrodite.errors import InvalidRequestError
from aphrodite.sampling.table import ReasoningMarks

if TYPE_CHECKING:
    from aphrodite.sampling.vocabulary import Vocabulary

NO_TOKEN: Final = -1  # nothing is forced
_Phase = Literal["before", "thinking", "closing", "answer"]


class _State(NamedTuple):
    """What is known after some tokens.

    Attributes:
        tail: bytes that may be part of a mark.
        spent: tokens of reasoning.
        closing: tokens that have to come next.
        closed: how often reasoning was closed by force.
    """

    phase: _Phase
    tail: bytes = b""
    spent: int = 0
    closing: tuple[int, ...] = ()
    closed: int = 0


class ReasoningRow:
    """A `TokenFollower` that closes an answer's reasoning after `budget` tokens of it.

    Tokens of the opening mark are not counted, those of the closing one are not limited. The rest of a closing mark
    that the model has begun is all that is forced, unless the mark is a token of its own.

    It needs to hear of an answer's tokens in time only where the budget may be spent (`waits`): before that, and once
    the reasoning is over, a device may run ahead.

    Args:
        num_prompt: where the answer's first token stands.

    Attributes:
        forced: [1] int32, the token that has to be chosen at the position of the last `refresh`, or NO_TOKEN.
        failure: None: a budget never makes an answer impossible.

    Raises:
        InvalidRequestError: the model has no tokens for the closing mark.
    """

    failure: str | None = None

    def __init__(self, marks: ReasoningMarks, budget: int, vocabulary: Vocabulary, num_prompt: int) -> None:
        self.forced: npt.NDArray[np.int32] = np.full(1, NO_TOKEN, np.int32)
        self._marks = marks
        self._start, self._end = marks.start.encode(), marks.end.encode()
        self._budget = budget
        self._vocabulary = vocabulary
        self._num_prompt = num_prompt
        self._opening = len(self._spelt(self._start))  # tokens that the opening mark takes
        for mark in (self._end, marks.last_end.encode()):
            if mark:
                self._spelt(mark)  # refused now if it cannot be: later it would fail the others' step
        first = self._thinking(b"", 0, 0) if marks.is_open else _State("before")
        self._states = [first]  # after each number of tokens

    @property
    def words(self) -> npt.NDArray[np.int32] | None:
        token = int(self.forced[0])
        if token == NO_TOKEN:
            return None
        words = np.zeros(self._vocabulary.size // 32 + 1, np.uint32)
        words[token // 32] = 1 << token % 32
        return words.view(np.int32)

    def tell(self, position: int, token_id: int) -> None:
        if position - self._num_prompt == len(self._states) - 1:
            self._states.append(self._after(self._states[-1], token_id))

    def waits(self, position: int) -> bool:
        state = self._states[-1]
        unheard = position - self._num_prompt - len(self._states) + 1
        if state.phase == "closing":
            return True
        if state.phase == "thinking":
            return state.spent + unheard >= self._budget
        if state.phase == "before":
            opening = 1 if _held(state.tail, self._start) else self._opening
            return unheard >= opening and state.spent + unheard - opening >= self._budget
        return False

    def refresh(self, position: int) -> None:
        heard = position - self._num_prompt == len(self._states) - 1
        closing = self._states[-1].closing
        self.forced[0] = closing[0] if heard and closing else NO_TOKEN

    def completed_at(self, position: int) -> bool:
        return False

    def rewind(self, position: int) -> None:
        del self._states[position - self._num_prompt + 1 :]

    def _after(self, state: _State, token_id: int) -> _State:
        if state.phase == "answer":
            return state
        if state.phase == "closing":
            left = state.closing[1:]
            return state._replace(closing=left) if left else self._closed(b"", state.spent, state.closed + 1)
        tail = state.tail + self._vocabulary.token_bytes(token_id)
        if state.phase == "before":
            return self._before(tail, state)
        spent = state.spent + 1
        _, mark, rest = tail.partition(self._end)
        if mark:
            return self._closed(rest, spent, state.closed)
        return self._thinking(tail[max(0, len(tail) - len(self._end) + 1) :], spent, state.closed)

    def _before(self, tail: bytes, state: _State) -> _State:
        """Reasoning has not begun; where it comes once, only white space may stand before it."""
        if self._marks.last_end:
            _, mark, rest = tail.partition(self._start)
            if not mark:
                return state._replace(tail=tail[max(0, len(tail) - len(self._start) + 1) :])
            return self._thinking(rest, state.spent, state.closed)
        begun = tail.lstrip()
        if begun.startswith(self._start):
            return self._thinking(begun[len(self._start) :], 0, 0)
        return state._replace(tail=begun) if self._start.startswith(begun) else _State("answer")

    def _thinking(self, tail: bytes, spent: int, closed: int) -> _State:
        if spent < self._budget:
            return _State("thinking", tail, spent, (), closed)
        end = self._marks.last_end.encode() if closed and self._marks.last_end else self._end
        return _State("closing", b"", spent, self._spelt(end, tail), closed)

    def _closed(self, rest: bytes, spent: int, closed: int) -> _State:
        """Reasoning is over, unless it may come again."""
        return _State("before", rest, spent, (), closed) if self._marks.last_end else _State("answer")

    def _spelt(self, mark: bytes, before: bytes = b"") -> tuple[int, ...]:
        """The tokens of a mark, or of what is missing of it behind `before`."""
        vocabulary = self._vocabulary
        ids = vocabulary.encode_inside(mark)
        begun = 0 if vocabulary.special_ids.issuperset(ids[:1]) else _held(before, mark)
        if begun:
            ids = vocabulary.encode_inside(mark[begun:]) or vocabulary.spell(mark[begun:])
        ids = ids or vocabulary.spell(mark)
        if not ids or max(ids) >= vocabulary.size:
            text = mark.decode("utf-8", "replace")
            raise InvalidRequestError(
                f"`thinking_token_budget` needs the mark {text!r} in tokens, and this model has none for it. Leave it"
                " out.",
                param="thinking_token_budget",
            )
        return tuple(ids)


def _held(text: bytes, mark: bytes) -> int:
    """How many bytes at the end of `text` are the beginning of `mark`, which they are not all of."""
    longest = min(len(text), len(mark) - 1)
    return next((size for size in range(longest, 0, -1) if mark.startswith(text[-size:])), 0)
