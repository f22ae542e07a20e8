"""Prompts: what a request may send, and how it becomes token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aphrodite.errors import InvalidRequestError
from aphrodite.server.body import off_loop
from aphrodite.server.context import ModelContext
from aphrodite.server.errors import ApiError, invalid
from aphrodite.tokenizer.tokenizer import Tokenizer

_KINDS = "text, a list of texts, a list of token ids, or a list of lists of token ids"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt; `text` is None where the request brought token ids."""

    token_ids: list[int]
    text: str | None


async def read_prompts(
    value: Any, context: ModelContext, *, add_special_tokens: bool, truncate: int | None
) -> list[Prompt]:
    """The prompts of a completions request. Null or an empty text stands for the start of a document.

    Args:
        truncate: keep only the last so many tokens of each.

    Raises:
        ApiError, InvalidRequestError: 400, naming `prompt`.
    """
    parts = split_prompts(value, field="prompt", most=context.config.max_prompts)
    prompts = []
    for part in parts:
        if isinstance(part, str):
            ids = await encode(part, context, field="prompt", special=add_special_tokens, bounded=truncate is None)
            prompts.append(Prompt(ids or _document_start(context.engine.tokenizer), part))
        else:
            prompts.append(Prompt(part, None))
    if truncate is not None:
        prompts = [_truncated(prompt, truncate, context.engine.tokenizer) for prompt in prompts]
    return prompts


async def encode(text: str, context: ModelContext, *, field: str, special: bool, bounded: bool) -> list[int]:
    """Token ids of a text; `bounded` refuses what cannot fit the context, before tokenizing where possible."""
    limit = context.engine.model.max_model_len if bounded else None
    tokenizer = context.engine.tokenizer
    try:
        return await off_loop(len(text), lambda: tokenizer.encode(text, add_special_tokens=special, max_tokens=limit))
    except InvalidRequestError as error:
        if error.code == "context_length_exceeded":
            message = f"This model's maximum context length is {limit} tokens. {error}"
            raise InvalidRequestError(message, param=field, code=error.code) from None
        raise InvalidRequestError(str(error), param=field, code=error.code) from None


def check_ids(ids: list[int], context: ModelContext, *, field: str) -> None:
    """Refuse ids that are none of the model's tokens.

    Raises:
        ApiError: 400, naming `field`.
    """
    vocab_size = context.engine.model.vocab_size
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise invalid(field, f"has ids outside the vocabulary: they must be 0 to {vocab_size - 1}")


def truncation(requested: int | None, *, max_model_len: int, max_tokens: int | None) -> int | None:
    """How many tokens to keep; -1 asks for as many as leave room for the answer. None: all."""
    if requested is None:
        return None
    if requested == 0:
        raise invalid("truncate_prompt_tokens", "must be -1 or at least 1")
    return requested if requested > 0 else max(1, max_model_len - (1 if max_tokens is None else max_tokens))


def split_prompts(value: Any, *, field: str, most: int) -> list[str | list[int]]:
    """Texts and lists of token ids; null is an empty text.

    Raises:
        ApiError: 400, naming `field`: it is something else, or there are more than `most`.
    """
    if value is None:
        return [""]
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise _wrong_kind(field)
    if not value:
        raise invalid(field, "must not be an empty list")
    if all(type(item) is int for item in value):
        return [value]
    if len(value) > most:
        raise invalid(field, f"has {len(value)} {field}s, more than the {most} allowed in one request")
    if all(type(item) is str for item in value):
        return value
    for index, item in enumerate(value):
        if type(item) is not list:
            raise _wrong_kind(field)
        if not item:
            raise invalid(field, f"{field} {index} is empty: send at least one token id")
        if not all(type(token) is int for token in item):
            raise _wrong_kind(field)
    return value


def _wrong_kind(field: str) -> ApiError:
    return invalid(field, f"must be {_KINDS}", code="invalid_type")


def _document_start(tokenizer: Tokenizer) -> list[int]:
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return [token_id]
    raise invalid("prompt", "is empty, and this model has no token that starts a document")


def _truncated(prompt: Prompt, keep: int, tokenizer: Tokenizer) -> Prompt:
    if len(prompt.token_ids) <= keep:
        return prompt
    token_ids = prompt.token_ids[-keep:]
    text = None if prompt.text is None else tokenizer.decode(token_ids, skip_special_tokens=False)
    return Prompt(token_ids, text)
