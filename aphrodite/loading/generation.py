"""What a checkpoint says about generation: special token ids and recommended sampling values."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aphrodite.loading.config_reader import ConfigReader

logger = logging.getLogger(__name__)

_MAX_ID = (1 << 32) - 1  # with which GGUF stands for none


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Ends of an answer and sampling values that a checkpoint recommends; None: it says nothing.

    `eos_token_ids` are all ids that end an answer, the main one first.
    """

    eos_token_ids: tuple[int, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def generation_from_config(config: ConfigReader, directory: Path, vocab_size: int) -> GenerationDefaults:
    """From config.json and, where the checkpoint's directory has one, generation_config.json.

    Every end-of-sequence id of either file counts: models ship with one of the two out of date.

    Raises:
        ModelFormatError: a value is mistyped or out of bounds.
    """
    file = directory / "generation_config.json"
    generation = ConfigReader.from_file(file) if file.exists() else None
    sources = [generation, config] if generation is not None else [config]
    values = generation or ConfigReader(config.source, {})
    return GenerationDefaults(
        eos_token_ids=_end_ids(sources, ["eos_token_id"], vocab_size),
        temperature=values.read("temperature", float, None, low=0.0),
        top_p=values.read("top_p", float, None, low=0.0, high=1.0),
        top_k=values.read("top_k", int, None, low=-1),
        min_p=values.read("min_p", float, None, low=0.0, high=1.0),
        repetition_penalty=values.read("repetition_penalty", float, None, low=0.0),
    )


def generation_from_gguf(metadata: ConfigReader, vocab_size: int) -> GenerationDefaults:
    """From GGUF's `tokenizer.ggml.*_token_id` and `general.sampling.*` keys.

    End of turn and end of message end an answer as well.

    Raises:
        ModelFormatError: a value is mistyped or out of bounds.
    """
    ends = [f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")]
    return GenerationDefaults(
        eos_token_ids=_end_ids([metadata], ends, vocab_size),
        temperature=metadata.read("general.sampling.temp", float, None, low=0.0),
        top_p=metadata.read("general.sampling.top_p", float, None, low=0.0, high=1.0),
        top_k=metadata.read("general.sampling.top_k", int, None, low=-1),
        min_p=metadata.read("general.sampling.min_p", float, None, low=0.0, high=1.0),
        repetition_penalty=metadata.read("general.sampling.penalty_repeat", float, None, low=0.0),
    )


def _end_ids(sources: Sequence[ConfigReader], keys: Sequence[str], vocab_size: int) -> tuple[int, ...]:
    """All ids under `keys` that are inside the vocabulary; the model cannot answer with others, whatever merged them
    in."""
    named = [token for source in sources for key in keys for token in source.integers(key, low=-1, high=_MAX_ID)]
    outside = sorted({token for token in named if token >= vocab_size})
    if outside:
        logger.warning(
            "%s: end-of-text ids %s are outside the vocabulary of %d and ignored",
            sources[0].source,
            outside[:8],
            vocab_size,
        )
    return tuple(dict.fromkeys(token for token in named if 0 <= token < vocab_size))
