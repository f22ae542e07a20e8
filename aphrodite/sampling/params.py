"""SamplingParams: one table of parameters from which validation, API fields and docs come.

A field here is a row of the table: type, default, bounds, neutral value, aliases, meaning, source.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import msgspec


class Param(NamedTuple):
    """What is known about one sampling parameter beyond its type and default."""

    doc: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    neutral: Any = None
    aliases: tuple[str, ...] = ()
    source: str = ""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one request's tokens are chosen and when it ends."""

    n: Annotated[int, Param("Number of answers.", ge=1, le=128)] = 1
    max_tokens: Annotated[int | None, Param("Most tokens to generate; None: up to the context.", ge=0)] = None
    min_tokens: Annotated[int, Param("End-of-sequence and stop tokens are masked until so many are out.", ge=0)] = 0
    temperature: Annotated[float, Param("Divides the logits; 0 is greedy.", ge=0.0, le=100.0, neutral=1.0)] = 1.0
    top_p: Annotated[float, Param("Nucleus sampling.", gt=0.0, le=1.0, neutral=1.0)] = 1.0
    top_k: Annotated[int, Param("Keep the k most likely.", ge=-1, neutral=0)] = 0
    min_p: Annotated[float, Param("Keep p >= min_p * p_max.", ge=0.0, le=1.0, neutral=0.0)] = 0.0
    repetition_penalty: Annotated[float, Param("CTRL's penalty on prompt and output tokens.", gt=0.0, neutral=1.0)] = 1.0
    frequency_penalty: Annotated[float, Param("Per occurrence in the output.", ge=-2.0, le=2.0, neutral=0.0)] = 0.0
    presence_penalty: Annotated[float, Param("Once for tokens in the output.", ge=-2.0, le=2.0, neutral=0.0)] = 0.0
    logit_bias: Annotated[dict[int, float] | None, Param("Added to the logits of token ids.")] = None
    seed: Annotated[int | None, Param("Same seed, same text; None or -1: random.")] = None
    stop: Annotated[tuple[str, ...], Param("Strings that end the answer.")] = ()
    stop_token_ids: Annotated[tuple[int, ...], Param("Token ids that end the answer.")] = ()
    include_stop_str_in_output: Annotated[bool, Param("Keep the stop string in the text.")] = False
    ignore_eos: Annotated[bool, Param("The end-of-sequence token does not end the answer.")] = False
    skip_special_tokens: Annotated[bool, Param("Leave special tokens out of the text.")] = True
    logprobs: Annotated[int | None, Param("Log-probabilities of so many top tokens (0: only the chosen).", ge=0)] = None
    prompt_logprobs: Annotated[int | None, Param("The same for the prompt's tokens.", ge=0)] = None
    logprobs_mode: Annotated[str, Param("`raw` (before any stage) or `processed` (after all).")] = "raw"
