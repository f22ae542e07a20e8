"""SamplingParams: one table of parameters from which validation, API fields and docs come.

A field of `SamplingParams` is a row of the table: type, default, bounds, neutral value, aliases,
meaning, source. `validate` and `from_mapping` know no field by name except where two fields meet.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from aphrodite.errors import InvalidRequestError

Kind = Literal["int", "float", "bool", "choice", "ints", "strings", "bias"]


class Param(NamedTuple):
    """What is known about one sampling parameter beyond its type and default.

    Bounds apply to numbers, and to each value of a collection; `vocabulary` says that the integers
    (or keys) are token ids. `off` is another spelling of the default that clients send.
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


class ParamRow(NamedTuple):
    """One row of the parameter table, for validation, generated API fields and docs."""

    name: str
    kind: Kind
    nullable: bool
    default: Any
    choices: tuple[str, ...]
    param: Param


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one request's tokens are chosen and when it ends.

    Creating one checks nothing, so that it can come over the wire at no cost: `validate` checks.
    """

    n: Annotated[int, Param("Number of answers.", ge=1, le=128)] = 1
    max_tokens: Annotated[
        int | None,
        Param(
            "Most tokens to generate; None: up to the context's end.",
            ge=0,
            aliases=("max_completion_tokens", "max_new_tokens", "max_length", "n_predict", "num_predict"),
        ),
    ] = None
    min_tokens: Annotated[
        int,
        Param(
            "End-of-sequence and stop tokens are masked, and stop strings ignored, until so many tokens are out.",
            ge=0,
            neutral=0,
            aliases=("min_length",),
        ),
    ] = 0
    temperature: Annotated[
        float,
        Param("Divides the logits; 0 (below 0.00001) takes the most likely token.", ge=0.0, le=100.0, neutral=1.0),
    ] = 1.0
    top_p: Annotated[
        float,
        Param(
            "Nucleus sampling: keep the fewest most likely tokens whose probabilities sum to at least top_p; "
            "0 keeps the most likely one.",
            ge=0.0,
            le=1.0,
            neutral=1.0,
            source="arXiv 1904.09751",
        ),
    ] = 1.0
    top_k: Annotated[
        int,
        Param("Keep the k most likely tokens; 0 or -1 keeps all.", ge=-1, le=2**31 - 1, neutral=0, off=-1),
    ] = 0
    min_p: Annotated[
        float,
        Param(
            "Keep tokens at least min_p times as likely as the most likely one.",
            ge=0.0,
            le=1.0,
            neutral=0.0,
            source="arXiv 2407.01082",
        ),
    ] = 0.0
    repetition_penalty: Annotated[
        float,
        Param(
            "For tokens seen in prompt or answer: positive logits are divided, negative ones multiplied by it.",
            ge=0.01,
            le=100.0,
            neutral=1.0,
            aliases=("rep_pen", "repeat_penalty"),
            source="arXiv 1909.05858",
        ),
    ] = 1.0
    frequency_penalty: Annotated[
        float,
        Param("Subtracted from a token's logit once per occurrence in the answer.", ge=-2.0, le=2.0, neutral=0.0),
    ] = 0.0
    presence_penalty: Annotated[
        float,
        Param("Subtracted from the logit of every token that occurs in the answer.", ge=-2.0, le=2.0, neutral=0.0),
    ] = 0.0
    logit_bias: Annotated[
        dict[int, float] | None,
        Param("Added to the logits of these token ids.", ge=-100.0, le=100.0, vocabulary=True, max_items=1024),
    ] = None
    seed: Annotated[
        int | None,
        Param(
            "The same seed gives the same text; None or -1: random.",
            ge=-(2**63),
            le=2**63 - 1,
            aliases=("sampler_seed",),
            off=-1,
        ),
    ] = None
    stop: Annotated[
        tuple[str, ...],
        Param(
            "Strings that end the answer.",
            aliases=("stop_sequence", "stop_sequences", "stopping_strings"),
            max_items=64,
            max_length=512,
        ),
    ] = ()
    stop_token_ids: Annotated[
        tuple[int, ...], Param("Token ids that end the answer.", vocabulary=True, max_items=256)
    ] = ()
    include_stop_str_in_output: Annotated[bool, Param("Keep the stop string in the text.")] = False
    ignore_eos: Annotated[bool, Param("The end-of-sequence token does not end the answer.")] = False
    skip_special_tokens: Annotated[bool, Param("Leave special tokens out of the text.")] = True
    logprobs: Annotated[
        int | None,
        Param("Log-probabilities of so many most likely tokens beside the chosen one (0: only the chosen).", ge=0),
    ] = None
    prompt_logprobs: Annotated[int | None, Param("The same for the prompt's tokens.", ge=0)] = None
    logprobs_mode: Annotated[
        Literal["raw", "processed"],
        Param("`raw`: of the model, before any stage; `processed`: of the distribution drawn from."),
    ] = "raw"


@cache
def parameter_table() -> tuple[ParamRow, ...]:
    """All rows in the order of `SamplingParams`."""
    hints = typing.get_type_hints(SamplingParams, include_extras=True)
    return tuple(_row(field.name, field.default, hints[field.name]) for field in msgspec.structs.fields(SamplingParams))


@cache
def canonical_names() -> Mapping[str, str]:
    """Every accepted field name, aliases included, with the name it stands for."""
    return types.MappingProxyType(
        {name: row.name for row in parameter_table() for name in (row.name, *row.param.aliases)}
    )


@cache
def parameter(name: str) -> Param:
    """The table's row of one parameter; KeyError if there is none."""
    return {row.name: row.param for row in parameter_table()}[name]


