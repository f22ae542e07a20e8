"""GBNF, llama.cpp's grammar notation, rewritten in Lark as llguidance reads it.

A grammar without recursion becomes one regular expression. Of others, what does not lead back to itself becomes
terminals, which take as much text as they can: all that is written fits the grammar, but where what follows a terminal
could also continue it, some texts that fit are never written.

Notation: llama.cpp's grammars/README.md. Lark as of llguidance's docs/syntax.md.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

MAX_DEPTH = 64  # of parentheses
MAX_REPEAT = 100_000

_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_COUNT = re.compile(r"\{\s*(\d{1,6})\s*(,?)\s*(\d{0,6})\s*\}")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-", "/": "/", "^": "^"}
_CODE_DIGITS = {"x": 2, "u": 4, "U": 8}


@dataclass(frozen=True, slots=True)
class _Literal:
    text: str


@dataclass(frozen=True, slots=True)
class _Characters:
    """One character of some ranges, or of none of them."""

    ranges: tuple[tuple[str, str], ...]
    negated: bool


@dataclass(frozen=True, slots=True)
class _Reference:
    name: str


@dataclass(frozen=True, slots=True)
class _Repeat:
    item: _Node
    least: int
    most: int | None


@dataclass(frozen=True, slots=True)
class _Sequence:
    items: tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Choice:
    items: tuple[_Node, ...]


_Node = _Literal | _Characters | _Reference | _Repeat | _Sequence | _Choice


def lark_of_gbnf(text: str) -> str:
    """The same grammar in Lark.

    Raises:
        ValueError: it is not GBNF, names a rule that it lacks, or has no `root`.
    """
    rules = _Parser(text).rules()
    if "root" not in rules:
        raise ValueError("it has no rule `root`, with which the answer begins")
    references = {
        name: {node.name for node in _walk(rule) if isinstance(node, _Reference)} for name, rule in rules.items()
    }
    for name, wanted in references.items():
        for missing in wanted - rules.keys():
            raise ValueError(f"the rule `{name}` uses `{missing}`, which is not defined")
    return _Writer(rules, references).lark()


class _Writer:
    """Rules as Lark, and which of them are terminals.

    Of a grammar with recursion, rules that may be empty (white space, as a rule) are terminals of their own and part of
    no other: one that ends with them would take white space that somebody else needs.
    """

    def __init__(self, rules: dict[str, _Node], references: dict[str, set[str]]) -> None:
        self._rules = rules
        ordered = _acyclic(references)
        self._empty: set[str] = set()
        for name in ordered:
            if self._may_be_empty(rules[name]):
                self._empty.add(name)
        self._regular = "root" in ordered
        self._terminals: set[str] = set()
        for name in ordered:
            apart = set() if self._regular else self._empty
            if references[name] <= self._terminals - apart:
                self._terminals.add(name)
        self._names = {
            name: f"T{number}" if name in self._terminals else f"r{number}" for number, name in enumerate(rules)
        }
        self._runs: list[str] = []  # terminals made of a part of a rule

    def lark(self) -> str:
        lines = [f"start: {self._names['root']}"]
        for name, rule in self._rules.items():
            body = self._terminal(rule) if name in self._terminals else self._rule(rule)
            lines.append(f"{self._names[name]}: {body}")
        return "\n".join([*lines, *self._runs])

    def _may_be_empty(self, node: _Node) -> bool:
        match node:
            case _Literal() | _Characters():
                return False
            case _Reference(name):
                return name in self._empty
            case _Repeat(item, least, _):
                return least == 0 or self._may_be_empty(item)
            case _Sequence(items):
                return all(map(self._may_be_empty, items))
            case _Choice(items):
                return any(map(self._may_be_empty, items))

    def _inside(self, node: _Node) -> bool:
        """Whether a node of a rule can be part of a terminal."""
        names = {part.name for part in _walk(node) if isinstance(part, _Reference)}
        return names <= self._terminals - self._empty

    def _rule(self, node: _Node) -> str:
        """A node of a rule that is no terminal."""
        if not isinstance(node, _Reference) and self._inside(node) and not self._may_be_empty(node):
            self._runs.append(f"S{len(self._runs)}: {self._terminal(node)}")
            return f"S{len(self._runs) - 1}"
        match node:
            case _Reference(name):
                return self._names[name]
            case _Repeat(item, least, most):
                return f"({self._rule(item)}){_times(least, most)}"
            case _Choice(items):
                return "(" + " | ".join(map(self._rule, items)) + ")"
            case _Sequence(items):
                return " ".join(map(self._rule, _runs(items, self._inside))) or '""'
            case _:
                return self._terminal(node)

    def _terminal(self, node: _Node) -> str:
        """A node of a terminal."""
        match node:
            case _Literal(text):
                return json.dumps(text)
            case _Characters():
                return f"/{_class(node)}/"
            case _Reference(name):
                return self._names[name]
            case _Repeat(item, least, most):
                return f"({self._terminal(item)}){_times(least, most)}"
            case _Sequence(items):
                return " ".join(map(self._terminal, items)) or '""'
            case _Choice(items):
                return "(" + " | ".join(map(self._terminal, items)) + ")"


def _runs(items: Iterable[_Node], inside: Callable[[_Node], bool]) -> list[_Node]:
    """The items with those in a row that can be part of a terminal put together."""
    runs: list[_Node] = []
    for joins, group in itertools.groupby(items, inside):
        part = list(group)
        runs.extend([_Sequence(tuple(part))] if joins and len(part) > 1 else part)
    return runs


def _acyclic(references: dict[str, set[str]]) -> list[str]:
    """Rules from which no rule is reached that leads back to itself, each behind those that it uses."""
    users: dict[str, list[str]] = {name: [] for name in references}
    open_references = {name: len(wanted) for name, wanted in references.items()}
    for name, wanted in references.items():
        for used in wanted:
            users[used].append(name)
    ordered = [name for name, count in open_references.items() if count == 0]
    for name in ordered:  # it grows
        for user in users[name]:
            open_references[user] -= 1
            if open_references[user] == 0:
                ordered.append(user)
    return ordered


def _walk(node: _Node) -> Iterator[_Node]:
    pending = [node]
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, _Sequence | _Choice):
            pending.extend(node.items)
        elif isinstance(node, _Repeat):
            pending.append(node.item)


def _times(least: int, most: int | None) -> str:
    plain = {(0, None): "*", (1, None): "+", (0, 1): "?"}.get((least, most))
    return plain or f"{{{least},{'' if most is None else most}}}"


def _class(node: _Characters) -> str:
    if not node.ranges:
        return "(?s:.)" if node.negated else "[^\\x{0}-\\x{10FFFF}]"
    inside = "".join(_code(low) if low == high else f"{_code(low)}-{_code(high)}" for low, high in node.ranges)
    return f"[{'^' if node.negated else ''}{inside}]"


def _code(char: str) -> str:
    return char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):X}}}"


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0

    def rules(self) -> dict[str, _Node]:
        found: dict[str, _Node] = {}
        self._skip(_LINES)
        while self._at < len(self._text):
            name = self._name("the name of a rule")
            self._skip(_SPACE)
            if not self._text.startswith("::=", self._at):
                raise self._wrong("`::=`")
            self._at += 3
            self._skip(_LINES)
            found[name] = self._alternatives(inside=False)
            if self._at < len(self._text) and self._text[self._at] not in "\r\n":
                raise self._wrong("the end of the rule")
            self._skip(_LINES)
        return found

    def _alternatives(self, *, inside: bool) -> _Node:
        options = [self._sequence(inside=inside)]
        while self._text.startswith("|", self._at):
            self._at += 1
            self._skip(_LINES)
            options.append(self._sequence(inside=inside))
        return options[0] if len(options) == 1 else _Choice(tuple(options))

    def _sequence(self, *, inside: bool) -> _Node:
        """Items up to `|`, `)` or, outside of parentheses, the end of the line."""
        space = _LINES if inside else _SPACE
        items: list[_Node] = []
        while True:
            self._skip(space)
            item = self._item()
            if item is None:
                return items[0] if len(items) == 1 else _Sequence(tuple(items))
            self._skip(space)
            items.append(self._repeated(item))

    def _item(self) -> _Node | None:
        char = self._text[self._at : self._at + 1]
        if char == '"':
            return self._literal()
        if char == "[":
            return self._characters()
        if char == ".":
            self._at += 1
            return _Characters((), negated=True)
        if char == "(":
            return self._group()
        if char and (char in "-_" or (char.isascii() and char.isalnum())):
            return _Reference(self._name("a rule"))
        if char in ("", "|", ")", "\r", "\n"):
            return None
        raise self._wrong("a text in quotes, [characters], a rule or ( )")

    def _group(self) -> _Node:
        if self._depth == MAX_DEPTH:
            raise self._wrong(f"no more than {MAX_DEPTH} parentheses inside each other")
        self._depth += 1
        self._at += 1
        node = self._alternatives(inside=True)
        if not self._text.startswith(")", self._at):
            raise self._wrong("`)`")
        self._at += 1
        self._depth -= 1
        return node

    def _repeated(self, item: _Node) -> _Node:
        while True:
            char = self._text[self._at : self._at + 1]
            if char and char in "*+?":
                self._at += 1
                item = _Repeat(item, 1 if char == "+" else 0, 1 if char == "?" else None)
            elif char == "{":
                item = self._counted(item)
            else:
                return item

    def _counted(self, item: _Node) -> _Node:
        match = _COUNT.match(self._text, self._at)
        if match is None:
            raise self._wrong("`{2}`, `{2,}` or `{2,5}`")
        least = int(match[1])
        most = int(match[3]) if match[3] else None if match[2] else least
        if max(least, most or 0) > MAX_REPEAT or (most is not None and most < least) or (match[3] and not match[2]):
            raise self._wrong(f"a range of counts up to {MAX_REPEAT}")
        self._at = match.end()
        return _Repeat(item, least, most)

    def _literal(self) -> _Node:
        self._at += 1
        chars: list[str] = []
        while not self._text.startswith('"', self._at):
            chars.append(self._character())
        self._at += 1
        return _Literal("".join(chars)) if chars else _Sequence(())

    def _characters(self) -> _Node:
        self._at += 1
        negated = self._text.startswith("^", self._at)
        self._at += negated
        ranges: list[tuple[str, str]] = []
        while not self._text.startswith("]", self._at):
            low = high = self._character()
            if self._text.startswith("-", self._at) and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                high = self._character()
            if high < low:
                raise self._wrong("a range whose end is not before its start")
            ranges.append((low, high))
        self._at += 1
        return _Characters(tuple(ranges), negated)

    def _character(self) -> str:
        """The next character of a literal or class."""
        char = self._text[self._at : self._at + 1]
        if char in ("", "\n", "\r"):
            raise self._wrong("its closing sign on the same line")
        self._at += 1
        if char != "\\":
            return char
        kind = self._text[self._at : self._at + 1]
        self._at += 1
        if kind in _CODE_DIGITS:
            return self._coded(_CODE_DIGITS[kind])
        if kind not in _ESCAPES:
            raise self._wrong("a known escape behind `\\`")
        return _ESCAPES[kind]

    def _coded(self, num_digits: int) -> str:
        digits = self._text[self._at : self._at + num_digits]
        code = int(digits, 16) if re.fullmatch(f"[0-9A-Fa-f]{{{num_digits}}}", digits) else -1
        if not (0 <= code < 0xD800 or 0xE000 <= code < 0x110000):
            raise self._wrong(f"a character's code of {num_digits} hexadecimal digits")
        self._at += num_digits
        return chr(code)

    def _name(self, what: str) -> str:
        match = _NAME.match(self._text, self._at)
        if match is None:
            raise self._wrong(what)
        self._at = match.end()
        return match[0]

    def _skip(self, space: re.Pattern[str]) -> None:
        match = space.match(self._text, self._at)
        self._at = match.end() if match else self._at

    def _wrong(self, wanted: str) -> ValueError:
        line = self._text.count("\n", 0, self._at) + 1
        found = self._text[self._at : self._at + 20]
        return ValueError(
            f"line {line}: {wanted} is missing before {found!r}" if found else f"{wanted} is missing at the end"
        )
