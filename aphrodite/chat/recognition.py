"""Which format a checkpoint without a chat template has: by its name, its tokens, its architecture, in this order.

A name that says the format is worth most, for the people who made a fine-tune chose it; but only if the tokenizer has
the format's tokens. Tokens come next: fine-tunes add those of their format to those of their base model. What is left
is what the base model's authors use.
"""

from __future__ import annotations

from typing import NamedTuple

from aphrodite.chat.table import PLAIN, TEMPLATES, LibraryTemplate
from aphrodite.tokenizer.tokenizer import Tokenizer


class Recognition(NamedTuple):
    """The format to use, why, and whether anything spoke for it."""

    template: LibraryTemplate
    reason: str
    certain: bool


def recognise(tokenizer: Tokenizer, *, name: str, family: str | None) -> Recognition:
    """The format that fits a model best.

    Args:
        name: the model's own name, its file's or its directory's, or several of them in one text.
        family: its architecture (`ModelSpec.family`), or None.
    """
    usable = [
        row for row in TEMPLATES.values() if all(tokenizer.token_to_id(token) is not None for token in row.tokens)
    ]
    for row in usable:
        if (part := row.found_in(name)) is not None:
            return Recognition(row, f'the model\'s name has "{part}" in it', certain=True)
    for row in usable:
        if row.tokens and not row.shares_tokens and row.byte_level in (None, tokenizer.pieces.byte_level):
            tokens = " and ".join((", ".join(row.tokens[:-1]), row.tokens[-1]) if len(row.tokens) > 1 else row.tokens)
            return Recognition(row, f"its tokenizer has {tokens}", certain=True)
    for row in usable:
        if family is not None and family in row.families:
            return Recognition(row, f"its architecture is {family}", certain=True)
    return Recognition(PLAIN, "neither its name nor its tokens nor its architecture is known", certain=False)
