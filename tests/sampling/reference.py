"""The definition of sampling: one row at a time, in float64, written from the sources and sharing nothing with
the engine but the names of the parameters.

Every stage is one function of a row's logits (float64 [vocab], -inf = masked), entered in `STAGES`. Beside
their result the functions say how close the nearest decision was (`Row.decide`), so that a comparison in
float32 can tell a wrong answer from a rounding difference.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from reference_noise import gumbel, uniform

from aphrodite.sampling.params import SamplingParams

_MASS = 20.0  # sums of probabilities are this much more exact than logits

CONSTRAINTS = [
    *(
        "grammar",
        "thinking_token_budget",
        "logit_bias",
        "min_tokens",
        "allowed_token_ids",
        "token_bans",
        "token_ban_ranges",
        "bad_words",
    ),
]
ORDER = [
    *("dry", "penalties", "no_repeat_ngram", "temperature", "dynatemp", "top_nsigma", "top_k", "top_p", "top_a"),
    *("min_p", "tfs", "eta_cutoff", "epsilon_cutoff", "typical_p", "quadratic", "xtc", "skew"),
]
SELECTORS = ["mirostat", "adaptive_p"]  # after all others in every order
MIROSTAT_REPLACES = {*("top_nsigma", "top_k", "top_p", "top_a", "min_p", "tfs", "eta_cutoff", "epsilon_cutoff")} | {
    *("typical_p", "xtc")
}
GREEDY_KEEPS = {*CONSTRAINTS, "dry", "penalties", "no_repeat_ngram"}


@dataclass
class Row:
    """A request: what was written, its parameters, and what the model's tokenizer says of special tokens."""

    prompt: list[int]
    output: list[int]
    seed: int
    params: SamplingParams
    eos: frozenset[int] = frozenset()
    protected: frozenset[int] = frozenset()  # newlines and special tokens
    text: Callable[[int], bytes] = bytes  # of a token
    encode: Callable[[bytes], list[int]] = list  # the tokens of a text, in the middle of another
    state: dict[str, Any] = field(default_factory=dict)  # of stages that remember something
    margin: float = math.inf

    @property
    def position(self) -> int:
        """Of the token to be chosen."""
        return len(self.prompt) + len(self.output)

    def decide(self, distances: Any, scale: float = 1.0) -> None:
        """Note the nearest of some distances (logits, or probabilities with scale _MASS) to a threshold."""
        self.margin = min(self.margin, float(np.min(np.abs(distances), initial=math.inf)) * scale)


@dataclass
class Outcome:
    """`logits` after all stages (float64, -inf = masked), survivors, the token, and the closest decision."""

    logits: np.ndarray
    survivors: set[int]
    token: int | None
    margin: float

    @property
    def probabilities(self) -> np.ndarray:
        return softmax(self.logits)


Stage = Callable[[np.ndarray, Row], np.ndarray]
STAGES: dict[str, Stage] = {}


def stage(function: Stage) -> Stage:
    STAGES[function.__name__] = function
    return function


def sample(raw: np.ndarray, row: Row) -> Outcome:
    """What one row's float32 `raw` logits [vocab] lead to."""
    logits = raw.astype(np.float64)
    row.margin = math.inf
    if np.isnan(logits).any() or np.isposinf(logits).any():
        return Outcome(logits, set(), None, math.inf)
    greedy = row.params.temperature < 1e-5
    for name in order_of(row.params):
        if np.isfinite(logits).any() and not (greedy and name not in GREEDY_KEEPS):
            logits = STAGES[name](logits, row)
    survivors = left(logits)
    if not len(survivors):
        return Outcome(logits, set(), None, math.inf)
    scores = logits[survivors] - logits.max()
    if not greedy:
        scores = scores + gumbel(row.seed, row.position, survivors)
    best = np.argsort(-scores, kind="stable")[:2]
    if len(best) > 1 and not (greedy and scores[best[0]] == scores[best[1]]):
        row.decide((scores[best[0]] - scores[best[1]]) / _scale(logits))
    return Outcome(logits, set(survivors.tolist()), int(survivors[best[0]]), row.margin)


def order_of(params: SamplingParams) -> list[str]:
    """Constraints first, then the steps in the request's order, selectors last; dynatemp is where temperature is."""
    steps = [name for name in ORDER if name != "dynatemp"]
    if params.sampler_priority:
        named = [name for name in params.sampler_priority if name in steps]
        places = sorted(steps.index(name) for name in named)
        for place, name in zip(places, named, strict=True):
            steps[place] = name
    elif params.temperature_last:
        steps.remove("temperature")
        steps.insert(steps.index("xtc") + 1, "temperature")
    steps.insert(steps.index("temperature"), "dynatemp")
    if params.mirostat_mode:
        steps = [name for name in steps if name not in MIROSTAT_REPLACES]
    return [name for name in (*CONSTRAINTS, *steps, *SELECTORS) if name in STAGES]


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def left(logits: np.ndarray) -> np.ndarray:
    return np.flatnonzero(logits > -math.inf)


def entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def ranked(keys: np.ndarray) -> np.ndarray:
    """All token ids by (key descending, id ascending)."""
    return np.argsort(-keys, kind="stable")


def masked(logits: np.ndarray, drop: Any) -> np.ndarray:
    return np.where(drop, -math.inf, logits)


def only(logits: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """All but the tokens `kept` masked."""
    result = np.full_like(logits, -math.inf)
    result[kept] = logits[kept]
    return result


def _scale(logits: np.ndarray) -> float:
    """float32 is coarser where numbers are large."""
    return max(1.0, float(np.abs(logits[left(logits)]).max()) / 16)


def _threshold(logits: np.ndarray, lowest: float, row: Row) -> np.ndarray:
    """Keep logits of at least `lowest`, and the highest whatever it is."""
    tokens = left(logits)
    if lowest >= logits.max():
        row.decide(((lowest - logits[tokens])[logits[tokens] < logits.max()]) / _scale(logits))
        return masked(logits, logits < logits.max())
    row.decide((logits[tokens] - lowest) / _scale(logits))
    return masked(logits, logits < lowest)


def _prefix(logits: np.ndarray, order: np.ndarray, count: int, keys: np.ndarray, row: Row) -> np.ndarray:
    """Keep the first `count` of `order`; equal keys are decided by token id, so they are no close decision."""
    count = max(count, 1)
    if count < len(order) and keys[order[count - 1]] != keys[order[count]]:
        row.decide((keys[order[count - 1]] - keys[order[count]]) / _scale(logits))
    return only(logits, order[:count])


# Constraints


@stage
def thinking_token_budget(logits: np.ndarray, row: Row) -> np.ndarray:
    """The prompt ends inside reasoning, which tokens 4 and 3 in a row close."""
    budget = row.params.thinking_token_budget
    if budget is None or len(row.output) < budget:
        return logits
    thought = row.output[:budget]
    if (4, 3) in pairwise(thought):
        return logits
    closing = [3] if thought[-1:] == [4] else [4, 3]
    number = len(row.output) - budget
    return only(logits, np.array(closing[number : number + 1])) if number < len(closing) else logits


@stage
def logit_bias(logits: np.ndarray, row: Row) -> np.ndarray:
    for token, bias in (row.params.logit_bias or {}).items():
        logits[token] += bias
    return logits


@stage
def min_tokens(logits: np.ndarray, row: Row) -> np.ndarray:
    if len(row.output) < row.params.min_tokens:
        logits[list(row.params.stop_token_ids)] = -math.inf
        if not row.params.ignore_eos:
            logits[list(row.eos)] = -math.inf
    return logits


@stage
def grammar(logits: np.ndarray, row: Row) -> np.ndarray:
    """Regular expressions of the form `(...)*` that each token of the cases matches alone, or not at all."""
    if row.params.grammar is None:
        return logits
    endings = (frozenset() if row.params.ignore_eos else row.eos).union(row.params.stop_token_ids)
    if endings.intersection(row.output):
        return only(logits, np.array([], int))
    fits = re.compile(row.params.grammar.text).fullmatch
    plain = [token for token in range(3, len(logits)) if fits(row.text(token).decode())]
    return only(logits, np.array(sorted(endings.union(plain))))


@stage
def allowed_token_ids(logits: np.ndarray, row: Row) -> np.ndarray:
    allowed = row.params.allowed_token_ids
    return logits if allowed is None else only(logits, np.array(allowed))


@stage
def token_bans(logits: np.ndarray, row: Row) -> np.ndarray:
    logits[list(row.params.custom_token_bans)] = -math.inf
    if row.params.ban_eos_token:
        logits[list(row.eos)] = -math.inf
    return logits


@stage
def token_ban_ranges(logits: np.ndarray, row: Row) -> np.ndarray:
    for tokens, start, length in row.params.token_ban_ranges:
        if start <= len(row.output) < start + length:
            logits[list(tokens)] = -math.inf
    return logits


@stage
def bad_words(logits: np.ndarray, row: Row) -> np.ndarray:
    for *opening, last in row.params.bad_words_ids:
        if not opening or row.output[-len(opening) :] == opening:
            logits[last] = -math.inf
    return logits


# Penalties


@stage
def penalties(logits: np.ndarray, row: Row) -> np.ndarray:
    """Repetition (arXiv 1909.05858) over prompt and answer; OpenAI's frequency and presence over the answer.

    Within a range (all of the history by default) its older half counts `slope` as much (KoboldCpp), and behind it
    everything fades in a straight line (ExLlamaV2).
    """
    p = row.params
    history = row.prompt + row.output
    size = min(p.repetition_penalty_range, len(history)) if p.repetition_penalty_range > 0 else len(history)
    newest_first = list(enumerate(reversed(history)))

    def weight(distance: int) -> float:
        if distance < size:
            return 1.0 if distance < size - size // 2 else p.repetition_penalty_slope
        fade = p.repetition_decay if p.repetition_penalty_range > 0 else 0
        return p.repetition_penalty_slope * (1 - (distance - size) / fade) if distance < size + fade else 0.0

    for token in set(history):
        last = weight(next(distance for distance, seen in newest_first if seen == token))
        r = max(1 + (p.repetition_penalty - 1) * last, 0.01)
        logits[token] = logits[token] / r if logits[token] > 0 else logits[token] * r
    for token in set(row.output):
        weights = [weight(distance) for distance, seen in newest_first[: len(row.output)] if seen == token]
        logits[token] -= p.frequency_penalty * sum(weights) + p.presence_penalty * weights[0]
    return logits


@stage
def no_repeat_ngram(logits: np.ndarray, row: Row) -> np.ndarray:
    """transformers: no n-gram comes twice; undone if nothing would be left."""
    size = row.params.no_repeat_ngram_size
    history = row.prompt + row.output
    if size == 0 or len(history) < size:
        return logits
    opening = history[len(history) - size + 1 :]
    after = logits.copy()
    for first in range(len(history) - size + 1):
        if history[first : first + size - 1] == opening:
            after[history[first + size - 1]] = -math.inf
    return after if np.isfinite(after).any() else logits


@cache
def dry_breakers(
    breakers: tuple[str, ...], vocab: int, text: Callable[[int], bytes], encode: Callable[[bytes], list[int]]
) -> dict[int, set[tuple[int, ...]]]:
    """Tails by head; the empty tail stands for a token that contains a whole breaker."""
    heads: dict[int, set[tuple[int, ...]]] = {}
    pieces = [text(token) for token in range(vocab)]
    for breaker in (name.encode() for name in breakers):
        for token, piece in enumerate(pieces):
            if breaker in piece:
                heads.setdefault(token, set()).add(())
                continue
            for count in range(1, len(breaker)):
                if piece.endswith(breaker[:count]):
                    heads.setdefault(token, set()).add(tuple(encode(breaker[count:])))
    return heads


@stage
def dry(logits: np.ndarray, row: Row) -> np.ndarray:
    """DRY as llama.cpp has it, in quadratic time: every earlier position is compared with the end."""
    p = row.params
    history = row.prompt + row.output
    history = history[-p.dry_range :] if p.dry_range > 0 else history
    count = len(history)
    if p.dry_multiplier == 0 or count <= p.dry_allowed_length:
        return logits
    heads = dry_breakers(p.dry_sequence_breakers, len(logits), row.text, row.encode)
    limit = count
    for back in range(count):
        fitting = [
            len(tail)
            for tail in heads.get(history[count - 1 - back], ())
            if len(tail) <= back and tuple(history[count - back : count - back + len(tail)]) == tail
        ]
        if fitting:
            limit = back - max(fitting)
            break
    if limit < p.dry_allowed_length:
        return logits
    matches: dict[int, int] = {}
    for end in range(count - 1):
        length = 0
        while length <= end and history[end - length] == history[count - 1 - length]:
            length += 1
        matches[history[end + 1]] = max(matches.get(history[end + 1], 0), min(length, limit))
    most = int(88.7228391 / math.log(p.dry_base)) if p.dry_base > 1.000001 else 2**31
    for token, length in matches.items():
        if length >= p.dry_allowed_length and () not in heads.get(token, set()):
            penalty = p.dry_multiplier * p.dry_base ** min(length - p.dry_allowed_length, most)
            logits[token] -= min(penalty, 1e6)
    return logits


# Shape


def _dynamic(params: SamplingParams) -> tuple[float, float] | None:
    if params.dynamic_temperature is False:
        return None
    if params.dynatemp_max != params.dynatemp_min:
        return params.dynatemp_min, params.dynatemp_max
    t, r = params.temperature, params.dynatemp_range
    return (max(0.0, t - r), t + r) if r else None


@stage
def temperature(logits: np.ndarray, row: Row) -> np.ndarray:
    return logits if _dynamic(row.params) else logits / row.params.temperature


@stage
def dynatemp(logits: np.ndarray, row: Row) -> np.ndarray:
    """KoboldCpp 1.52: T = min + (max - min) * (H / ln N)^exponent."""
    bounds = _dynamic(row.params)
    if bounds is None:
        return logits
    count = len(left(logits))
    share = entropy(softmax(logits)) / math.log(count) if count > 1 else 0.0
    low, high = bounds
    return logits / max(1e-5, low + (high - low) * min(max(share, 0.0), 1.0) ** row.params.dynatemp_exponent)


@stage
def quadratic(logits: np.ndarray, row: Row) -> np.ndarray:
    """oobabooga/text-generation-webui#5403."""
    f, c = row.params.smoothing_factor, row.params.smoothing_curve
    if f == 0:
        return logits
    result = np.full_like(logits, -math.inf)
    d = logits[left(logits)] - logits.max()
    result[left(logits)] = logits.max() - f * (3 - c) / 2 * d**2 + f * (c - 1) / 2 * d**3
    return result


@stage
def skew(logits: np.ndarray, row: Row) -> np.ndarray:
    """exllamav2 1de4cdd draws with random^(e^-skew), so C of the sorted tokens becomes C^(e^skew)."""
    if row.params.skew == 0:
        return logits
    order, a = ranked(logits)[: len(left(logits))], math.exp(row.params.skew)
    p = softmax(logits)[order]
    c = np.minimum(np.cumsum(p), 1.0)
    with np.errstate(divide="ignore"):
        steps = c**a * -np.expm1(a * np.log1p(-p / c))  # C^a - (C - p)^a, exact where p is too small to change C
    result = np.full_like(logits, -math.inf)
    result[order] = np.log(np.maximum(steps, 1e-37))
    return result


# Truncation


@stage
def top_k(logits: np.ndarray, row: Row) -> np.ndarray:
    k = row.params.top_k
    return _prefix(logits, ranked(logits), k, logits, row) if 0 < k < len(logits) else logits


@stage
def top_p(logits: np.ndarray, row: Row) -> np.ndarray:
    """arXiv 1904.09751: the fewest tokens whose mass is at least p."""
    p = row.params.top_p
    if p == 1:
        return logits
    order = ranked(logits)
    mass = np.cumsum(softmax(logits)[order])
    row.decide(mass - p, _MASS)
    return _prefix(logits, order, int((mass < p).sum()) + 1, logits, row)


@stage
def min_p(logits: np.ndarray, row: Row) -> np.ndarray:
    """arXiv 2407.01082."""
    p = row.params.min_p
    return _threshold(logits, logits.max() + math.log(p), row) if p > 0 else logits


@stage
def top_a(logits: np.ndarray, row: Row) -> np.ndarray:
    """p >= a * p_max^2."""
    a = row.params.top_a
    if a == 0:
        return logits
    return _threshold(logits, logits.max() + math.log(a * softmax(logits).max()), row)


@stage
def top_nsigma(logits: np.ndarray, row: Row) -> np.ndarray:
    """arXiv 2411.07641, with the deviation of what is left."""
    n = row.params.top_nsigma
    return _threshold(logits, logits.max() - n * logits[left(logits)].std(), row) if n > 0 else logits


@stage
def tfs(logits: np.ndarray, row: Row) -> np.ndarray:
    """Tail Free Sampling, Trenton Bricken 2019: centred, so the first token stays and the last goes."""
    z = row.params.tfs
    if z == 1 or len(logits) < 3:
        return logits
    order = ranked(logits)
    p = softmax(logits)[order]
    curvature = np.abs(np.diff(np.diff(p)))
    if curvature.sum() <= 1e-9 * p[0]:
        return logits
    reached = np.cumsum(curvature) / curvature.sum()
    row.decide(reached - z, _MASS)
    keep = np.concatenate([[True], reached <= z, [False]])
    return _prefix(logits, order, int(keep.sum()), logits, row)


def _cutoff(value: float) -> float:
    return value * 1e-4 if value > 1 else value


@stage
def epsilon_cutoff(logits: np.ndarray, row: Row) -> np.ndarray:
    """arXiv 2210.15191."""
    epsilon = _cutoff(row.params.epsilon_cutoff)
    if epsilon == 0:
        return logits
    return _threshold(logits, logits.max() + math.log(epsilon / softmax(logits).max()), row)


@stage
def eta_cutoff(logits: np.ndarray, row: Row) -> np.ndarray:
    """arXiv 2210.15191."""
    eta = _cutoff(row.params.eta_cutoff)
    if eta == 0:
        return logits
    p = softmax(logits)
    lowest = min(eta, math.sqrt(eta) * math.exp(-entropy(p)))
    return _threshold(logits, logits.max() + math.log(lowest / p.max()), row)


@stage
def typical_p(logits: np.ndarray, row: Row) -> np.ndarray:
    """arXiv 2202.00666: the fewest most typical tokens whose mass is at least tau."""
    tau = row.params.typical_p
    if tau == 1:
        return logits
    p = softmax(logits)
    tokens = left(logits)
    log_p = logits - logits.max() + math.log(p.max())
    keys = np.full_like(logits, -math.inf)
    keys[tokens] = -np.abs(-log_p[tokens] - entropy(p))
    order = ranked(keys)
    mass = np.cumsum(p[order])
    row.decide(mass - tau, _MASS)
    return _prefix(logits, order, int((mass < tau).sum()) + 1, keys, row)


@stage
def xtc(logits: np.ndarray, row: Row) -> np.ndarray:
    """oobabooga/text-generation-webui#6335: of the tokens at or above the threshold only the last stays."""
    coin = uniform(row.seed, row.position, 1, np.array([0]))[0]
    if row.params.xtc_probability == 0:
        return logits
    row.decide(coin - row.params.xtc_probability, _MASS)
    if coin >= row.params.xtc_probability:
        return logits
    threshold = row.params.xtc_threshold
    p = softmax(logits)
    order = ranked(logits)
    tops = order[np.isfinite(logits[order]) & (p[order] >= threshold)].tolist()
    if threshold > 0:
        log_p = logits[left(logits)] - logits.max() + math.log(p.max())
        row.decide((log_p - math.log(threshold)) / _scale(logits))
    protected = row.protected if row.params.xtc_protect else frozenset()
    logits = logits.copy()
    for token in tops[:-1]:
        if token not in protected:
            logits[token] = -math.inf
    return logits


# Selection. What these remember is made from the row's own earlier calls, so every token's call has to be made.


def _steered(name: str, row: Row, first: float) -> float:
    """What the row's last token led to, as noted when it was chosen; `first` before any."""
    return float(row.state[name][len(row.output) - 1][row.output[-1]]) if row.output else first


def _note(name: str, row: Row, by_token: np.ndarray) -> None:
    """What each token would lead to, if it were the next."""
    row.state.setdefault(name, {})[len(row.output)] = by_token


@stage
def mirostat(logits: np.ndarray, row: Row) -> np.ndarray:
    """arXiv 2007.14966, with the surprise of the distribution that is drawn from (llama.cpp)."""
    p = row.params
    if p.mirostat_mode == 0:
        return logits
    mu = _steered("mirostat", row, 2 * p.mirostat_tau)
    order = ranked(logits)[: len(left(logits))]
    if p.mirostat_mode == 1:
        top = logits[order[:100]]  # their differences are the logarithms of the ratios of probabilities
        ranks = np.arange(1, len(top) + 1)
        t, b = np.log(ranks[1:] / ranks[:-1]), top[:-1] - top[1:]
        with np.errstate(all="ignore"):
            s = (t * b).sum() / (t * t).sum()
            k = ((s - 1) * 2**mu / (1 - len(logits) ** (1 - s))) ** (1 / s)
        k = 1.0 if math.isnan(k) else min(k, len(order))  # NaN: there is nothing to estimate from
        row.decide(k - math.floor(k) - 0.5)
        logits = _prefix(logits, order, round(k), logits, row)
    else:
        logits = _threshold(logits, logits.max() - math.log(softmax(logits).max()) - mu * math.log(2), row)
    with np.errstate(divide="ignore"):
        surprise = -np.log2(softmax(logits))
    _note("mirostat", row, mu - p.mirostat_eta * (surprise - p.mirostat_tau))
    return logits


@stage
def adaptive_p(logits: np.ndarray, row: Row) -> np.ndarray:
    """ggml-org/llama.cpp#17927, with the weighted sum and the sum of weights as there."""
    t, decay = row.params.adaptive_target, min(row.params.adaptive_decay, 0.99)
    if not 0 < t < 1:
        return logits
    total = 1 / (1 - decay)
    for _ in row.output:
        total = 1 + decay * total
    weighted = _steered("adaptive_p", row, t / (1 - decay))
    p = softmax(logits)
    _note("adaptive_p", row, p + decay * weighted)
    x = np.abs(p - min(max(2 * t - weighted / total, 0), 1)) / 0.3
    return masked(5 - 10 * x**2 / (1 + x), np.isneginf(logits))
