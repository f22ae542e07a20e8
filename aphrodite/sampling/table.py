"""A row of the parameter table: how a client's value becomes the field's own type, and its checks.

Conversion is generous about spelling (JSON inside a string, whole floats, names in any case) and strict
about meaning: a value that is not of the kind, or out of bounds, is refused with the field's name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from aphrodite.errors import InvalidRequestError
from aphrodite.matching.regex import compile_regexes
from aphrodite.sampling.order import stage_names

Kind = Literal[
    "int", "float", "bool", "choice", "text", "ints", "tokens", "strings", "bias", "sequences", "ranges", "order",
    "loop", "grammar",
]  # fmt: skip
GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "gbnf", "lark"]
GRAMMAR_KINDS: tuple[str, ...] = get_args(GrammarKind)

MAX_LOOP_PATTERN = 256
MAX_LOOP_COUNT = 1024


class TokenBanRange(NamedTuple):
    """Tokens that may not be chosen for the answer's tokens `start` to `start + length` (exclusive)."""

    tokens: tuple[int, ...]
    start: int
    length: int


class RepetitionDetection(NamedTuple):
    """An answer ends that repeats a pattern of `min_pattern_size` to `max_pattern_size` tokens `min_count` times."""

    max_pattern_size: int
    min_pattern_size: int
    min_count: int


class ReasoningMarks(NamedTuple):
    """How the answers to one prompt mark what the model thinks.

    Attributes:
        start, end: the texts around it.
        is_open: the prompt ends inside it; else an answer may begin with `start`.
        last_end: where reasoning may come again, what closes it for good; empty: it comes once.
    """

    start: str
    end: str
    is_open: bool
    last_end: str = ""


class Grammar(NamedTuple):
    """What an answer has to be, from its first character to its last.

    `text` is a JSON schema, a regular expression, a JSON list of the texts to choose from, or rules in GBNF
    (llama.cpp) or Lark (llguidance); of `json_object`, any object, it is empty.
    """

    kind: GrammarKind
    text: str


class Param(NamedTuple):
    """What is known about one sampling parameter beyond its type and default.

    Bounds apply to numbers, and to each value of a collection; `vocabulary` says that the integers
    (or keys) are token ids. `off` is another spelling of the default that clients send, `in_text` says that
    they send lists as text too (JSON, or with commas), `regex` that strings are regular expressions. `stage` is
    the sampler that the parameter belongs to, if its place can be chosen; `kind` is needed where the type does
    not tell it.
    """

    doc: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    neutral: Any = None
    aliases: tuple[str, ...] = ()
    source: str = ""
    off: Any = None
    vocabulary: bool = False
    max_items: int | None = None
    max_length: int | None = None
    min_items: int = 0
    in_text: bool = False
    regex: bool = False
    stage: str = ""
    kind: Kind | None = None


class ParamRow(NamedTuple):
    """One row of the parameter table, for validation, generated API fields and docs."""

    name: str
    kind: Kind
    nullable: bool
    default: Any
    choices: tuple[str, ...]
    param: Param


def field_error(name: str, value: Any, why: str, advice: str, *, verb: str = "is") -> InvalidRequestError:
    return InvalidRequestError(f"`{name}` {verb} {shown(value)}, which {why}. {advice}", param=_field(name))


