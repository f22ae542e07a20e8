"""Random requests over all stages, and logits of every shape, for comparisons with the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from aphrodite.sampling.fields import from_mapping
from aphrodite.sampling.params import SamplingParams

Random = np.random.Generator
Fields = dict[str, Any]


def _between(g: Random, low: float, high: float) -> float:
    """With the two decimals that clients send."""
    return round(float(g.uniform(low, high)), 2)


def _tokens(g: Random, vocab: int, most: int = 8) -> list[int]:
    return g.integers(0, vocab, int(g.integers(1, most + 1))).tolist()


# What switches each stage on, by its name. Probabilities are high enough to leave several survivors mostly.
FIELDS: dict[str, Callable[[Random, int], Fields]] = {
    "grammar": lambda g, v: {"guided_regex": f"(?:t[0-9]*[{''.join(map(str, g.integers(0, 10, 4)))}] |\n+)*"},
    "thinking_token_budget": lambda g, v: {"thinking_token_budget": int(g.integers(0, 4))},
    "logit_bias": lambda g, v: {"logit_bias": {str(t): _between(g, -8, 8) for t in _tokens(g, v)}},
    "min_tokens": lambda g, v: {"min_tokens": int(g.integers(1, 4)), "stop_token_ids": _tokens(g, v)},
    "allowed_token_ids": lambda g, v: {"allowed_token_ids": g.integers(0, v, max(v // 2, 5)).tolist()},
    "token_bans": lambda g, v: {"custom_token_bans": _tokens(g, v, 40), "ban_eos_token": bool(g.integers(2))},
    "token_ban_ranges": lambda g, v: {
        "token_ban_ranges": [[_tokens(g, v), int(g.integers(0, 3)), int(g.integers(0, 3))] for _ in range(3)]
    },
    "bad_words": lambda g, v: {"bad_words_ids": [_tokens(g, v, 3) for _ in range(20)]},
    "penalties": lambda g, v: {
        "repetition_penalty": _between(g, 0.8, 1.5),
        "frequency_penalty": _between(g, -1, 1),
        "presence_penalty": _between(g, -1, 1),
    },
    "temperature": lambda g, v: {"temperature": _between(g, 0.3, 3)},
    "dynatemp": lambda g, v: (
        {"dynatemp_range": _between(g, 0.1, 1.5), "temperature": _between(g, 0.5, 2)}
        if g.integers(2)
        else {
            "dynatemp_low": _between(g, 0.2, 0.9),
            "dynatemp_high": _between(g, 1, 3),
            "dynatemp_exponent": _between(g, 0.5, 2),
        }
    ),
    "top_nsigma": lambda g, v: {"nsigma": _between(g, 0.5, 4)},
    "top_k": lambda g, v: {"top_k": int(g.integers(1, 200))},
    "top_p": lambda g, v: {"top_p": _between(g, 0.3, 0.99)},
    "top_a": lambda g, v: {"top_a": _between(g, 0.01, 1)},
    "min_p": lambda g, v: {"min_p": _between(g, 0.01, 0.3)},
    "tfs": lambda g, v: {"tfs": _between(g, 0.5, 0.99)},
    "eta_cutoff": lambda g, v: {"eta_cutoff": _between(g, 2, 30)},
    "epsilon_cutoff": lambda g, v: {"epsilon_cutoff": _between(g, 2, 30)},
    "typical_p": lambda g, v: {"typical": _between(g, 0.2, 0.99)},
    "quadratic": lambda g, v: {"smoothing_factor": _between(g, 0.05, 1), "smoothing_curve": _between(g, 1, 4)},
    "xtc": lambda g, v: {
        "xtc_probability": _between(g, 0.3, 1),
        "xtc_threshold": _between(g, 0.02, 0.2),
        "xtc_protect": bool(g.integers(2)),
    },
    "skew": lambda g, v: {"skew": _between(g, -1.5, 1.5)},
    "dry": lambda g, v: {
        "dry_multiplier": _between(g, 0.2, 2),
        "dry_base": _between(g, 1, 2.5),
        "dry_allowed_length": int(g.integers(0, 3)),
        "dry_range": int(g.integers(0, 30)),
        "dry_sequence_breakers": ["\n", "7"][: g.integers(0, 3)],
    },
    "ranged_penalties": lambda g, v: {
        **FIELDS["penalties"](g, v),
        "rep_pen_range": int(g.integers(1, 30)),
        "rep_pen_slope": _between(g, 0.2, 1),
    },
    "no_repeat_ngram": lambda g, v: {"no_repeat_ngram_size": int(g.integers(1, 4))},
    "mirostat": lambda g, v: {
        "mirostat": int(g.integers(1, 3)),
        "mirostat_tau": _between(g, 1, 8),
        "mirostat_eta": _between(g, 0.05, 1),
    },
    "adaptive_p": lambda g, v: {"adaptive_target": _between(g, 0.05, 0.9), "adaptive_decay": _between(g, 0, 1)},
}

ORDERED = (
    *("top_p_top_k", "Top_A", "min_p", "TFS", "typ_p", "temperature", "penalties", "dry", "no_repeat_ngram"),
    *("top_n_sigma", "eta_cutoff", "epsilon_cutoff", "quadratic", "xtc", "skew"),
)


def random_order(g: Random) -> Fields:
    """The default, temperature last, or names or numbers of some samplers in any order."""
    kind = g.integers(5)
    if kind == 0:
        return {"temperature_last": True}
    if kind == 1:
        return {"sampler_priority": g.permutation(ORDERED)[: g.integers(1, len(ORDERED))].tolist()}
    if kind == 2:
        return {"sampler_priority": g.permutation(14).tolist()}
    if kind == 3:
        return {"sampler_order": g.permutation(7).tolist()}
    return {}


def random_params(g: Random, vocab: int) -> SamplingParams:
    """A few stages at once, in some order."""
    names = g.choice(list(FIELDS), int(g.integers(1, 7)), replace=False)
    fields: Fields = {}
    for name in names:
        fields.update(FIELDS[name](g, vocab))
    if g.integers(20) == 0:
        fields["temperature"] = 0.0
    return from_mapping({**fields, **random_order(g), "logprobs": 0, "logprobs_mode": "processed"})


LOGITS = ("normal", "wide", "model", "ties", "masked", "single", "flat", "extreme")


def logits_of(g: Random, vocab: int, kind: str) -> np.ndarray:
    """[vocab] float32. `model` looks like a language model's: a heavy head over a body of unlikely tokens."""
    logits = g.normal(size=vocab) * (4 if kind == "wide" else 2)
    if kind == "model":
        logits = g.gumbel(size=vocab) * 1.8 + g.normal() - 4
        logits[g.integers(0, vocab, 30)] += g.exponential(5, 30)
    elif kind == "ties":
        logits = np.round(logits)
    elif kind == "masked":
        logits[g.permutation(vocab)[: vocab * 9 // 10]] = -np.inf
    elif kind == "single":
        kept = logits[7]
        logits[:] = -np.inf
        logits[7] = kept
    elif kind == "flat":
        logits[:] = 3.25
    elif kind == "extreme":
        logits = logits * 1e4
    return logits.astype(np.float32)
