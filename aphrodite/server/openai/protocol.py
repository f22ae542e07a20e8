"""Fields of the OpenAI endpoints besides the sampling parameters, which have a table of their own.

Whatever a request holds falls in one of four groups: fields declared here, sampling parameters
(`aphrodite.sampling.params`), fields that must be refused because ignoring them would change the
answer, and the rest. Of the rest, what is harmless is dropped; what is unknown is dropped and named
in the response's `x-ignored-fields` header.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, WithJsonSchema

from aphrodite.errors import InvalidRequestError
from aphrodite.sampling.fields import canonical_names, from_mapping, validate
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.presets import SamplerPreset
from aphrodite.server.engine import ModelInfo
from aphrodite.server.errors import Headers, unsupported

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

_INT64 = 2**63

_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer", "minimum": 0}}, "minItems": 1},
        {"type": "null"},
    ]
}
_MESSAGES_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool", "function"]},
            "content": {
                "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}, {"type": "null"}]
            },
            "name": {"type": "string"},
        },
    },
}
TOOL_CHOICE_SCHEMA = {"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}, {"type": "null"}]}
_FUNCTION_CALL_SCHEMA = {
    "anyOf": [
        {"enum": ["none", "auto"]},
        {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
        {"type": "null"},
    ]
}


ReturnTimings = Annotated[
    bool, Field(description="Tell at the end how long prompt and answer took: timings, as llama.cpp does.")
]
TimingsPerToken = Annotated[bool, Field(description="Tell it with every chunk of a stream as well.")]
ReturnProgress = Annotated[
    bool, Field(description="A stream tells after each step how much of the prompt is computed: prompt_progress.")
]
Resumable = Annotated[
    bool,
    Field(
        description="The stream outlives its connection: GET /v1/streams/{id}, with the response's id and"
        " Last-Event-ID, goes on behind that event."
    ),
]


class StreamOptions(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    include_usage: bool = Field(default=False, description="A last chunk brings the token counts.")
    continuous_usage_stats: bool = Field(default=False, description="Every chunk brings the token counts so far.")


class GenerationFields(pydantic.BaseModel):
    """Fields that both generation endpoints have."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)

    model: str | None = Field(default=None, description="A name from /v1/models; by default the model's own.")
    stream: bool = Field(default=False, description="Send the answer piece by piece as server-sent events.")
    stream_options: StreamOptions = StreamOptions()
    preset: str | None = Field(
        default=None, description="A sampler preset of /v1/presets, for what the request leaves open.", max_length=256
    )
    best_of: int | None = Field(default=None, description="Accepted where it equals n.", ge=0, le=128)
    truncate_prompt_tokens: int | None = Field(
        default=None, description="Keep only the last so many prompt tokens; -1: as many as fit.", ge=-1, le=2**31 - 1
    )
    priority: int = Field(
        default=0, description="Lower is sooner, where the server schedules by it.", ge=-(2**31), lt=2**31
    )
    cache_salt: str | None = Field(
        default=None, description="Only requests of the same salt share cached prefixes.", min_length=1, max_length=256
    )
    return_token_ids: bool = Field(default=False, description="Add token_ids and prompt_token_ids to the answer.")
    return_tokens_as_token_ids: bool = Field(default=False, description="Name tokens `token_id:N` in logprobs.")


class CompletionFields(GenerationFields):
    """`POST /v1/completions`."""

    prompt: Annotated[Any, WithJsonSchema(_PROMPT_SCHEMA)] = Field(
        default=None, description="Text, token ids, or a list of either; null is an empty document."
    )
    echo: bool = Field(default=False, description="Put the prompt before the answer.")
    add_special_tokens: bool = Field(default=True, description="Let the tokenizer add begin-of-sequence and the like.")
    return_timings: ReturnTimings = False
    timings_per_token: TimingsPerToken = False
    return_progress: ReturnProgress = False
    resumable: Resumable = False


class ConversationFields(GenerationFields):
    """Fields of the endpoints whose prompt is a conversation that a chat template renders."""

    add_generation_prompt: bool | None = Field(
        default=None, description="Open the assistant's turn; by default true unless continue_final_message."
    )
    continue_final_message: bool = Field(default=False, description="Go on with the last message, do not answer it.")
    add_special_tokens: bool = Field(default=False, description="Let the tokenizer add its own to the template's.")
    chat_template: str | None = Field(default=None, description="Jinja template; refused unless the server trusts it.")
    chat_template_kwargs: dict[str, Any] = Field(
        default={}, description="Variables for the chat template, such as enable_thinking."
    )
    documents: list[dict[str, Any]] | None = Field(
        default=None,
        description="Texts to answer from, as the model's template shows them: title, text.",
        max_length=256,
    )
    parallel_tool_calls: bool = Field(default=True, description="Several calls in one answer.")
    include_reasoning: bool = Field(
        default=True, description="Tell what the model thinks, beside its text; else it is left out."
    )