def shown(value: Any) -> str:
    """A short, bounded picture of what a client sent."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, list | tuple | dict) and len(value) > 4:
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)} items"
    text = repr(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# Conversion: what clients send -> the field's own type. Wrong types raise.


def convert(row: ParamRow, value: Any, key: str) -> Any:
    converted = _CONVERTERS[row.kind](row, value, key)
    if row.param.off is not None and converted == row.param.off:
        return row.default
    return converted


def _to_int(row: ParamRow, value: Any, key: str) -> int:
    if isinstance(value, float) and value.is_integer():  # JSON does not tell 40.0 from 40
        return int(value)
    typed(value, int, key, "an integer")
    return int(value)


def _to_float(row: ParamRow, value: Any, key: str) -> float:
    typed(value, (int, float), key, "a number")
    try:
        return float(value)
    except OverflowError:
        raise field_error(key, value, "is not a finite number", "Send a number within the field's bounds.") from None


def _to_plain(row: ParamRow, value: Any, key: str) -> Any:
    return value


def _list_in_text(row: ParamRow, value: Any) -> Any:
    """A list that was sent as text; what cannot be one stays text, to be refused or taken as one string."""
    if not row.param.in_text or not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return parsed if isinstance(parsed, list) else value
    if row.kind in ("strings", "ranges", "sequences"):
        return value
    parts = [part.strip() for part in value.split(",")] if value.strip() else []
    return [int(part) if part.isascii() and part.isdigit() and len(part) <= 19 else part for part in parts]


def _to_ints(row: ParamRow, value: Any, key: str) -> tuple[int, ...]:
    value = _list_in_text(row, value)
    typed(value, (list, tuple), key, "a list of integers")
    _check_count(row, value, key)
    return tuple(dict.fromkeys(_to_int(row, item, f"{key}[{index}]") for index, item in enumerate(value)))


def _to_tokens(row: ParamRow, value: Any, key: str) -> tuple[int, ...]:
    return _token_list(row, _list_in_text(row, value), key)


def _to_strings(row: ParamRow, value: Any, key: str) -> tuple[str, ...]:
    value = _list_in_text(row, value)
    if isinstance(value, str):
        return (value,)
    typed(value, (list, tuple), key, "a string or a list of strings")
    _check_count(row, value, key)
    return tuple(typed(item, str, f"{key}[{index}]", "a string") for index, item in enumerate(value))


def _to_bias(row: ParamRow, value: Any, key: str) -> dict[int, float]:
    pairs = _bias_pairs(row, value, key)
    _check_count(row, value, key)
    return {_token_key(token, key): _to_float(row, amount, f"{key}[{shown(token)}]") for token, amount in pairs}


def _bias_pairs(row: ParamRow, value: Any, key: str) -> list[tuple[Any, Any]]:
    """OpenAI's object, or llama.cpp's list of [id, number], where false in place of a number bans the token."""
    expected = "an object that maps token ids to numbers"
    if not isinstance(value, list):
        return list(typed(value, dict, key, expected).items())
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise field_error(key, value, "has an entry that is no pair", f"Send {expected}, or a list of [id, number].")
    return [(token, row.param.ge if amount is False else amount) for token, amount in value]


def _to_sequences(row: ParamRow, value: Any, key: str) -> tuple[tuple[int, ...], ...]:
    value = _list_in_text(row, value)
    typed(value, (list, tuple), key, "a list of lists of token ids")
    _check_count(row, value, key)
    return tuple(_token_list(row, item, f"{key}[{index}]") for index, item in enumerate(value))


def _to_ranges(row: ParamRow, value: Any, key: str) -> tuple[TokenBanRange, ...]:
    expected = "a list of [token ids, start, length]"
    value = _list_in_text(row, value)
    typed(value, (list, tuple), key, expected)
    _check_count(row, value, key)
    ranges = []
    for index, item in enumerate(value):
        name = f"{key}[{index}]"
        typed(item, (list, tuple), name, "a list of token ids, start and length")
        if len(item) != 3:
            raise field_error(name, item, "is not [token ids, start, length]", "Send three entries.")
        tokens, start, length = item
        ranges.append(
            TokenBanRange(_token_list(row, tokens, name), _to_int(row, start, name), _to_int(row, length, name))
        )
    return tuple(ranges)


def _token_list(row: ParamRow, value: Any, name: str) -> tuple[int, ...]:
    typed(value, (list, tuple), name, "a list of token ids")
    _check_count(row, value, name)
    return tuple(_to_int(row, token, name) for token in value)


def _to_order(row: ParamRow, value: Any, key: str) -> tuple[str, ...]:
    value = _list_in_text(row, value)
    typed(value, (list, tuple), key, "a list of sampler names or numbers")
    _check_count(row, value, key)
    entries = []
    for index, item in enumerate(value):
        entry = int(item) if isinstance(item, float) and item.is_integer() else item
        entries.append(typed(entry, (str, int), f"{key}[{index}]", "a sampler's name or number"))
    try:
        return stage_names(entries)
    except KeyError as error:
        advice = "Numbers go from 0 to 13; names are clearer."
        raise field_error(key, error.args[0], "is no sampler's number", advice, verb="contains") from None


def _to_loop(row: ParamRow, value: Any, key: str) -> RepetitionDetection | None:
    typed(value, (dict, RepetitionDetection), key, "an object with max_pattern_size, min_pattern_size and min_count")
    given = value._asdict() if isinstance(value, RepetitionDetection) else value
    for name in given:
        if name not in RepetitionDetection._fields:
            advice = f"Its fields are {', '.join(RepetitionDetection._fields)}."
            raise field_error(key, name, "is not one of its fields", advice, verb="contains")
    sizes = {name: _to_int(row, given.get(name, 0), f"{key}[{name}]") for name in RepetitionDetection._fields}
    # Zero is how clients say "off", and a smallest pattern of nothing is one token.
    if sizes["max_pattern_size"] == 0:
        return None
    return RepetitionDetection(**{**sizes, "min_pattern_size": sizes["min_pattern_size"] or 1})


def _token_key(token: Any, key: str) -> int:
    """JSON's keys are strings; more than 19 digits cannot be a token id and are not worth parsing."""
    if isinstance(token, str) and len(token) <= 19 and token.isascii() and token.isdigit():
        return int(token)
    if isinstance(token, str):
        raise field_error(key, token, "is no token id", "Use token ids (whole numbers) as keys.", verb="contains")
    typed(token, int, key, "a token id")
    return int(token)


