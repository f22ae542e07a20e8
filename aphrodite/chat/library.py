"""Where a model's chat template comes from: asked for by name or file, the checkpoint's own, or recognised."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import NamedTuple

from aphrodite.chat.jinja import JinjaTemplate
from aphrodite.chat.limits import MAX_SOURCE_CHARS
from aphrodite.chat.recognition import recognise
from aphrodite.chat.table import TEMPLATES, LibraryTemplate, template_names
from aphrodite.chat.template import ChatTemplate
from aphrodite.errors import ConfigError, InvalidRequestError, ModelFormatError, did_you_mean
from aphrodite.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# The names under which checkpoints keep templates for requests with tools and with documents.
TOOL_USE, RAG = "tool_use", "rag"


class _Source(NamedTuple):
    """A template's text and what goes with it."""

    text: str
    name: str
    row: LibraryTemplate | None = None
    tool_use: str | None = None
    rag: str | None = None


def load_chat_template(name_or_path: str | None, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template that was asked for, or else the checkpoint's own.

    Args:
        name_or_path: a name of the library, the name of one of the checkpoint's own templates, or the path of a file;
            None: the checkpoint's default template, with those that it keeps for tools and for documents.

    Returns:
        The template, or None where the checkpoint has none and none was asked for.

    Raises:
        ConfigError: there is no such template or file.
        ModelFormatError: the template is damaged, or too long or too complex to be used.
    """
    source = _own(tokenizer) if name_or_path is None else _find(name_or_path, tokenizer)
    return None if source is None else _compile(source, tokenizer)


def recognised_chat_template(tokenizer: Tokenizer, *, name: str, family: str | None) -> ChatTemplate:
    """The library's template that suits a checkpoint without one. The log says which it is, and why.

    Args:
        name: the model's name, its file's, or both.
        family: its architecture (`ModelSpec.family`).
    """
    row, reason, certain = recognise(tokenizer, name=name, family=family)
    logger.log(
        logging.INFO if certain else logging.WARNING,
        "the checkpoint has no chat template: %s is used, for %s; --chat-template names another",
        row.name,
        reason,
    )
    return _compile(_of_row(row), tokenizer)


def named_template(name_or_path: str, *, bos_token: str | None = None, eos_token: str | None = None) -> ChatTemplate:
    """A template of the library, or of a file, without a model.

    Raises:
        ConfigError, ModelFormatError: as `load_chat_template`.
    """
    return _build(_named(name_or_path), bos_token, eos_token)


def library_row(name: str) -> LibraryTemplate | None:
    """The row of the library with this name or alias, if there is one."""
    return template_names().get(_key(name))


def _compile(source: _Source, tokenizer: Tokenizer) -> ChatTemplate:
    silent = source.row is not None and not tokenizer.adds_bos  # a library template leaves that to the tokenizer
    return _build(source, None if silent else tokenizer.bos_token, tokenizer.eos_token)


def _build(source: _Source, bos_token: str | None, eos_token: str | None) -> ChatTemplate:
    try:
        template = ChatTemplate(
            source.text,
            bos_token=bos_token,
            eos_token=eos_token,
            tool_use=_sound(source.tool_use, TOOL_USE),
            rag=_sound(source.rag, RAG),
            name=source.name,
            stop=source.row.stop if source.row is not None else (),
        )
        logger.debug("%s: %s", template.name, template.traits)  # found out now, not while a request waits
    except InvalidRequestError as error:
        raise ModelFormatError(f"{error} Choose another with --chat-template ({_names()}, or a file).") from None
    return template


def _sound(text: str | None, name: str) -> str | None:
    """A second template of the checkpoint, which is left out where it is damaged: the first one still serves."""
    try:
        if text is not None:
            JinjaTemplate(text)
    except InvalidRequestError as error:
        logger.warning("the checkpoint's template %s is left out: %s", name, error)
        return None
    return text


def _own(tokenizer: Tokenizer) -> _Source | None:
    """The checkpoint's default template, or the only one it has, with those for tools and documents."""
    templates = tokenizer.chat_templates
    text = templates.get("default")
    if text is None and len(templates) == 1:
        (name, text) = next(iter(templates.items()))
        logger.info("the checkpoint's only chat template is named %s; it serves all requests", name)
    if text is None:
        return None
    return _Source(text, "the checkpoint's template", tool_use=templates.get(TOOL_USE), rag=templates.get(RAG))


def _of_row(row: LibraryTemplate) -> _Source:
    return _Source(row.source, f"the template {row.name}", row)


def _find(name_or_path: str, tokenizer: Tokenizer) -> _Source:
    if library_row(name_or_path) is None and name_or_path in tokenizer.chat_templates:
        return _Source(tokenizer.chat_templates[name_or_path], f"the checkpoint's template {name_or_path}")
    return _named(name_or_path)


def _named(name_or_path: str) -> _Source:
    """A template by its name in the library, or the text of a file."""
    if (row := library_row(name_or_path)) is not None:
        return _of_row(row)
    path = Path(os.path.expanduser(name_or_path))
    if not path.is_file():
        hint = did_you_mean(_key(name_or_path), template_names())
        raise ConfigError(
            f"{name_or_path}: no chat template of the library and no file has this name.{hint} The library has "
            f"{_names()}."
        )
    try:
        with path.open(encoding="utf-8") as file:
            return _Source(file.read(MAX_SOURCE_CHARS + 1), f"the template {name_or_path}")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: this chat template cannot be read as text ({error}).") from None


def _key(name: str) -> str:
    """A name as the library has it: front ends write `Mistral V7-Tekken` or `llama_3`."""
    return name.strip().lower().replace(" ", "-").replace("_", "-")


def _names() -> str:
    return ", ".join(sorted(TEMPLATES))