def from_mapping(fields: Mapping[str, Any], *, base: SamplingParams | None = None) -> SamplingParams:
    """SamplingParams of a request's fields: aliases resolved, clients' spellings made canonical.

    None means "not given". Where a field and its alias disagree the canonical name wins, then the
    alias named first in the table; `stop` and its aliases are joined. Fields not given keep `base`'s.

    Raises:
        InvalidRequestError: an unknown name, or a value of a wrong type or out of bounds.
    """
    names = canonical_names()
    for name in fields:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise InvalidRequestError(f"`{name}` is not a sampling parameter.{hint}", param=name)
    values: dict[str, Any] = {}
    for row in parameter_table():
        given = [(key, fields[key]) for key in (row.name, *row.param.aliases) if fields.get(key) is not None]
        if not given:
            continue
        if row.kind == "strings":
            joined = [text for key, value in given for text in _convert(row, value, key)]
            values[row.name] = tuple(dict.fromkeys(joined))
        else:
            values[row.name] = _convert(row, given[0][1], given[0][0])
        if values[row.name] != row.default:
            _check(row, values[row.name], given[0][0])
    return msgspec.structs.replace(base or SamplingParams(), **values)


def validate(params: SamplingParams, *, vocab_size: int, max_model_len: int, max_logprobs: int) -> None:
    """Check every field against the table and against the model.

    Args:
        vocab_size: token ids must lie below it.
        max_model_len: most positions of a sequence, prompt included.
        max_logprobs: most top tokens that `logprobs` and `prompt_logprobs` may ask for.

    Raises:
        InvalidRequestError: names the field; what is wrong, why, and what to do.
    """
    for row in parameter_table():
        value = getattr(params, row.name)
        if value is None and row.nullable:
            continue
        _check(row, value, row.name)
        if row.param.vocabulary:
            _check_vocabulary(row.name, value, vocab_size)
    if params.max_tokens is not None and params.max_tokens > max_model_len:
        raise _error(
            "max_tokens", params.max_tokens, f"is more than the model's context of {max_model_len} tokens", "Lower it."
        )
    limit = max_model_len if params.max_tokens is None else params.max_tokens
    if params.min_tokens > limit:
        raise _error(
            "min_tokens", params.min_tokens, f"is more than max_tokens ({limit})", "Lower it or raise max_tokens."
        )
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(params, name)
        if value is not None and value > max_logprobs:
            raise _error(name, value, f"is more than this server allows ({max_logprobs})", "Lower it.")


