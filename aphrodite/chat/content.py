"""What a template expects in a message's `content`, and how messages are brought to that form.

Clients send a string or a list of parts. Most templates print the content, some loop over its parts, some do
both after looking at its type; the template's syntax tree tells which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import nodes

from aphrodite.errors import InvalidRequestError

MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class ContentForm:
    """What a template can take.

    Attributes:
        parts: it loops over parts.
        strings: it prints strings.
    """

    parts: bool
    strings: bool


def detect_form(tree: nodes.Template) -> ContentForm:
    """Find out from a template's syntax tree."""
    names = _content_names(tree)
    loops = any(_is_content(node.iter, names) for node in tree.find_all(nodes.For))
    tests = any(
        test.name in ("string", "iterable", "sequence", "mapping") and _is_content(test.node, names)
        for test in tree.find_all(nodes.Test)
    )
    return ContentForm(parts=loops, strings=tests or not loops)


def _content_names(tree: nodes.Template) -> set[str]:
    """Variables that are set to a message's content."""
    names: set[str] = set()
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node, names):
            names.add(assign.target.name)
    return names


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    """Whether an expression is a message's content, perhaps filtered or sliced."""
    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        if isinstance(node.arg, nodes.Const):
            return bool(node.arg.value == "content")
        return isinstance(node.arg, nodes.Slice) and _is_content(node.node, names)
    if isinstance(node, nodes.Filter):
        return _is_content(node.node, names)
    return False


def conform(messages: Sequence[Mapping[str, Any]], form: ContentForm) -> list[dict[str, Any]]:
    """Messages in the form that the template takes; the given ones stay as they are.

    Text parts are joined with line ends for a template that takes strings only.

    Raises:
        InvalidRequestError: a part is not text.
    """
    result = []
    for index, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list):
            texts = [_text_of(part, f"messages[{index}].content[{i}]") for i, part in enumerate(content)]
            if not form.parts:
                content = "\n".join(texts)
            else:
                content = [{"type": "text", "text": text} for text in texts]
        elif isinstance(content, str) and not form.strings:
            content = [{"type": "text", "text": content}]
        else:
            result.append(dict(message))
            continue
        result.append({**message, "content": content})
    return result


def _text_of(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise InvalidRequestError(
        f"{where}: a part of type {kind!r} is not supported; send parts of type 'text', or a string.", param=where
    )


def part_text(part: Any) -> str:
    """The text of a part; nothing for what is not text, which is refused where contents are conformed."""
    text = part.get("text") if isinstance(part, Mapping) else part
    return text if isinstance(text, str) else ""


def part_texts(content: Any) -> list[str]:
    """The texts of a content: a string, a list of parts, or None for no content."""
    return [part_text(part) for part in content] if isinstance(content, list) else [part_text(content)]


def measure(value: Any, name: str) -> int:
    """Characters and items of a template variable.

    Raises:
        InvalidRequestError: it holds something other than JSON values, or is nested too deeply.
    """
    size, level = 0, [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            size += 1
            if isinstance(item, str):
                size += len(item)
            elif isinstance(item, dict):
                below.extend(item)
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif item is not None and not isinstance(item, (bool, int, float)):
                raise InvalidRequestError(
                    f"{name}: only JSON values can be given to a chat template, not {type(item).__name__}.", param=name
                )
        if not below:
            return size
        level = below
    raise InvalidRequestError(f"{name}: nested more than {MAX_DEPTH} levels deep.", param=name)
