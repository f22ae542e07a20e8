"""What has to hold before a request reaches the engine, shared by the offline and the async front end."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec

from aphrodite.config import EngineConfig
from aphrodite.errors import InvalidRequestError
from aphrodite.loading.default_model import find_default_model
from aphrodite.sampling.params import SamplingParams
from aphrodite.tokenizer.tokenizer import Tokenizer

_SEED_MASK = (1 << 64) - 1


def resolve_model(config: EngineConfig) -> tuple[EngineConfig, Path]:
    """The configuration with `model` filled in, and its path. Fetches the default model if need be.

    Raises:
        AphroditeError: the default model is neither installed nor cached and cannot be fetched.
    """
    path = find_default_model(cache_dir=config.cache_dir) if config.model is None else Path(config.model)
    return dataclasses.replace(config, model=str(path)), path


def answer_seeds(params: SamplingParams, random_seed: int) -> list[int]:
    """One 64-bit seed an answer: answer i draws from the stream of (seed + i) mod 2^64."""
    seed = random_seed if params.seed is None or params.seed == -1 else params.seed
    return [(seed + index) & _SEED_MASK for index in range(params.n)]


def tokenize_words(params: SamplingParams, tokenizer: Tokenizer, vocab_size: int) -> SamplingParams:
    """Valid `params` with `bad_words` turned into `bad_words_ids`: each word without and with a leading space.

    Raises:
        InvalidRequestError: a word is not valid Unicode.
    """
    if not params.bad_words:
        return params
    words = [word.lstrip() or word for word in params.bad_words]
    try:
        spellings = tokenizer.encode_batch([*words, *(" " + word for word in words)], add_special_tokens=False)
    except InvalidRequestError as error:
        raise InvalidRequestError(str(error), param="bad_words") from None
    # A tokenizer may know tokens that the model has no logits for.
    usable = (tuple(ids) for ids in spellings if ids and max(ids) < vocab_size)
    words_ids = tuple(dict.fromkeys((*params.bad_words_ids, *usable)))
    return msgspec.structs.replace(params, bad_words=(), bad_words_ids=words_ids)


def check_prompt(prompt: list[int], params: SamplingParams, *, vocab_size: int, max_model_len: int) -> None:
    """Bounds of a tokenized prompt.

    Raises:
        InvalidRequestError: empty, too long for the context, or with ids outside the vocabulary.
    """
    if not prompt:
        raise InvalidRequestError("the prompt is empty: send at least one token", param="prompt")
    wanted = params.max_tokens if params.max_tokens is not None else 1
    if len(prompt) + wanted > max_model_len:
        raise InvalidRequestError(
            f"This model's maximum context length is {max_model_len} tokens, but {len(prompt) + wanted} were"
            f" requested ({len(prompt)} in the prompt, {wanted} for the answer). Shorten the prompt or lower"
            " max_tokens.",
            param="prompt",
            code="context_length_exceeded",
        )
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise InvalidRequestError(
            f"the prompt has token ids outside the vocabulary: they must be 0 to {vocab_size - 1}", param="prompt"
        )