def _row(name: str, default: Any, hint: Any) -> ParamRow:
    annotated, param = typing.get_args(hint)
    members = typing.get_args(annotated)
    nullable = type(None) in members
    bare = next(member for member in members if member is not type(None)) if nullable else annotated
    choices = typing.get_args(bare) if typing.get_origin(bare) is Literal else ()
    kinds: dict[Any, Kind] = {
        int: "int",
        float: "float",
        bool: "bool",
        tuple[str, ...]: "strings",
        tuple[int, ...]: "ints",
        dict[int, float]: "bias",
    }
    return ParamRow(name, "choice" if choices else kinds[bare], nullable, default, choices, param)


def _error(name: str, value: Any, why: str, advice: str, *, verb: str = "is") -> InvalidRequestError:
    return InvalidRequestError(f"`{name}` {verb} {_show(value)}, which {why}. {advice}", param=_field(name))


def _show(value: Any) -> str:
    """A short, bounded picture of what a client sent."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, list | tuple | dict) and len(value) > 4:
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)} items"
    text = repr(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# Conversion: what clients send -> the field's own type. Wrong types raise.


def _convert(row: ParamRow, value: Any, key: str) -> Any:
    converted = _CONVERTERS[row.kind](row, value, key)
    if row.param.off is not None and converted == row.param.off:
        return row.default
    return converted


def _to_int(row: ParamRow, value: Any, key: str) -> int:
    if isinstance(value, float) and value.is_integer():  # JSON does not tell 40.0 from 40
        return int(value)
    _typed(value, int, key, "an integer")
    return int(value)


def _to_float(row: ParamRow, value: Any, key: str) -> float:
    _typed(value, (int, float), key, "a number")
    try:
        return float(value)
    except OverflowError:
        raise _error(key, value, "is not a finite number", "Send a number within the field's bounds.") from None


def _to_plain(row: ParamRow, value: Any, key: str) -> Any:
    return value


def _to_ints(row: ParamRow, value: Any, key: str) -> tuple[int, ...]:
    _typed(value, (list, tuple), key, "a list of integers")
    _check_count(row, value, key)
    return tuple(dict.fromkeys(_to_int(row, item, f"{key}[{index}]") for index, item in enumerate(value)))


def _to_strings(row: ParamRow, value: Any, key: str) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    _typed(value, (list, tuple), key, "a string or a list of strings")
    _check_count(row, value, key)
    return tuple(_typed(item, str, f"{key}[{index}]", "a string") for index, item in enumerate(value))


def _to_bias(row: ParamRow, value: Any, key: str) -> dict[int, float]:
    _typed(value, dict, key, "an object that maps token ids to numbers")
    _check_count(row, value, key)
    bias: dict[int, float] = {}
    for token, amount in value.items():
        bias[_token_key(token, key)] = _to_float(row, amount, f"{key}[{_show(token)}]")
    return bias


def _token_key(token: Any, key: str) -> int:
    """JSON's keys are strings; more than 19 digits cannot be a token id and are not worth parsing."""
    if isinstance(token, str) and len(token) <= 19 and token.isascii() and token.isdigit():
        return int(token)
    if isinstance(token, str):
        raise _error(key, token, "is no token id", "Use token ids (whole numbers) as keys.", verb="contains")
    _typed(token, int, key, "a token id")
    return int(token)


_CONVERTERS: dict[Kind, Callable[[ParamRow, Any, str], Any]] = {
    "int": _to_int,
    "float": _to_float,
    "bool": _to_plain,
    "choice": _to_plain,
    "ints": _to_ints,
    "strings": _to_strings,
    "bias": _to_bias,
}


