"""SamplingParams: one table of parameters from which validation, API fields and docs come.

A field of `SamplingParams` is a row of the table: type, default, bounds, neutral value, aliases,
meaning, source. `validate` and `from_mapping` know no field by name except where two fields meet.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal

import msgspec

from aphrodite.errors import InvalidRequestError
from aphrodite.sampling.table import Kind, Param, ParamRow, check, check_vocabulary, convert, field_error

MAX_TRACED_TOKENS = 4096  # of one request, all its answers together


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
    sampler_trace: Annotated[
        bool,
        Param(
            "The answer tells for every token what each active stage did: candidates before and after, the ten most "
            "likely tokens, and where the chosen one stood."
        ),
    ] = False


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
            joined = [text for key, value in given for text in convert(row, value, key)]
            values[row.name] = tuple(dict.fromkeys(joined))
        else:
            values[row.name] = convert(row, given[0][1], given[0][0])
        if values[row.name] != row.default:
            check(row, values[row.name], given[0][0])
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
        check(row, value, row.name)
        if row.param.vocabulary:
            check_vocabulary(row.name, value, vocab_size)
    if params.max_tokens is not None and params.max_tokens > max_model_len:
        raise field_error(
            "max_tokens", params.max_tokens, f"is more than the model's context of {max_model_len} tokens", "Lower it."
        )
    limit = max_model_len if params.max_tokens is None else params.max_tokens
    if params.min_tokens > limit:
        raise field_error(
            "min_tokens", params.min_tokens, f"is more than max_tokens ({limit})", "Lower it or raise max_tokens."
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