_CONVERTERS: dict[Kind, Callable[[ParamRow, Any, str], Any]] = {
    "int": _to_int,
    "float": _to_float,
    "bool": _to_plain,
    "choice": _to_plain,
    "text": _to_plain,
    "ints": _to_ints,
    "tokens": _to_tokens,
    "strings": _to_strings,
    "bias": _to_bias,
    "sequences": _to_sequences,
    "ranges": _to_ranges,
    "order": _to_order,
    "loop": _to_loop,
}


# Checks: the field's own type and bounds.


def typed(value: Any, kind: type | tuple[type, ...], name: str, expected: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        given = type(value).__name__
        raise InvalidRequestError(f"`{name}` must be {expected}, but {shown(value)} is {given}.", param=_field(name))
    return value


def _field(name: str) -> str:
    """`stop[3]` and `logit_bias[7]` belong to the fields `stop` and `logit_bias`."""
    return name.partition("[")[0]


def check(row: ParamRow, value: Any, name: str) -> None:
    """Type and bounds of one field; `name` is what the client called it."""
    if row.kind == "bool":
        typed(value, bool, name, "true or false")
    elif row.kind == "text":
        _check_text(row, value, name)
    elif row.kind == "choice":
        if value not in row.choices:
            raise InvalidRequestError(
                f"`{name}` must be one of {', '.join(row.choices)}, not {shown(value)}.", param=name
            )
    elif row.kind in ("int", "float"):
        _check_number(row, value, name)
    elif row.kind in ("strings", "order"):
        _check_strings(row, value, name)
    elif row.kind in ("sequences", "ranges"):
        _check_token_lists(row, value, name)
    elif row.kind == "loop":
        _check_loop(row, value, name)
    elif row.kind == "grammar":
        _check_grammar(row, value, name)
    elif row.kind in ("ints", "tokens"):
        typed(value, (list, tuple), name, "a list of integers")
        _check_count(row, value, name)
        for item in value:
            typed(item, int, name, "a list of integers")
    else:
        typed(value, dict, name, "a mapping of token ids to numbers")
        _check_count(row, value, name)
        for token, amount in value.items():
            typed(token, int, name, "a mapping of token ids to numbers")
            _check_number(row, amount, f"{name}[{token}]")


def _check_number(row: ParamRow, value: Any, name: str) -> None:
    if row.kind == "int":
        typed(value, int, name, "an integer")
    else:
        typed(value, (int, float), name, "a number")
        if isinstance(value, float) and not math.isfinite(value):
            raise field_error(name, value, "is not a finite number", "Send a number within the field's bounds.")
    param = row.param
    inside = (
        (param.ge is None or value >= param.ge)
        and (param.gt is None or value > param.gt)
        and (param.le is None or value <= param.le)
        and (param.lt is None or value < param.lt)
    )
    if not inside:
        raise field_error(name, value, f"is out of bounds: it must be {bounds_text(param)}", f"Meaning: {param.doc}")


def bounds_text(param: Param) -> str:
    """The bounds in words, for messages and docs; empty if there are none."""
    bounds = (("at least", param.ge), ("more than", param.gt), ("at most", param.le), ("less than", param.lt))
    return " and ".join(f"{words} {_number(bound)}" for words, bound in bounds if bound is not None)


def _number(bound: float) -> str:
    return str(int(bound)) if float(bound).is_integer() else str(bound)


def _check_count(row: ParamRow, value: Sequence[Any] | Mapping[Any, Any], name: str) -> None:
    if len(value) < row.param.min_items:
        raise InvalidRequestError(f"`{name}` is empty, which would allow nothing. Leave it out.", param=_field(name))
    limit = row.param.max_items
    if limit is not None and len(value) > limit:
        raise field_error(name, value, f"is more than the {limit} items allowed", "Shorten it.")


def _check_strings(row: ParamRow, value: Any, name: str) -> None:
    typed(value, (list, tuple), name, "a list of strings")
    _check_count(row, value, name)
    limit = row.param.max_length
    for text in value:
        typed(text, str, name, "a list of strings")
        if not text:
            raise InvalidRequestError(
                f"`{name}` contains an empty string, which matches everywhere. Leave it out.", param=_field(name)
            )
        if limit is not None and len(text) > limit:
            why = f"has {len(text)} characters, more than the {limit} allowed"
            raise field_error(name, text, why, "Shorten it.", verb="contains")
    if row.param.regex and value:
        try:
            compile_regexes(tuple(value))
        except InvalidRequestError as error:
            raise InvalidRequestError(f"`{name}`: {error}", param=_field(name)) from None


def _check_text(row: ParamRow, value: Any, name: str) -> None:
    typed(value, str, name, "text")
    limit = row.param.max_length
    if limit is not None and len(value) > limit:
        raise field_error(name, value, f"is longer than the {limit} characters allowed", "Shorten it.")


def _check_loop(row: ParamRow, value: Any, name: str) -> None:
    typed(value, RepetitionDetection, name, "a RepetitionDetection")
    for part, number in value._asdict().items():
        typed(number, int, f"{name}[{part}]", "an integer")
        least, most = (2, MAX_LOOP_COUNT) if part == "min_count" else (1, MAX_LOOP_PATTERN)
        if not least <= number <= most:
            why = f"is out of bounds: it must be {least} to {most}"
            raise field_error(f"{name}[{part}]", number, why, f"Meaning: {row.param.doc}")
    if value.min_pattern_size > value.max_pattern_size:
        raise field_error(name, value, "has a smallest pattern above its largest", "Swap them.")


def _check_grammar(row: ParamRow, value: Any, name: str) -> None:
    typed(value, Grammar, name, "a Grammar")
    if value.kind not in GRAMMAR_KINDS:
        raise InvalidRequestError(
            f"`{name}` must be of one of the kinds {', '.join(GRAMMAR_KINDS)}, not {shown(value.kind)}.", param=name
        )
    _check_text(row, value.text, name)
    if not value.text and value.kind != "json_object":
        raise InvalidRequestError(f"`{name}` is empty, which would allow nothing. Leave it out.", param=name)


def _check_token_lists(row: ParamRow, value: Any, name: str) -> None:
    """Lists of token ids, alone or with the positions they are banned at."""
    typed(value, (list, tuple), name, "a list of lists")
    _check_count(row, value, name)
    for item in value:
        for number in (item.start, item.length) if isinstance(item, TokenBanRange) else ():
            _check_number(row, typed(number, int, name, "made of whole numbers"), name)
        tokens = item.tokens if isinstance(item, TokenBanRange) else typed(item, (list, tuple), name, "a list of lists")
        if not tokens:
            raise InvalidRequestError(
                f"`{name}` contains an empty list of token ids. Leave it out.", param=_field(name)
            )
        _check_count(row, tokens, name)
        for token in tokens:
            typed(token, int, name, "made of token ids")


def check_vocabulary(name: str, value: Any, vocab_size: int) -> None:
    """Every token id of a collection, however nested, lies below `vocab_size`."""
    for item in value:
        if isinstance(item, tuple | list):
            check_vocabulary(name, item.tokens if isinstance(item, TokenBanRange) else item, vocab_size)
    for token in (item for item in value if not isinstance(item, tuple | list)):
        if not 0 <= token < vocab_size:
            advice = f"Token ids go from 0 to {vocab_size - 1}."
            raise field_error(name, token, "is not a token id of this model", advice, verb="contains")
