"""The sampling values that hold where a request names none: those that the model's authors recommend."""

from __future__ import annotations

import logging

from aphrodite.errors import ConfigError, InvalidRequestError
from aphrodite.loading.generation import GenerationDefaults
from aphrodite.sampling.fields import from_mapping
from aphrodite.sampling.params import SamplingParams

logger = logging.getLogger(__name__)

_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_defaults(recommended: GenerationDefaults, *, source: str) -> SamplingParams:
    """Parameters of a request that names none, under `source`: the setting `generation_config`, "auto" or "none".

    Says in the log what came from the model.

    Raises:
        ConfigError: a recommended value is out of bounds.
    """
    if source == "none":
        return SamplingParams()
    given = {name: getattr(recommended, name) for name in _NAMES if getattr(recommended, name) is not None}
    try:
        defaults = from_mapping(given)
    except InvalidRequestError as error:
        raise ConfigError(f"the model's generation config: {error}; start with --generation-config none") from None
    plain = SamplingParams()
    changed = [name for name in given if getattr(defaults, name) != getattr(plain, name)]
    if changed:
        listed = ", ".join(f"{name} {getattr(defaults, name)}" for name in changed)
        logger.info(
            "sampling defaults from the model: %s (what a request names wins; --generation-config none drops them)",
            listed,
        )
    return defaults
