"""Regular expressions of a documented subset, compiled to a small non-deterministic program.

Syntax (the common part of Python's `re` and RE2): literals, `.`, `[...]` and `[^...]` with ranges, `\\d \\w \\s \\D
\\W \\S`, `\\n \\r \\t \\f \\v \\0 \\xHH \\uHHHH`, escaped punctuation, groups `( )`, `(?: )`, `(?P<name> )`, `|`,
`* + ? {m} {m,} {,n} {m,n}` (a `?` behind them changes nothing: the match that ends first is taken anyway), `^ $ \\A
\\Z \\b \\B`, and the flags `(?ims)` at the start. Classes are those of Unicode. What needs backtracking (back
references, look-around, possessive and atomic groups) is refused, so every program runs in time linear in the
text (Thompson, doi 10.1145/363347.363387).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from aphrodite.errors import InvalidRequestError

MAX_INSTRUCTIONS = 2048  # of all of a request's patterns together
MAX_NESTING = 40
MAX_REPEAT = 1000

Condition = Literal["start", "end", "line_start", "line_end", "word", "not_word"]


class CharSet(NamedTuple):
    """Which characters an instruction consumes."""

    ranges: tuple[tuple[int, int], ...] = ()  # code points, both ends included
    kinds: str = ""  # any of dwsDWS
    negated: bool = False
    ignore_case: bool = False

    def contains(self, char: str) -> bool:
        if self.ignore_case:
            variants = {char, char.lower(), char.upper(), char.casefold()}
            return any(self._lists(variant) for variant in variants if len(variant) == 1) != self.negated
        return self._lists(char) != self.negated

    def _lists(self, char: str) -> bool:
        code = ord(char)
        return any(low <= code <= high for low, high in self.ranges) or any(
            is_kind(char, kind.lower()) != kind.isupper() for kind in self.kinds
        )


def is_kind(char: str, kind: str) -> bool:
    """Whether a character is a digit (d), part of a word (w) or white space (s)."""
    if kind == "d":
        return char.isdecimal()
    if kind == "w":
        return char.isalnum() or char == "_"
    return char.isspace()


class Consume(NamedTuple):
    chars: CharSet
    then: int


class Split(NamedTuple):
    first: int
    second: int


class Require(NamedTuple):
    """Goes on only where the characters around the place fulfil the condition."""

    condition: Condition
    then: int


class Accept(NamedTuple):
    pattern: int


Instruction = Consume | Split | Require | Accept


def compile_program(patterns: tuple[str, ...]) -> tuple[list[Instruction], int]:
    """The program that runs all patterns at once, and the instruction it starts at.

    Raises:
        InvalidRequestError: a pattern is no regular expression of the subset, could match the empty text, or the
            program would be too large.
    """
    program: list[Instruction] = []
    entries = [_Compiler(pattern, program).compile(index) for index, pattern in enumerate(patterns)]
    start = entries[-1]
    for entry in reversed(entries[:-1]):
        program.append(Split(entry, start))
        start = len(program) - 1
    return program, start


# The tree of one pattern: a node is compiled backwards, so it knows what comes after it.
_Node = Callable[[int], int]  # instruction to go on with -> instruction to begin with


class _Compiler:
    """Parses one pattern by recursive descent and appends its instructions to `program`."""

    def __init__(self, pattern: str, program: list[Instruction]) -> None:
        self._pattern = pattern
        self._program = program
        self._at = 0
        self._depth = 0
        self._work = 0
        self._ignore_case = self._multiline = self._dot_all = False

    def compile(self, index: int) -> int:
        self._flags()
        node = self._alternatives()
        if self._at < len(self._pattern):
            raise self._error("has a closing parenthesis without an opening one")
        entry = node(self._emit(Accept(index)))
        if self._accepts_nothing(entry):
            raise self._error("could match the empty text, so it would match everywhere")
        return entry

    def _error(self, why: str) -> InvalidRequestError:
        shown = self._pattern if len(self._pattern) <= 60 else f"{self._pattern[:57]}..."
        return InvalidRequestError(f"The regular expression {shown!r} {why} (at character {self._at}).")

    def _emit(self, instruction: Instruction) -> int:
        self._program.append(instruction)
        self._spend()
        return len(self._program) - 1

    def _spend(self) -> None:
        """Repetitions of nothing emit nothing, so work is bounded beside the size."""
        self._work += 1
        if len(self._program) > MAX_INSTRUCTIONS or self._work > 4 * MAX_INSTRUCTIONS:
            raise self._error(f"is too large: patterns may have {MAX_INSTRUCTIONS} parts with repetitions written out")

    def _accepts_nothing(self, entry: int) -> bool:
        stack, seen = [entry], set()
        while stack:
            place = stack.pop()
            if place in seen:
                continue
            seen.add(place)
            match self._program[place]:
                case Accept():
                    return True
                case Split(first, second):
                    stack += [first, second]
                case Require(_, then):
                    stack.append(then)
        return False

    # Parsing.

    def _peek(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _take(self, text: str) -> bool:
        found = self._pattern.startswith(text, self._at)
        if found:
            self._at += len(text)
        return found

    def _next(self) -> str:
        char = self._peek()
        if not char:
            raise self._error("ends too early")
        self._at += 1
        return char

    def _flags(self) -> None:
        end = self._pattern.find(")")
        if self._pattern.startswith("(?") and end > 2 and set(self._pattern[2:end]) <= set("ims"):
            flags = self._pattern[2:end]
            self._ignore_case, self._multiline, self._dot_all = ("i" in flags), ("m" in flags), ("s" in flags)
            self._at = end + 1

    def _alternatives(self) -> _Node:
        branches = [self._sequence()]
        while self._take("|"):
            branches.append(self._sequence())
        if len(branches) == 1:
            return branches[0]

        def build(then: int) -> int:
            entries = [branch(then) for branch in branches]
            start = entries[-1]
            for entry in reversed(entries[:-1]):
                start = self._emit(Split(entry, start))
            return start

        return build

    def _sequence(self) -> _Node:
        items: list[_Node] = []
        while self._peek() not in ("", "|", ")"):
            items.append(self._repeated(self._atom()))

        def build(then: int) -> int:
            for item in reversed(items):
                then = item(then)
            return then

        return build

    def _repeated(self, node: _Node) -> _Node:
        bounds = self._bounds()
        if bounds is None:
            return node
        self._take("?")
        if self._repeats_again():
            raise self._error("repeats a repetition; put it into a group")
        low, high = bounds

        def build(then: int) -> int:
            if high is None:
                loop = self._emit(Split(then, then))
                self._program[loop] = Split(node(loop), then)
                then = loop
            else:
                after = then
                for _ in range(high - low):
                    self._spend()
                    then = self._emit(Split(node(then), after))
            for _ in range(low):
                self._spend()
                then = node(then)
            return then

        return build

    def _repeats_again(self) -> bool:
        place = self._at
        again = self._bounds() is not None
        self._at = place
        return again

    def _bounds(self) -> tuple[int, int | None] | None:
        """Least and most repetitions if a quantifier comes next; a `{` that begins none is a literal."""
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(sign):
                return bounds
        end = self._pattern.find("}", self._at)
        if self._peek() != "{" or end < 0:
            return None
        low, comma, high = self._pattern[self._at + 1 : end].partition(",")
        if not (low or high) or not all(part == "" or (part.isascii() and part.isdigit()) for part in (low, high)):
            return None
        least = int(low[:6] or 0)
        most = least if not comma else int(high[:6]) if high else None
        if max(least, most or 0) > MAX_REPEAT:
            raise self._error(f"repeats more than {MAX_REPEAT} times")
        if most is not None and most < least:
            raise self._error("repeats at most fewer times than at least")
        self._at = end + 1
        return least, most

    def _atom(self) -> _Node:
        char = self._next()
        if char == "(":
            return self._group()
        if char == "[":
            return self._consume(self._bracket())
        if char == ".":
            return self._consume(CharSet(negated=True) if self._dot_all else _literal("\n", negated=True))
        if char == "^":
            return self._require("line_start" if self._multiline else "start")
        if char == "$":
            return self._require("line_end" if self._multiline else "end")
        if char in "*+?":
            raise self._error(f"has nothing to repeat before {char!r}")
        if char == "\\":
            return self._escape()
        return self._consume(_literal(char, ignore_case=self._ignore_case))

    def _group(self) -> _Node:
        self._depth += 1
        if self._depth > MAX_NESTING:
            raise self._error(f"nests groups more than {MAX_NESTING} deep")
        if self._take("?P<"):
            end = self._pattern.find(">", self._at)
            if end < 0 or not self._pattern[self._at : end].isidentifier():
                raise self._error("has a group without a proper name")
            self._at = end + 1
        elif self._take("?") and not self._take(":"):
            raise self._error("uses look-around, flags inside, or another group that is not supported")
        node = self._alternatives()
        if not self._take(")"):
            raise self._error("lacks a closing parenthesis")
        self._depth -= 1
        return node

    def _escape(self) -> _Node:
        char = self._next()
        conditions: dict[str, Condition] = {"A": "start", "Z": "end", "b": "word", "B": "not_word"}
        if char in conditions:
            return self._require(conditions[char])
        if char in "dwsDWS":
            return self._consume(CharSet(kinds=char))
        return self._consume(_literal(self._escaped(char), ignore_case=self._ignore_case))

    def _escaped(self, char: str) -> str:
        """The character that a backslash and `char` stand for."""
        simple = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0"}
        if char in simple:
            return simple[char]
        if char in ("x", "u"):
            length = 2 if char == "x" else 4
            digits = self._pattern[self._at : self._at + length]
            if len(digits) < length or not all(digit in "0123456789abcdefABCDEF" for digit in digits):
                raise self._error(f"has \\{char} without {length} hexadecimal digits")
            self._at += length
            return chr(int(digits, 16))
        if char.isalnum():
            what = "a back reference" if char.isdigit() else f"\\{char}"
            raise self._error(f"uses {what}, which is not supported")
        return char

    def _bracket(self) -> CharSet:
        negated = self._take("^")
        ranges: list[tuple[int, int]] = []
        kinds = ""
        first = True
        while first or self._peek() != "]":
            first = False
            low = self._bracket_item()
            if low in _KINDS:
                kinds += low[1]
                continue
            high = low
            if self._peek() == "-" and self._pattern[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                high = self._bracket_item()
                if high in _KINDS or ord(high) < ord(low):
                    raise self._error("has a range in brackets that is not one")
            ranges.append((ord(low), ord(high)))
        self._at += 1
        return CharSet(tuple(ranges), kinds, negated, self._ignore_case)

    def _bracket_item(self) -> str:
        """A character, or backslash and letter of a class."""
        char = self._next()
        if char != "\\":
            return char
        char = self._next()
        if char in "dwsDWS":
            return f"\\{char}"
        return "\b" if char == "b" else self._escaped(char)

    def _consume(self, chars: CharSet) -> _Node:
        return lambda then: self._emit(Consume(chars, then))

    def _require(self, condition: Condition) -> _Node:
        return lambda then: self._emit(Require(condition, then))


_KINDS = frozenset(f"\\{kind}" for kind in "dwsDWS")


def _literal(char: str, *, negated: bool = False, ignore_case: bool = False) -> CharSet:
    return CharSet(((ord(char), ord(char)),), "", negated, ignore_case)
