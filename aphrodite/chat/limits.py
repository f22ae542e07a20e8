"""What one rendering of a chat template may cost, and the checks that keep it there.

Templates come with checkpoints and, where a server trusts them, with requests. Python cannot interrupt an
operation of its own, so no single operation may be large: sizes are checked before anything is made, and steps
and processor time are counted between operations.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Final

from jinja2.exceptions import SecurityError

MAX_SOURCE_CHARS: Final = 96 << 10
MAX_NODES: Final = 10_000
MAX_STEPS: Final = 2_000_000
MAX_CPU_SECONDS: Final = 0.5
# On top for each message, as far as to so many: Gemma 4's template looks at all messages before each of them.
STEPS_PER_MESSAGE: Final = 10_000
CPU_SECONDS_PER_MESSAGE: Final = 0.005
MANY_MESSAGES: Final = 1_000
MAX_RANGE: Final = 20_000
MAX_INT_BITS: Final = 1024
MAX_CHARS: Final = 1 << 20  # of a value or the output, on top of a multiple of the input
CHARS_PER_INPUT_CHAR: Final = 4
MAX_ITEMS: Final = 1 << 16  # of a container with all that is in it, on top of the input's size
PRODUCED_PER_CHAR: Final = 32  # all values of a rendering together, in multiples of the limit for one
MAX_NUMBER_ARGUMENT: Final = 100_000

_CLOCK_INTERVAL = 32
_WIDTH = re.compile(r"\d{5,}|%[^a-zA-Z%]*\*")


class LimitError(SecurityError):
    """The template exceeded one of the limits."""


def deadline(messages: int) -> float:
    """When a rendering of so many messages that begins now has to end, in this thread's processor seconds."""
    return time.thread_time() + MAX_CPU_SECONDS + CPU_SECONDS_PER_MESSAGE * min(messages, MANY_MESSAGES)


