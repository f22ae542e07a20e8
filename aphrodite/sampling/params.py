"""SamplingParams: one table of parameters from which validation, API fields and docs come.

A field of `SamplingParams` is a row of the table: type, default, bounds, neutral value, aliases,
meaning, source. What a request may send for them, installed extensions included, is `fields.py`.
"""

from __future__ import annotations

import typing
from functools import cache
from typing import Annotated, Any, Literal

import msgspec

from aphrodite.sampling.grammar_fields import GRAMMAR_ALIASES
from aphrodite.sampling.table import Grammar, Kind, Param, ParamRow, ReasoningMarks, RepetitionDetection, TokenBanRange


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one request's tokens are chosen and when it ends.

    Creating one checks nothing, so that it can come over the wire at no cost: `fields.validate` checks.
    """

    # Set by hand, for a row's bounds to stand in one line.
    # fmt: off
    n: Annotated[int, Param("Number of answers.", ge=1, le=128)] = 1
    max_tokens: Annotated[int | None, Param(
        "Most tokens to generate; where nothing is said, up to the context's end.",
        ge=0, aliases=(
            "max_completion_tokens", "max_output_tokens", "max_new_tokens", "max_length", "n_predict", "num_predict",
        ),
    )] = None
    min_tokens: Annotated[int, Param(
        "End-of-sequence and stop tokens are masked, and stop strings ignored, until so many tokens are out.",
        ge=0, neutral=0, aliases=("min_length",),
    )] = 0
    thinking_token_budget: Annotated[int | None, Param(
        "Most tokens of reasoning: then the mark that closes it is forced, and the answer goes on behind it. 0 "
        "closes it at once; none or -1: no limit. Without effect on models that do not mark their reasoning.",
        ge=0, le=2**31 - 1, aliases=("thinking_budget", "thinking_budget_tokens"), source="vLLM", off=-1,
    )] = None
    temperature: Annotated[float, Param(
        "Divides the logits; 0 (below 0.00001) takes the most likely token.",
        ge=0.0, le=100.0, neutral=1.0, stage="temperature",
    )] = 1.0
    dynamic_temperature: Annotated[bool | None, Param(
        "False switches dynamic temperature off, whatever its other fields say.",
        stage="temperature",
    )] = None
    dynatemp_min: Annotated[float, Param(
        "Dynamic temperature: the temperature where the model is certain; with dynatemp_max it replaces "
        "temperature. T = min + (max - min) * (H / ln N)^exponent, with H the entropy of the N tokens that are "
        "left. Off where it equals dynatemp_max.",
        ge=0.0, le=100.0, neutral=0.0, aliases=("dynatemp_low", "min_temp"),
        source="kalomaze's dynamic temperature, KoboldCpp 1.52", stage="temperature",
    )] = 0.0
    dynatemp_max: Annotated[float, Param(
        "Dynamic temperature: the temperature where all tokens are equally likely.",
        ge=0.0, le=100.0, neutral=0.0, aliases=("dynatemp_high", "max_temp"), stage="temperature",
    )] = 0.0
    dynatemp_range: Annotated[float, Param(
        "Another form of dynamic temperature: from temperature - range (at least 0) to temperature + range. "
        "dynatemp_min and dynatemp_max come first where they are set.",
        ge=0.0, le=100.0, neutral=0.0, source="KoboldCpp", stage="temperature",
    )] = 0.0
    dynatemp_exponent: Annotated[float, Param(
        "Dynamic temperature: above 1 stays longer near the minimum, below 1 near the maximum.",
        gt=0.0, le=100.0, neutral=1.0, aliases=("temp_exponent",), stage="temperature",
    )] = 1.0
    temperature_last: Annotated[bool, Param(
        "Temperature comes after XTC instead of before the truncations; sampler_priority comes first where it is "
        "set.",
    )] = False
    sampler_priority: Annotated[tuple[str, ...], Param(
        "Order of the samplers: names in any case, or numbers (Aphrodite's 0 to 13; exactly 0 to 6 are "
        "KoboldCpp's). Those that are listed take, in this order, the places that they have between them in the "
        "default order; the others keep theirs.",
        aliases=("sampler_order", "samplers"), max_items=64, max_length=64, in_text=True, kind="order",
    )] = ()
    top_nsigma: Annotated[float, Param(
        "Keep logits of at least max - n * sigma; sigma is the population standard deviation of the logits that "
        "are left (as in llama.cpp and KoboldCpp; the paper has nothing masked before). 0 or -1: off.",
        ge=0.0, le=100.0, neutral=0.0, aliases=("nsigma", "top_n_sigma"), source="arXiv 2411.07641", off=-1,
        stage="top_nsigma",
    )] = 0.0
    top_p: Annotated[float, Param(
        "Nucleus sampling: keep the fewest most likely tokens whose probabilities sum to at least top_p; "
        "0 keeps the most likely one.",
        ge=0.0, le=1.0, neutral=1.0, source="arXiv 1904.09751", stage="top_p",
    )] = 1.0
    top_k: Annotated[int, Param(
        "Keep the k most likely tokens; 0 or -1 keeps all.",
        ge=-1, le=2**31 - 1, neutral=0, off=-1, stage="top_k",
    )] = 0
    min_p: Annotated[float, Param(
        "Keep tokens at least min_p times as likely as the most likely one.",
        ge=0.0, le=1.0, neutral=0.0, source="arXiv 2407.01082", stage="min_p",
    )] = 0.0
    top_a: Annotated[float, Param(
        "Keep tokens with p >= top_a * p_max^2, and the most likely one.",
        ge=0.0, le=100.0, neutral=0.0, source="KoboldAI, BlinkDL's RWKV-LM", stage="top_a",
    )] = 0.0
    tfs: Annotated[float, Param(
        "Tail-free sampling: along the tokens by falling probability, keep those before the normalized absolute "
        "second differences sum to more than tfs. The first token always stays, the last of the vocabulary never; "
        "a flat distribution has no tail.",
        ge=0.0, le=1.0, neutral=1.0, aliases=("tfs_z",), source="Trenton Bricken, Tail Free Sampling, 2019",
        stage="tfs",
    )] = 1.0
    eta_cutoff: Annotated[float, Param(
        "Eta sampling: mask tokens with p < min(eta, sqrt(eta) * exp(-H)), H the entropy; the most likely one "
        "stays. A probability; values above 1 are in units of 0.0001, as in text-generation-webui.",
        ge=0.0, le=10_000.0, neutral=0.0, source="arXiv 2210.15191", stage="eta_cutoff",
    )] = 0.0
    epsilon_cutoff: Annotated[float, Param(
        "Mask tokens with p < epsilon; the most likely one stays. A probability; values above 1 are in units of "
        "0.0001, as in text-generation-webui.",
        ge=0.0, le=10_000.0, neutral=0.0, aliases=("eps_cutoff",), source="arXiv 2210.15191", stage="epsilon_cutoff",
    )] = 0.0
    typical_p: Annotated[float, Param(
        "Locally typical sampling: keep the fewest tokens whose -ln p is nearest to the entropy and whose "
        "probabilities sum to at least typical_p (so the token that crosses it stays).",
        ge=0.0, le=1.0, neutral=1.0, aliases=("typical", "typ_p"), source="arXiv 2202.00666", stage="typical_p",
    )] = 1.0
    smoothing_factor: Annotated[float, Param(
        "Quadratic sampling: with d = logit - max, the logit becomes max - k * d^2 + s * d^3, where "
        "k = factor * (3 - curve) / 2 and s = factor * (curve - 1) / 2.",
        ge=0.0, le=100.0, neutral=0.0, source="oobabooga/text-generation-webui#5403", stage="quadratic",
    )] = 0.0
    smoothing_curve: Annotated[float, Param(
        "Shape of quadratic sampling: 1 is the parabola, more cuts the tail harder.",
        ge=1.0, le=100.0, neutral=1.0, stage="quadratic",
    )] = 1.0
    xtc_probability: Annotated[float, Param(
        "Exclude top choices: with this probability at each token, remove all tokens with p >= xtc_threshold but "
        "the least likely of them.",
        ge=0.0, le=1.0, neutral=0.0, source="oobabooga/text-generation-webui#6335", stage="xtc",
    )] = 0.0
    xtc_threshold: Annotated[float, Param(
        "Probability that makes a token a top choice for XTC; above 0.5 there is never more than one.",
        ge=0.0, le=1.0, stage="xtc",
    )] = 0.1
    xtc_protect: Annotated[bool, Param(
        "XTC never removes special tokens (end of sequence among them) nor tokens that hold a newline.",
        stage="xtc",
    )] = False
    skew: Annotated[float, Param(
        "Along the tokens by falling probability, the cumulative probability C becomes C^(e^skew): above 0 favours "
        "less likely tokens, below 0 more likely ones.",
        ge=-20.0, le=20.0, neutral=0.0, source="exllamav2 1de4cdd", stage="skew",
    )] = 0.0
    repetition_penalty: Annotated[float, Param(
        "For tokens seen in prompt or answer: positive logits are divided, negative ones multiplied by it.",
        ge=0.01, le=100.0, neutral=1.0, aliases=("rep_pen", "repeat_penalty"), source="arXiv 1909.05858",
        stage="penalties",
    )] = 1.0
    frequency_penalty: Annotated[float, Param(
        "Subtracted from a token's logit once per occurrence in the answer.",
        ge=-2.0, le=2.0, neutral=0.0, stage="penalties",
    )] = 0.0
    presence_penalty: Annotated[float, Param(
        "Subtracted from the logit of every token that occurs in the answer.",
        ge=-2.0, le=2.0, neutral=0.0, stage="penalties",
    )] = 0.0
    repetition_penalty_range: Annotated[int, Param(
        "The repetition, frequency and presence penalties look at so many of the last tokens only; 0 or -1: all.",
        ge=-1, le=2**31 - 1, neutral=0, aliases=("rep_pen_range", "penalty_range", "repetition_range", "repeat_last_n"),
        source="KoboldAI", off=-1, stage="penalties",
    )] = 0
    repetition_penalty_slope: Annotated[float, Param(
        "The older half of the range is penalized by 1 + (repetition_penalty - 1) * slope; frequency and "
        "presence penalties are scaled alike. 1: like the newer half.",
        ge=0.0, le=100.0, neutral=1.0, aliases=("rep_pen_slope",), source="KoboldCpp", stage="penalties",
    )] = 1.0
    repetition_decay: Annotated[int, Param(
        "Behind the range the penalties fade to nothing over so many tokens, in a straight line.",
        ge=0, le=2**31 - 1, neutral=0, source="ExLlamaV2, TabbyAPI", stage="penalties",
    )] = 0
    no_repeat_ngram_size: Annotated[int, Param(
        "Mask the tokens that would complete a sequence of so many tokens which prompt or answer hold already; "
        "0 is off.",
        ge=0, le=2**31 - 1, neutral=0, source="Hugging Face transformers", stage="no_repeat_ngram",
    )] = 0
    dry_multiplier: Annotated[float, Param(
        "DRY: a token that would continue a repetition of L tokens loses multiplier * base^(L - allowed_length), "
        "if L is at least allowed_length. Tokens that contain a sequence breaker lose nothing. 0 is off.",
        ge=0.0, le=100.0, neutral=0.0, source="github.com/oobabooga/text-generation-webui/pull/5677, as in llama.cpp",
        stage="dry",
    )] = 0.0
    dry_base: Annotated[float, Param(
        "DRY: growth of the penalty with each token.",
        ge=1.0, le=100.0, off=0.0, stage="dry",
    )] = 1.75
    dry_allowed_length: Annotated[int, Param(
        "DRY: the shortest repetition that is penalized.",
        ge=0, le=2**31 - 1, stage="dry",
    )] = 2
    dry_range: Annotated[int, Param(
        "DRY: only so many of the last tokens are looked at; 0 or -1: all.",
        ge=-1, le=2**31 - 1, aliases=("dry_penalty_last_n",), off=-1, stage="dry",
    )] = 0
    dry_sequence_breakers: Annotated[tuple[str, ...], Param(
        "DRY: texts that end a repetition, whatever tokens they are made of.",
        max_items=128, max_length=40, in_text=True, stage="dry",
    )] = ("\n", ":", '"', "*")
    mirostat_mode: Annotated[int, Param(
        "Mirostat, version 1 or 2, keeps the surprise of the chosen tokens near mirostat_tau. It takes the place "
        "of all truncation (top_k, top_p, min_p, XTC and the like); constraints, penalties and temperature stay "
        "before it. 0 is off.",
        ge=0, le=2, neutral=0, aliases=("mirostat",),
        source="arXiv 2007.14966; surprise as in llama.cpp: of the distribution that was drawn from", stage="mirostat",
    )] = 0
    mirostat_tau: Annotated[float, Param(
        "Mirostat: the surprise to aim at, in bits.",
        ge=0.0, le=100.0, stage="mirostat",
    )] = 5.0
    mirostat_eta: Annotated[float, Param(
        "Mirostat: how fast it corrects itself.",
        ge=0.0, le=10.0, stage="mirostat",
    )] = 0.1
    adaptive_target: Annotated[float, Param(
        "Adaptive-p: tokens of a probability near this are preferred, so that chosen tokens have it on average. "
        "It comes last, in every order; truncate (min_p) before it. Off unless above 0 and below 1.",
        ge=-1.0, le=1.0, neutral=0.0, source="github.com/ggml-org/llama.cpp/pull/17927", stage="adaptive_p",
    )] = 0.0
    adaptive_decay: Annotated[float, Param(
        "Adaptive-p: weight of the past at each token; above 0.99 counts as 0.99.",
        ge=0.0, le=1.0, stage="adaptive_p",
    )] = 0.9
    guidance_scale: Annotated[float, Param(
        "Classifier-free guidance: with c and u the log-probabilities behind the prompt and behind "
        "negative_prompt, u + scale * (c - u) takes the place of the logits, before all stages. Above 1 moves away "
        "from negative_prompt, below 1 towards it; 0 is negative_prompt alone.",
        ge=-100.0, le=100.0, aliases=("cfg_scale",), source="arXiv 2306.17806, as in Hugging Face transformers",
    )] = 1.0
    negative_prompt: Annotated[str, Param(
        "What guidance_scale moves away from: text in place of the prompt; of a chat, its system message instead "
        "of the one that it has. Empty: the prompt's last token alone.",
    )] = ""
    negative_prompt_ids: Annotated[tuple[int, ...], Param(
        "The whole negative prompt as token ids; they come first where both are set.",
        vocabulary=True, max_items=1_048_576, in_text=True, kind="tokens",
    )] = ()
    logit_bias: Annotated[dict[int, float] | None, Param(
        "Added to the logits of these token ids. A list of [id, number] is understood as well, as llama.cpp's clients "
        "send it; false for a number is -100.",
        ge=-100.0, le=100.0, vocabulary=True, max_items=1024,
    )] = None
    allowed_token_ids: Annotated[tuple[int, ...] | None, Param(
        "Only these tokens may be chosen.",
        vocabulary=True, min_items=1, max_items=262_144, in_text=True,
    )] = None
    bad_words: Annotated[tuple[str, ...], Param(
        "Words that the answer must not contain, as tokens: the last token of each is barred where the answer's "
        "tokens before it are the others. Tokenized with and without a leading space.",
        max_items=1024, max_length=256, in_text=True,
    )] = ()
    bad_words_ids: Annotated[tuple[tuple[int, ...], ...], Param(
        "Like bad_words, as lists of token ids.",
        vocabulary=True, max_items=4096, in_text=True,
    )] = ()
    custom_token_bans: Annotated[tuple[int, ...], Param(
        "Tokens that are never chosen; also as text: `1,2,3`.",
        aliases=("banned_tokens",), vocabulary=True, max_items=262_144, in_text=True,
    )] = ()
    token_ban_ranges: Annotated[tuple[TokenBanRange, ...], Param(
        "Entries [token ids, start, length]: the ids are never chosen for the answer's tokens start to "
        "start + length (exclusive), counted from 0.",
        ge=0, le=2**31 - 1, vocabulary=True, max_items=1024, in_text=True,
    )] = ()
    banned_strings: Annotated[tuple[str, ...], Param(
        "Phrases that the answer must not contain, matched on the text across tokens, whatever the case. When one "
        "completes, generation goes back to its first token, which is barred there: up to 32 tokens at a position "
        "and 1,024 times in an answer; what is let through then is named in the choice's `warnings`.",
        aliases=("banned_phrases",), max_items=4096, max_length=256, in_text=True, source="KoboldCpp; arXiv 2510.15061",
    )] = ()
    banned_strings_case_sensitive: Annotated[bool, Param("Match banned_strings with their case.")] = False
    banned_regex: Annotated[tuple[str, ...], Param(
        "The same for regular expressions (the subset of stop_regex; `(?i)` ignores case).",
        max_items=64, max_length=512, in_text=True, regex=True,
    )] = ()
    repetition_detection: Annotated[RepetitionDetection | None, Param(
        "Ends an answer that repeats a pattern of min_pattern_size (1) to max_pattern_size tokens min_count times "
        "in a row; stop_reason is then `repetition_detected`. max_pattern_size 0: off.",
        source="vLLM",
    )] = None
    ban_eos_token: Annotated[bool, Param("The tokens that end an answer by themselves are never chosen.")] = False
    grammar: Annotated[Grammar | None, Param(
        "What the answer has to be: rules in GBNF (`root ::= ...`, as llama.cpp and KoboldCpp take them) or Lark "
        "(`start: ...`). Its aliases say it in other ways: a JSON schema, a regular expression, a list of texts to "
        "choose from. Only tokens that can go on like that are left, and the answer ends where it must.",
        aliases=GRAMMAR_ALIASES, max_length=262_144, source="llguidance",
    )] = None
    seed: Annotated[int | None, Param(
        "The same seed gives the same text; None or -1: random.",
        ge=-(2**63), le=2**63 - 1, aliases=("sampler_seed",), off=-1,
    )] = None
    stop: Annotated[tuple[str, ...], Param(
        "Strings that end the answer.",
        aliases=("stop_sequence", "stop_sequences", "stopping_strings"), max_items=64, max_length=512,
    )] = ()
    stop_regex: Annotated[tuple[str, ...], Param(
        "Regular expressions that end the answer where one of them first matches (a subset without look-around "
        "and back references, linear in time). At most 2,048 characters are held back for a match. Patterns that "
        "would slow others down are refused: those with hundreds of places that one text can half match.",
        max_items=64, max_length=512, in_text=True, regex=True,
        source="koboldcpp#1233; Thompson, doi 10.1145/363347.363387",
    )] = ()
    stop_token_ids: Annotated[tuple[int, ...], Param(
        "Token ids that end the answer.",
        vocabulary=True, max_items=256,
    )] = ()
    include_stop_str_in_output: Annotated[bool, Param("Keep the stop string in the text.")] = False
    ignore_eos: Annotated[bool, Param("The end-of-sequence token does not end the answer.")] = False
    skip_special_tokens: Annotated[bool, Param("Leave special tokens out of the text.")] = True
    logprobs: Annotated[int | None, Param(
        "Log-probabilities of so many most likely tokens beside the chosen one (0: only the chosen).",
        ge=0,
    )] = None
    prompt_logprobs: Annotated[int | None, Param("The same for the prompt's tokens.", ge=0)] = None
    logprobs_mode: Annotated[Literal["raw", "processed"], Param(
        "`raw`: of the model, before any stage; `processed`: of the distribution drawn from.",
    )] = "raw"
    sampler_trace: Annotated[bool, Param(
        "The answer tells for every token what each active stage did: candidates before and after, the ten most "
        "likely tokens, and where the chosen one stood.",
    )] = False
    extensions: dict[str, Any] = {}  # parameters of installed extensions, by name; a Struct copies it
    reasoning: ReasoningMarks | None = None  # of the prompt's answers, set by who makes the prompt; no parameter
    # fmt: on


_NO_ROWS = ("extensions", "reasoning")


@cache
def builtin_table() -> tuple[ParamRow, ...]:
    """The rows of `SamplingParams`, in its order."""
    hints = typing.get_type_hints(SamplingParams, include_extras=True)
    fields = [field for field in msgspec.structs.fields(SamplingParams) if field.name not in _NO_ROWS]
    return tuple(_row(field.name, field.default, hints[field.name]) for field in fields)


@cache
def parameter(name: str) -> Param:
    """The row of one field of `SamplingParams`; KeyError if there is none."""
    return {row.name: row.param for row in builtin_table()}[name]


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
        str: "text",
        tuple[int, ...]: "ints",
        dict[int, float]: "bias",
        tuple[tuple[int, ...], ...]: "sequences",
        tuple[TokenBanRange, ...]: "ranges",
        RepetitionDetection: "loop",
        Grammar: "grammar",
    }
    kind = param.kind or ("choice" if choices else kinds[bare])
    return ParamRow(name, kind, nullable, default, choices, param)
