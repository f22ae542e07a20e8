"""A request's fields and `SamplingParams`: which names there are, and values read, checked and written back.

`validate` and `from_mapping` go by the parameter table. They know no field by name except where two fields meet.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from functools import cache
from typing import Any

import msgspec

from aphrodite.errors import InvalidRequestError, did_you_mean
from aphrodite.sampling.extensions import installed_extensions
from aphrodite.sampling.grammar_fields import read_grammar
from aphrodite.sampling.order import stage_names
from aphrodite.sampling.params import SamplingParams, builtin_table
from aphrodite.sampling.table import ParamRow, check, check_vocabulary, convert, field_error

MAX_TRACED_TOKENS = 4096  # of one request, all its answers together
_FIELDS = frozenset(SamplingParams.__struct_fields__)


@cache
def parameter_table() -> tuple[ParamRow, ...]:
    """All rows: those of `SamplingParams` in its order, then those of installed extensions."""
    return (*builtin_table(), *(row for extension in installed_extensions() for row in extension.rows))


@cache
def canonical_names() -> Mapping[str, str]:
    """Every accepted field name, aliases included, with the name it stands for."""
    return types.MappingProxyType(
        {name: row.name for row in parameter_table() for name in (row.name, *row.param.aliases)}
    )


def parameter_value(params: SamplingParams, row: ParamRow) -> Any:
    """What `params` hold for a row of the table."""
    if row.name in _FIELDS:
        return getattr(params, row.name)
    return params.extensions.get(row.name, row.default)


def from_mapping(fields: Mapping[str, Any], *, base: SamplingParams | None = None) -> SamplingParams:
    """SamplingParams of a request's fields: aliases resolved, clients' spellings made canonical.

    None means "not given". Where a field and its alias disagree the canonical name wins, then the
    alias named first in the table; `stop` and its aliases are joined. Fields not given keep `base`'s.

    Raises:
        InvalidRequestError: an unknown name, or a value of a wrong type or out of bounds.
    """
    fields = _with_kobold_bans(fields)
    names = canonical_names()
    for name in fields:
        if name not in names:
            hint = did_you_mean(name, names, quote="`")
            raise InvalidRequestError(f"`{name}` is not a sampling parameter.{hint}", param=name)
    values: dict[str, Any] = {}
    for row in parameter_table():
        given = [(key, fields[key]) for key in (row.name, *row.param.aliases) if fields.get(key) is not None]
        if not given:
            continue
        if row.kind == "grammar":
            values[row.name] = read_grammar(given)
        elif row.kind == "strings":
            joined = [text for key, value in given for text in convert(row, value, key)]
            values[row.name] = tuple(dict.fromkeys(joined))
        else:
            values[row.name] = convert(row, given[0][1], given[0][0])
        if values[row.name] != row.default:
            check(row, values[row.name], given[0][0])
            if row.kind == "order":
                _check_order(values[row.name], given[0][0])
    base = base or SamplingParams()
    extra = {name: values.pop(name) for name in list(values) if name not in _FIELDS}
    if extra:
        values["extensions"] = {**base.extensions, **extra}
    return msgspec.structs.replace(base, **values)


def to_mapping(params: SamplingParams) -> dict[str, Any]:
    """What differs from the defaults as a request's fields, in JSON's types: `from_mapping` takes it back."""
    fields: dict[str, Any] = msgspec.to_builtins(params, str_keys=True)
    extra: dict[str, Any] = fields.pop("extensions", {})
    fields.pop("reasoning", None)
    return {**fields, **extra}


def _with_kobold_bans(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """KoboldCpp's `banned_tokens` is a list of texts, which are phrases; numbers are token ids everywhere."""
    banned, phrases = fields.get("banned_tokens"), fields.get("banned_strings")
    if not isinstance(banned, list) or not banned or not all(isinstance(text, str) for text in banned):
        return fields
    others = {name: value for name, value in fields.items() if name != "banned_tokens"}
    return {**others, "banned_strings": [*phrases, *banned] if isinstance(phrases, list) else phrases or banned}


def validate(params: SamplingParams, *, vocab_size: int, max_model_len: int, max_logprobs: int) -> None:
    """Check every field against the table and against the model.

    Args:
        vocab_size: token ids must lie below it.
        max_model_len: most positions of a sequence, prompt included.
        max_logprobs: most top tokens that `logprobs` and `prompt_logprobs` may ask for.

    Raises:
        InvalidRequestError: names the field; what is wrong, why, and what to do.
    """
    for name in params.extensions:
        if name not in canonical_names() or name in _FIELDS:
            raise InvalidRequestError(f"`{name}` is no parameter of an installed extension.", param=name)
    for row in parameter_table():
        value = parameter_value(params, row)
        if value is row.default or (value is None and row.nullable):  # most are; defaults are valid
            continue
        check(row, value, row.name)
        if row.param.vocabulary:
            check_vocabulary(row.name, value, vocab_size)
        if row.kind == "order":
            _check_order(value, row.name)
    if params.max_tokens is not None and params.max_tokens > max_model_len:
        raise field_error(
            "max_tokens", params.max_tokens, f"is more than the model's context of {max_model_len} tokens", "Lower it."
        )
    limit = max_model_len if params.max_tokens is None else params.max_tokens
    if params.min_tokens > limit:
        raise field_error(
            "min_tokens", params.min_tokens, f"is more than max_tokens ({limit})", "Lower it or raise max_tokens."
        )
    if params.dynatemp_min > params.dynatemp_max and params.dynamic_temperature is not False:
        raise field_error(
            "dynatemp_min", params.dynatemp_min, f"is more than dynatemp_max ({params.dynatemp_max})", "Lower it."
        )
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(params, name)
        if value is not None and value > max_logprobs:
            raise field_error(name, value, f"is more than this server allows ({max_logprobs})", "Lower it.")
    if params.sampler_trace and params.n * limit > MAX_TRACED_TOKENS:
        raise InvalidRequestError(
            f"`sampler_trace` is set for up to {params.n * limit} tokens (n times max_tokens), which is more than the"
            f" {MAX_TRACED_TOKENS} that one request may trace. Lower max_tokens.",
            param="sampler_trace",
        )


@cache
def orderable_stages() -> frozenset[str]:
    """Names of the stages whose place in the order a request can choose."""
    extensions = {extension.stage.name for extension in installed_extensions() if not extension.stage.constraint}
    return frozenset(row.param.stage for row in builtin_table() if row.param.stage) | extensions


def _check_order(order: tuple[str, ...], name: str) -> None:
    """Every name in a sampler order is one that can be ordered."""
    known = orderable_stages()
    for entry in stage_names(order):
        if entry not in known:
            hint = did_you_mean(entry, known, quote="`") or f" There are {', '.join(sorted(known))}."
            raise field_error(name, entry, "is no sampler that can be put in order", hint.lstrip(), verb="contains")