class Budget:
    """The running cost of one rendering.

    Args:
        input_chars: size of the conversation, to which the limits on values are relative.
        messages: how many it has.
        until: when to stop, of `deadline()`.
    """

    __slots__ = ("_deadline", "_max_steps", "_next_clock", "_produced", "_steps", "max_chars", "max_items")

    def __init__(self, input_chars: int, messages: int, until: float) -> None:
        self.max_chars = MAX_CHARS + CHARS_PER_INPUT_CHAR * input_chars
        self.max_items = MAX_ITEMS + input_chars
        self._produced = 0
        self._steps = 0
        self._next_clock = _CLOCK_INTERVAL
        self._max_steps = MAX_STEPS + STEPS_PER_MESSAGE * min(messages, MANY_MESSAGES)
        self._deadline = until

    def tick(self, steps: int = 1) -> None:
        """Count work; raises LimitError when there was too much."""
        self._steps += steps
        if self._steps < self._next_clock:
            return
        if self._steps > self._max_steps:
            raise LimitError(f"the template takes more than {self._max_steps:,} steps")
        if time.thread_time() > self._deadline:
            raise LimitError("the template takes too long")
        self._next_clock = self._steps + _CLOCK_INTERVAL

    def check_size(self, size: int) -> None:
        """Refuse a value of so many characters or items before it is made."""
        if size > self.max_chars:
            raise LimitError(f"the template makes a value of {size:,} characters; {self.max_chars:,} are allowed here")

    def produce(self, size: int) -> None:
        """Count text that was made."""
        self.check_size(size)
        self._produced += size
        self.tick(1 + size // 4096)
        if self._produced > self.max_chars * PRODUCED_PER_CHAR:
            raise LimitError("the template makes too much text")

    def admit(self, value: Any) -> Any:
        """Check a new value. Containers are weighed with all that is in them, however often it is shared."""
        if isinstance(value, str):
            self.produce(len(value))
        elif isinstance(value, (list, tuple, dict, set, frozenset)):
            self.weigh(value)
        elif isinstance(value, int):
            check_bits(value.bit_length())
        return value

    def check_items(self, count: int) -> None:
        """Refuse a container of so many items before it is made."""
        if count > self.max_items:
            raise LimitError(f"the template makes a list of {count:,} items; {self.max_items:,} are allowed here")

    def touch(self, value: Any) -> None:
        """Count the work of reading a value once."""
        if isinstance(value, (str, list, tuple, dict)):
            self.tick(1 + len(value) // (4096 if isinstance(value, str) else 64))
        else:
            self.tick()

    def weigh(self, value: Any) -> int:
        """Items and characters of a value as a tree, as which its text would show it.

        Raises:
            LimitError: they exceed the limits.
        """
        weight = visited = 0
        stack: list[Any] = [value]
        while stack:
            item = stack.pop()
            visited += 1
            weight += 1
            if isinstance(item, str):
                weight += len(item)
            elif isinstance(item, (list, tuple, set, frozenset, dict)):
                self.check_items(visited + len(stack) + 2 * len(item))
                stack.extend(item)
                if isinstance(item, dict):
                    stack.extend(item.values())
            if weight > self.max_chars:
                raise LimitError(f"the template makes a structure of more than {self.max_chars:,} characters")
        self.tick(1 + visited // 8)
        return weight


_BUDGET: ContextVar[Budget] = ContextVar("aphrodite_template_budget")


def current() -> Budget:
    """The budget of the rendering that runs in this thread."""
    return _BUDGET.get()


def use(budget: Budget) -> Callable[[], None]:
    """Make `budget` the current one; call the result to restore the one before."""
    token = _BUDGET.set(budget)
    return lambda: _BUDGET.reset(token)


class Counted:
    """An iterable whose every item is a step."""

    __slots__ = ("_iterable",)

    def __init__(self, iterable: Iterable[Any]) -> None:
        self._iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        tick = current().tick
        for item in self._iterable:
            tick()
            yield item

    def __len__(self) -> int:
        return len(self._iterable)  # type: ignore[arg-type]  # TypeError is what a loop expects of a generator


def check_bits(bits: int) -> None:
    """Refuse huge whole numbers, on which every operation is slow."""
    if bits > MAX_INT_BITS:
        raise LimitError(f"the template makes a number of more than {MAX_INT_BITS} bits")


def check_format(template: Any, arguments: Any = ()) -> None:
    """Refuse a format string whose result would be huge: by a width, or by showing large arguments many times."""
    if isinstance(template, str):
        if _WIDTH.search(template):
            raise LimitError("the template formats with a width that is too large")
        uses = template.count("%") if isinstance(arguments, dict) else 1
        current().check_size(len(template) + uses * current().weigh(arguments))


def check_binary(operator: str, left: Any, right: Any) -> None:
    """Refuse `left operator right` where the result would be huge."""
    if operator == "*":
        for value, times in ((left, right), (right, left)):
            if isinstance(times, int) and isinstance(value, (str, list, tuple)):
                check = current().check_size if isinstance(value, str) else current().check_items
                check(len(value) * max(times, 0))
        if isinstance(left, int) and isinstance(right, int):
            check_bits(left.bit_length() + right.bit_length())
    elif operator == "**":
        if isinstance(left, int) and isinstance(right, int):
            check_bits(left.bit_length() * abs(right))
    elif operator == "+":
        if isinstance(left, str) and isinstance(right, str):
            current().check_size(len(left) + len(right))
    elif operator == "%":
        check_format(left, right)


def check_join(separator: Any, items: Any) -> Any:
    """Refuse a join whose result would be huge. Returns the items, as a list where they could be read only once."""
    budget = current()
    if not isinstance(items, (list, tuple, str, dict)):
        items = budget.admit(list(Counted(items)))
    budget.check_size(len(str(separator)) * len(items) + budget.weigh(items))
    return items


def check_replace(text: Any, old: Any, new: Any) -> None:
    """Refuse a replacement whose result would be huge."""
    if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
        current().check_size(len(text) + text.count(old) * max(0, len(new) - len(old)))


def check_numbers(arguments: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Refuse large whole numbers as widths, counts and precisions, and long strings as fillers."""
    for value in (*arguments, *named.values()):
        if isinstance(value, int) and abs(value) > MAX_NUMBER_ARGUMENT:
            raise LimitError(f"the template passes a number above {MAX_NUMBER_ARGUMENT:,} to a function")
        if isinstance(value, (str, tuple, list)) and len(str(value)) > MAX_NUMBER_ARGUMENT:
            raise LimitError("the template passes a very long filler to a function")
