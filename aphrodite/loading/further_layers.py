"""Layers behind the decoder's own, which predict further tokens (DeepSeek-V3, arXiv 2412.19437, section 2.2)."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import TypeVar

from aphrodite.loading.parameters import NameTable

T = TypeVar("T")

logger = logging.getLogger(__name__)


def without_further_layers(source: str, tensors: Mapping[str, T], names: NameTable, num_layers: int) -> dict[str, T]:
    """A checkpoint's tensors without those of layers from `num_layers` on.

    Args:
        source: the checkpoint, for the log.
        tensors: whatever stands for them, by name.
        names: how the checkpoint names layers.
    """
    before, behind = (re.escape(part) for part in names.layer_prefix.split("{}"))
    layer = re.compile(rf"{before}(\d+){behind}")
    further = {name for name in tensors if (found := layer.match(name)) and int(found[1]) >= num_layers}
    if further:
        logger.info("%s: its layers for predicting further tokens are not used (%d tensors)", source, len(further))
    return {name: tensor for name, tensor in tensors.items() if name not in further}
