"""The conversation that classifier-free guidance moves a chat away from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import dropwhile
from typing import Any


def negative_messages(messages: Sequence[Mapping[str, Any]], text: str) -> list[dict[str, Any]]:
    """The conversation with `text` for the system message (or messages) that it begins with.

    So the two prompts differ in nothing but the instructions: arXiv 2306.17806, section 3.4.
    """
    rest = dropwhile(lambda message: message.get("role") in ("system", "developer"), messages)
    return [{"role": "system", "content": text}, *map(dict, rest)]