# Checks: the field's own type and bounds.


def _typed(value: Any, kind: type | tuple[type, ...], name: str, expected: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        given = type(value).__name__
        raise InvalidRequestError(f"`{name}` must be {expected}, but {_show(value)} is {given}.", param=_field(name))
    return value


def _field(name: str) -> str:
    """`stop[3]` and `logit_bias[7]` belong to the fields `stop` and `logit_bias`."""
    return name.partition("[")[0]


def _check(row: ParamRow, value: Any, name: str) -> None:
    """Type and bounds of one field; `name` is what the client called it."""
    if row.kind == "bool":
        _typed(value, bool, name, "true or false")
    elif row.kind == "choice":
        if value not in row.choices:
            raise InvalidRequestError(
                f"`{name}` must be one of {', '.join(row.choices)}, not {_show(value)}.", param=name
            )
    elif row.kind in ("int", "float"):
        _check_number(row, value, name)
    elif row.kind == "strings":
        _check_strings(row, value, name)
    elif row.kind == "ints":
        _typed(value, (list, tuple), name, "a list of integers")
        _check_count(row, value, name)
        for item in value:
            _typed(item, int, name, "a list of integers")
    else:
        _typed(value, dict, name, "a mapping of token ids to numbers")
        _check_count(row, value, name)
        for token, amount in value.items():
            _typed(token, int, name, "a mapping of token ids to numbers")
            _check_number(row, amount, f"{name}[{token}]")


def _check_number(row: ParamRow, value: Any, name: str) -> None:
    if row.kind == "int":
        _typed(value, int, name, "an integer")
    else:
        _typed(value, (int, float), name, "a number")
        if isinstance(value, float) and not math.isfinite(value):
            raise _error(name, value, "is not a finite number", "Send a number within the field's bounds.")
    param = row.param
    inside = (
        (param.ge is None or value >= param.ge)
        and (param.gt is None or value > param.gt)
        and (param.le is None or value <= param.le)
        and (param.lt is None or value < param.lt)
    )
    if not inside:
        raise _error(name, value, f"is out of bounds: it must be {bounds_text(param)}", f"Meaning: {param.doc}")


def bounds_text(param: Param) -> str:
    """The bounds in words, for messages and docs; empty if there are none."""
    bounds = (("at least", param.ge), ("more than", param.gt), ("at most", param.le), ("less than", param.lt))
    return " and ".join(f"{words} {_number(bound)}" for words, bound in bounds if bound is not None)


def _number(bound: float) -> str:
    return str(int(bound)) if float(bound).is_integer() else str(bound)


def _check_count(row: ParamRow, value: Sequence[Any] | Mapping[Any, Any], name: str) -> None:
    limit = row.param.max_items
    if limit is not None and len(value) > limit:
        raise _error(name, value, f"is more than the {limit} items allowed", "Shorten it.")


def _check_strings(row: ParamRow, value: Any, name: str) -> None:
    _typed(value, (list, tuple), name, "a list of strings")
    _check_count(row, value, name)
    limit = row.param.max_length
    for text in value:
        _typed(text, str, name, "a list of strings")
        if not text:
            raise InvalidRequestError(
                f"`{name}` contains an empty string, which would end every answer at once. Leave it out.", param=name
            )
        if limit is not None and len(text) > limit:
            why = f"has {len(text)} characters, more than the {limit} allowed"
            raise _error(name, text, why, "Shorten it.", verb="contains")


def _check_vocabulary(name: str, token_ids: Sequence[int] | Mapping[int, float], vocab_size: int) -> None:
    for token in token_ids:
        if not 0 <= token < vocab_size:
            advice = f"Token ids go from 0 to {vocab_size - 1}."
            raise _error(name, token, "is not a token id of this model", advice, verb="contains")
