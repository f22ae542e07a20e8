"""The text part of checkpoints that also see images: theirs is the decoder, the rest is left in the file."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)

_VISION = re.compile(
    r"(model\.)?(vision_tower|vision_model|visual|multi_modal_projector|connector|embed_vision|image_newline)(\.|$)"
)
# transformers 4 wrote the first two, transformers 5 the third; the last is SmolVLM's.
_TEXT = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "model.text_model.": "model.",
}


def text_tensors(source: str, tensors: Mapping[str, T]) -> dict[str, T]:
    """A checkpoint's tensors without those of its vision part, under the names that the text model has alone.

    Args:
        source: the checkpoint, for the log.
        tensors: whatever stands for them, by name.
    """
    text = {_text_name(name): tensor for name, tensor in tensors.items() if not _VISION.match(name)}
    if len(text) < len(tensors):
        logger.warning("%s: only the text part is served; the model will not see images", source)
    return text


def _text_name(name: str) -> str:
    for prefix, alone in _TEXT.items():
        if name.startswith(prefix):
            return alone + name.removeprefix(prefix)
    return name
