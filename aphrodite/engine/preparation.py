"""What has to hold before a request reaches the engine, shared by the offline and the async front end."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec

from aphrodite.config import EngineConfig
from aphrodite.core.guidance import answer_room
from aphrodite.engine.messages import EngineInfo
from aphrodite.engine.room import model_room
from aphrodite.errors import ConfigError, InvalidRequestError
from aphrodite.loading.checkpoint import checkpoint_name, model_path
from aphrodite.loading.default_model import find_default_model
from aphrodite.loading.downloads import Listener
from aphrodite.loading.hub import fetch, parse_name
from aphrodite.sampling.params import SamplingParams
from aphrodite.tokenizer.tokenizer import Tokenizer

_SEED_MASK = (1 << 64) - 1


def resolve_model(
    config: EngineConfig, *, allow_download: bool = True, listener: Listener | None = None
) -> tuple[EngineConfig, Path]:
    """The configuration with `model` as a path on this machine, and that path. Fetches the default model, or one that
    is named as on the Hugging Face hub, if need be.

    Args:
        allow_download: otherwise the model has to be on this machine.
        listener: hears how far the download of a model of the hub is.

    Raises:
        AphroditeError: the model is not on this machine and cannot be fetched.
    """
    name = None if config.model is None else parse_name(config.model)
    if name is not None:
        path, load_format = fetch(
            name,
            cache_dir=config.cache_dir,
            load_format=config.load_format,
            room=partial(model_room, config),
            allow_download=allow_download,
            listener=listener,
        )
        return dataclasses.replace(config, model=str(path), load_format=load_format), path
    if config.model is None:
        path = find_default_model(cache_dir=config.cache_dir, allow_download=allow_download)
    else:
        path = local_path(config.model)
        if not path.exists():
            raise ConfigError(
                f"{config.model}: there is no such file or folder; a model is a GGUF file, a folder with a checkpoint, "
                "or a name on the Hugging Face hub (ORG/NAME, ORG/NAME:Q4_K_M)"
            )
        path = model_path(path, config.load_format)
    return dataclasses.replace(config, model=str(path)), path


def tokenizer_path(config: EngineConfig) -> Path:
    """Where the tokenizer of a configuration lies whose `model` is a path on this machine."""
    return local_path(config.tokenizer or config.model or "")


def local_path(named: str) -> Path:
    """A path that may begin with `~`; the home of a user who is not there stays as it is written."""
    return Path(os.path.expanduser(named))


def model_root(path: Path) -> str:
    """What the API calls the files that a model is from: never where they lie."""
    return checkpoint_name(path) if path.is_dir() else path.name


def named_adapters(values: Sequence[str]) -> dict[str, Path]:
    """The setting `lora`, NAME=PATH each.

    Raises:
        ConfigError: a name or path is missing, or a name comes twice.
    """
    named: dict[str, Path] = {}
    for value in values:
        name, _, path = value.partition("=")
        name, path = name.strip(), path.strip()
        if not name or not path:
            raise ConfigError(f"--lora {value}: write NAME=PATH, the name that requests choose it by and its folder")
        if name in named:
            raise ConfigError(f"--lora {name} is given twice; names have to differ")
        named[name] = local_path(path)
    return named


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


def wants_negative_prompt(params: SamplingParams) -> bool:
    """Whether a negative prompt is to be made of the request's text for one."""
    return is_guided(params) and bool(params.negative_prompt) and not params.negative_prompt_ids


def tokenize_negative_prompt(params: SamplingParams, tokenizer: Tokenizer, max_model_len: int) -> SamplingParams:
    """`params` with `negative_prompt` turned into `negative_prompt_ids`, as a prompt of its own.

    Raises:
        InvalidRequestError: it is too long, or not valid Unicode.
    """
    if not wants_negative_prompt(params):
        return params
    try:
        ids = tokenizer.encode(params.negative_prompt, add_special_tokens=True, max_tokens=max_model_len)
    except InvalidRequestError as error:
        raise InvalidRequestError(str(error), param="negative_prompt", code=error.code) from None
    return with_negative_prompt(params, ids)


def with_negative_prompt(params: SamplingParams, token_ids: list[int]) -> SamplingParams:
    return msgspec.structs.replace(params, negative_prompt="", negative_prompt_ids=tuple(token_ids))


def is_guided(params: SamplingParams) -> bool:
    """Whether the answer is computed twice. A prompt without an answer needs no guidance."""
    return params.guidance_scale != 1 and params.max_tokens != 0


def negative_prompt(params: SamplingParams, prompt: list[int]) -> list[int] | None:
    """A guided request's negative prompt: where none was given, the last token of its prompt. None: not guided."""
    return list(params.negative_prompt_ids or prompt[-1:]) if is_guided(params) else None


def check_guidance(prompt: list[int], params: SamplingParams, info: EngineInfo) -> None:
    """Whether a guided request's two sequences can run beside each other in this engine.

    Raises:
        InvalidRequestError: they cannot, even alone.
    """
    negative = negative_prompt(params, prompt)
    if negative is None:
        return
    if info.max_num_seqs < 2:
        raise InvalidRequestError(
            "guidance computes two sequences at once, and this server runs one (--max-num-seqs 1): leave"
            " guidance_scale out",
            param="guidance_scale",
        )
    wanted = params.max_tokens if params.max_tokens is not None else 1
    room = answer_room(
        len(prompt),
        len(negative),
        max_model_len=info.max_model_len,
        num_blocks=info.num_blocks,
        block_size=info.block_size,
    )
    if room < wanted:
        raise InvalidRequestError(
            f"With guidance the prompt ({len(prompt)} tokens) and the negative prompt ({len(negative)}) leave room for"
            f" {room} tokens, but {wanted} were requested: each with its answer has to fit the context of"
            f" {info.max_model_len}, and both the KV cache of {info.num_blocks * info.block_size}. Shorten them or"
            " lower max_tokens.",
            param="negative_prompt",
            code="context_length_exceeded",
        )


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