class ChatFields(ConversationFields):
    """`POST /v1/chat/completions`."""

    messages: Annotated[Any, WithJsonSchema(_MESSAGES_SCHEMA)] = Field(description="The conversation so far.")
    logprobs: bool = Field(default=False, description="Add log-probabilities of the answer's tokens.")
    top_logprobs: int | None = Field(default=None, description="And of so many most likely tokens.", ge=0, lt=_INT64)
    return_timings: ReturnTimings = False
    timings_per_token: TimingsPerToken = False
    return_progress: ReturnProgress = False
    resumable: Resumable = False
    tools: list[dict[str, Any]] = Field(
        default=[], description="Functions that the model may call, with JSON schemas of their parameters."
    )
    tool_choice: Annotated[Any, WithJsonSchema(TOOL_CHOICE_SCHEMA)] = Field(
        default=None, description="Whether to call: none, auto, required, or a function's name; by default auto."
    )
    functions: list[dict[str, Any]] = Field(default=[], description="The older form of tools.")
    function_call: Annotated[Any, WithJsonSchema(_FUNCTION_CALL_SCHEMA)] = Field(
        default=None, description="The older form of tool_choice."
    )
    reasoning_effort: ReasoningEffort | None = Field(
        default=None, description="How long to think, where the chat template has a way to say it."
    )


_HARMLESS = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "moderation", "parallel_tool_calls", "prediction",
}  # fmt: skip

_NO_TOOLS = "tools are for /v1/chat/completions; leave it out"
_EMPTY: tuple[Any, ...] = ("", [], {}, False)

# Name: (values that mean "not used", what to tell).
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "tools": (_EMPTY, _NO_TOOLS),
    "tool_choice": (("none", "auto"), _NO_TOOLS),
    "functions": (_EMPTY, _NO_TOOLS),
    "function_call": (("none", "auto"), _NO_TOOLS),
    "modalities": ((["text"],), 'this model writes text only; leave it out or send ["text"]'),
    "audio": (_EMPTY, "this model writes text only; leave it out"),
    "web_search_options": ((), "this server searches nothing; leave it out"),
    "suffix": (_EMPTY, "filling in before a suffix is not supported; leave it out"),
    "prompt_embeds": (_EMPTY, "prompts are text or token ids; leave it out"),
    "use_beam_search": (_EMPTY, "beam search is not supported; leave it out"),
}  # fmt: skip


def refuse_unsupported(fields: Mapping[str, Any], endpoint: type[pydantic.BaseModel] | None = None) -> None:
    """Raise ApiError 400 for a field that asks for what this server does not do, or not where `endpoint` is asked."""
    own = {} if endpoint is None else endpoint.model_fields
    for name in (_REFUSED.keys() & fields.keys()) - own.keys():
        neutral, why = _REFUSED[name]
        if fields[name] is not None and not any(fields[name] == value for value in neutral):
            raise unsupported(name, why)


def refuse_best_of(best_of: int | None, n: int) -> None:
    if best_of is not None and best_of not in (0, n):
        raise unsupported("best_of", f"choosing among more answers than n ({n}) is not supported; leave it out")


def sampling_params(
    fields: Mapping[str, Any],
    endpoint: type[pydantic.BaseModel],
    model: ModelInfo,
    *,
    base: SamplingParams,
    preset: SamplerPreset | None = None,
) -> SamplingParams:
    """The checked sampling parameters among a request's fields; what `endpoint` declares means what it says there.

    Args:
        base: what holds where neither the request nor the preset says anything.

    Raises:
        InvalidRequestError: a wrong type or value, under the name the client used.
    """
    names = canonical_names()
    own = endpoint.model_fields
    given = {name: fields[name] for name in fields if name in names and name not in own}
    if preset is not None:
        base = preset.base(base)
        given, _ = preset.forced(given)
    try:
        params = from_mapping(given, base=base)
        validate(
            params,
            vocab_size=model.vocab_size,
            max_model_len=model.max_model_len,
            max_logprobs=model.max_logprobs,
        )
    except InvalidRequestError as error:
        used = next((name for name in given if names[name] == error.param and given[name] is not None), error.param)
        message = str(error).replace(f"`{error.param}`", f"`{used}`")
        raise InvalidRequestError(message, param=used, code=error.code) from None
    return params


def without_empty_stops(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without empty stop strings: koboldcpp, llama.cpp and Ollama pass over them, and clients send them."""
    names = canonical_names()
    kept = {}
    for name, value in fields.items():
        if names.get(name) == "stop" and isinstance(value, list):
            kept[name] = [text for text in value if text != ""]
        elif names.get(name) != "stop" or value != "":
            kept[name] = value
    return kept


def is_known_field(name: str, endpoint: type[pydantic.BaseModel]) -> bool:
    """Whether a field means something here, be it that it must not be used."""
    known = name in endpoint.model_fields or name in canonical_names()
    return known or name in _HARMLESS or name in _REFUSED


def ignored_header(fields: Mapping[str, Any], endpoint: type[pydantic.BaseModel]) -> Headers:
    """The response header that names what was ignored; nothing if all was understood."""
    names = [name for name in fields if not is_known_field(name, endpoint) and fields[name] is not None]
    if not names:
        return ()
    shown = [name if re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name) else "?" for name in names[:40]]
    if len(names) > len(shown):
        shown.append(f"and {len(names) - len(shown)} more")
    return ((b"x-ignored-fields", ", ".join(shown).encode()),)
