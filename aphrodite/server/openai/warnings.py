"""What a response says about fields that look as if they were meant to change the text, and do not.

Misspelt names get a suggestion, samplers of other engines that this one lacks are named as such. Fields
that clients send to every server (SillyTavern sends dozens) and that hold their neutral value are silent.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import pydantic

from aphrodite.chat.reasoning import reasoning_marks
from aphrodite.chat.template import ChatTemplate
from aphrodite.sampling.fields import canonical_names
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.presets import SamplerPreset
from aphrodite.server.context import ModelContext
from aphrodite.server.openai.protocol import is_known_field

logger = logging.getLogger(__name__)

MAX_WARNINGS = 20
_MAX_NAME = 64
_CLOSE = 0.8  # of 1: `temprature` and `minp` are close, `truncation_length` and `min_length` are not
_MAX_LOGGED = 1000
_logged: set[str] = set()

# Name: (values that change nothing, what it is). Null, "", [] and false change nothing anywhere.
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "encoder_repetition_penalty": ((1, 0), "a penalty for tokens outside the prompt"),
    "penalty_alpha": ((0,), "contrastive search"),
    "min_keep": ((0, 1), "a least number of candidates for every sampler"),
    "length_penalty": ((1, 0), "a setting of beam search"),
    "early_stopping": ((), "a setting of beam search"),
    "num_beams": ((1,), "beam search"),
    "token_healing": ((), "choosing the prompt's last token again"),
    "max_tokens_second": ((0,), "a limit on tokens per second"),
    "prompt_lookup_num_tokens": ((0,), "drafts from the prompt"),
    "grammar_retain_state": ((), "grammars"),
    "loop_detect_window": ((0, -1), "the loop detection of TabbyAPI"),
    "dry_max_ngram": ((), "a limit of the DRY search, which needs none here"),
    "dry_max_occurrences": ((), "a limit of the DRY search, which needs none here"),
    "dry_early_exit_match_len": ((), "a limit of the DRY search, which needs none here"),
    "phrase_rep_pen": (("off",), "a penalty for repeated phrases"),
    "use_default_badwordsids": ((), "KoboldAI's list of bad words"),
    "logprob_token_ids": ((), "log-probabilities of chosen tokens"),
    "enable_deepconf": ((), "ending an answer by confidence"),
    "top_g": ((0,), "a sampler of NovelAI"),
    "math1_temp": ((1, 0), "a sampler of NovelAI"),
}  # fmt: skip

# Known not to be samplers, and near to the names of some.
_NOT_SAMPLERS = frozenset(
    {"truncation_length", "max_context_length", "num_ctx", "n_probs", "spaces_between_special_tokens"}
)


def field_warnings(
    fields: Mapping[str, Any], endpoint: type[pydantic.BaseModel], preset: SamplerPreset | None = None
) -> list[str]:
    """One sentence a doubtful field, in the request's order; each name goes to the log once."""
    found = _forced(fields, preset) if preset is not None else []
    for name, value in fields.items():
        if value is None or is_known_field(name, endpoint):
            continue
        text = _warning(name, value)
        if text is not None:
            found.append(text)
            _log_once(name, text)
        if len(found) == MAX_WARNINGS:
            break
    return found


def budget_warnings(params: SamplingParams, context: ModelContext, template: ChatTemplate | None = None) -> list[str]:
    """What to say of a budget of reasoning where answers do not mark it.

    Args:
        template: the request's own; None: the model's.
    """
    template = template or context.engine.chat_template
    parser = context.config.reasoning_parser
    if params.thinking_token_budget is None or reasoning_marks(template.traits, parser) is not None:
        return []
    return [f"`thinking_token_budget` has no effect: {template.name} says nothing of reasoning."]


def _forced(fields: Mapping[str, Any], preset: SamplerPreset) -> list[str]:
    names = canonical_names()
    _, lost = preset.forced({name: value for name, value in fields.items() if name in names})
    return [f"`{name}` is set by the preset {preset.name!r}; the request's value was not used." for name in lost]


def _warning(name: str, value: Any) -> str | None:
    if name in _UNSUPPORTED:
        neutral, what = _UNSUPPORTED[name]
        if value in ("", [], {}, False) or value in neutral:
            return None
        return f"`{name}` ({what}) is not supported; it was ignored."
    if name in _NOT_SAMPLERS or len(name) > _MAX_NAME:
        return None
    near = _nearest(name)
    return None if near is None else f"`{name}` is not a known field; it was ignored. Did you mean `{near}`?"


def _nearest(name: str) -> str | None:
    """The parameter whose name differs by spelling only, or by a slip."""
    plain = _plain(name)
    spelt = _plain_names().get(plain)
    if spelt is not None:
        return spelt
    if len(plain) < 4:
        return None
    near = difflib.get_close_matches(plain, _plain_names(), n=1, cutoff=_CLOSE)
    return _plain_names()[near[0]] if near else None


@cache
def _plain_names() -> dict[str, str]:
    return {_plain(name): name for name in canonical_names()}


def _plain(name: str) -> str:
    """`top-p`, `topP` and `Top_P` are one name."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _log_once(name: str, text: str) -> None:
    if name not in _logged and len(_logged) < _MAX_LOGGED:
        _logged.add(name)
        logger.warning("a request's field: %s (said once a name)", text)
