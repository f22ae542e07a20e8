"""The OpenAPI document, made from the routes, the request models and the table of sampling parameters."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

import pydantic
from starlette.routing import Route

import aphrodite
from aphrodite.sampling.fields import parameter_table
from aphrodite.sampling.grammar_fields import FIELD_SCHEMAS
from aphrodite.sampling.table import MAX_LOOP_COUNT, MAX_LOOP_PATTERN, ParamRow, bounds_text
from aphrodite.server.adapters import LoadAdapterFields, UnloadAdapterFields
from aphrodite.server.anthropic import CountTokensFields, MessagesFields
from aphrodite.server.embeddings import EmbeddingFields
from aphrodite.server.kobold import KoboldFields, KoboldKeyFields, KoboldTextFields, KoboldTokensFields
from aphrodite.server.kobold_embed import KoboldEmbeddingFields
from aphrodite.server.llama_cpp import LlamaCppFields
from aphrodite.server.llama_cpp_embed import LlamaCppEmbeddingFields
from aphrodite.server.model_admin import (
    DownloadFields,
    ReloadFields,
    RouterFields,
    TabbyLoadFields,
    TabbyUnloadFields,
)
from aphrodite.server.ollama import OllamaChatFields, OllamaGenerateFields
from aphrodite.server.ollama_embed import OllamaEmbeddingsFields, OllamaEmbedFields
from aphrodite.server.ollama_models import ModelFields, PullFields
from aphrodite.server.openai.protocol import ChatFields, CompletionFields
from aphrodite.server.openai.responses.fields import ResponsesFields
from aphrodite.server.probes import TabbyDecodeFields, TabbyEncodeFields
from aphrodite.server.tokenize import DetokenizeFields, TokenizeFields

_REF = "#/components/schemas/{model}"

# Which model describes the body of a POST, and whether sampling parameters belong to it as well.
_BODIES: dict[str, tuple[type[pydantic.BaseModel], bool]] = {
    "/v1/completions": (CompletionFields, True),
    "/v1/embeddings": (EmbeddingFields, False),
    "/v1/chat/completions": (ChatFields, True),
    "/chat/completions": (ChatFields, True),
    "/v1/responses": (ResponsesFields, True),
    "/v1/responses/input_tokens": (ResponsesFields, True),
    "/tokenize": (TokenizeFields, False),
    "/v1/tokenize": (TokenizeFields, False),
    "/detokenize": (DetokenizeFields, False),
    "/v1/detokenize": (DetokenizeFields, False),
    "/v1/token/encode": (TabbyEncodeFields, False),
    "/v1/token/decode": (TabbyDecodeFields, False),
    "/api/v1/generate": (KoboldFields, True),
    "/api/latest/generate": (KoboldFields, True),
    "/api/extra/generate/stream": (KoboldFields, True),
    "/api/extra/generate/check": (KoboldKeyFields, False),
    "/api/extra/abort": (KoboldKeyFields, False),
    "/embedding": (LlamaCppEmbeddingFields, False),
    "/embeddings": (LlamaCppEmbeddingFields, False),
    "/completion": (LlamaCppFields, True),
    "/completions": (LlamaCppFields, True),
    "/v1/messages": (MessagesFields, True),
    "/v1/messages/count_tokens": (CountTokensFields, False),
    "/api/chat": (OllamaChatFields, False),
    "/api/generate": (OllamaGenerateFields, False),
    "/api/embed": (OllamaEmbedFields, False),
    "/api/embeddings": (OllamaEmbeddingsFields, False),
    "/api/show": (ModelFields, False),
    "/api/pull": (PullFields, False),
    "/api/delete": (ModelFields, False),
    "/api/admin/reload_config": (ReloadFields, False),
    "/v1/model/load": (TabbyLoadFields, False),
    "/v1/model/unload": (TabbyUnloadFields, False),
    "/v1/model/download": (DownloadFields, False),
    "/v1/load_lora_adapter": (LoadAdapterFields, False),
    "/v1/unload_lora_adapter": (UnloadAdapterFields, False),
    "/models/load": (RouterFields, False),
    "/models/unload": (RouterFields, False),
    "/api/extra/embeddings": (KoboldEmbeddingFields, False),
    "/api/extra/tokencount": (KoboldTextFields, False),
    "/api/extra/tokenize": (KoboldTextFields, False),
    "/api/extra/detokenize": (KoboldTokensFields, False),
}
_TEXT_TYPES = {
    "/": "text/html",
    "/docs": "text/html",
    "/metrics": "text/plain",
    "/v1/load_lora_adapter": "text/plain",
    "/v1/unload_lora_adapter": "text/plain",
}
_STREAMING = (
    "/v1/streams/{stream_id}",
    "/v1/completions",
    "/v1/chat/completions",
    "/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/completion",
    "/completions",
    "/api/extra/generate/stream",
)

_HEADER_PARAMETERS = {
    ("GET", "/v1/streams/{stream_id}"): {
        "name": "Last-Event-ID",
        "in": "header",
        "schema": {"type": "integer", "minimum": 0},
    }
}

_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ERROR = {
    "description": "What was wrong, and with which field.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}


def openapi_document(routes: Iterable[Route], root_path: str) -> dict[str, Any]:
    """The document of these routes as JSON types."""
    schemas: dict[str, Any] = {"Error": _ERROR_SCHEMA}
    for model, samples in dict.fromkeys(_BODIES.values()):
        schemas[model.__name__] = _body_schema(model, samples, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Aphrodite Engine", "version": aphrodite.__version__},
        "servers": [{"url": root_path or "/"}],
        "paths": _paths(routes),
        "components": {
            "schemas": schemas,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"bearer": []}],
    }


def _paths(routes: Iterable[Route]) -> dict[str, Any]:
    paths: dict[str, Any] = {}
    for route in routes:
        paths.setdefault(_openapi_path(route.path), {}).update(_operation(route))
    return paths


def _openapi_path(path: str) -> str:
    return re.sub(r"{(\w+):\w+}", r"{\1}", path)


def _operation(route: Route) -> dict[str, Any]:
    methods = (route.methods or set()) - {"HEAD"}
    (method,) = methods
    operation: dict[str, Any] = {
        "summary": (inspect.getdoc(route.endpoint) or "").partition("\n")[0],
        "operationId": re.sub(r"\W+", "_", f"{method.lower()} {route.path}").strip("_"),
        "responses": {"200": _success(route.path), "default": _ERROR},
    }
    if method == "POST" and route.path in _BODIES:
        schema = {"$ref": _REF.format(model=_BODIES[route.path][0].__name__)}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if route.param_convertors:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in route.param_convertors
        ]
    if (method, route.path) in _HEADER_PARAMETERS:
        operation["parameters"].append(_HEADER_PARAMETERS[method, route.path])
    return {method.lower(): operation}


def _success(path: str) -> dict[str, Any]:
    content: dict[str, Any] = {_TEXT_TYPES.get(path, "application/json"): {}}
    if path in _STREAMING:
        content["text/event-stream"] = {}
    return {"description": "The answer.", "content": content}


def _body_schema(model: type[pydantic.BaseModel], samples: bool, schemas: dict[str, Any]) -> dict[str, Any]:
    schema = model.model_json_schema(ref_template=_REF)
    schemas.update(schema.pop("$defs", {}))
    properties = schema["properties"]
    required = schema.get("required", ())
    for name in properties:
        if name not in required:
            properties[name] = _nullable(properties[name])
    if samples:
        for row in parameter_table():
            for name in (row.name, *row.param.aliases):
                properties.setdefault(name, _parameter_schema(row, name))
    return schema


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    """Null means "not given" everywhere, which clients use."""
    if {"type": "null"} in schema.get("anyOf", ()):
        return schema
    texts: dict[str, Any] = {key: schema.pop(key) for key in ("title", "description", "default") if key in schema}
    return {"anyOf": [schema, {"type": "null"}], **texts}


def _parameter_schema(row: ParamRow, name: str) -> dict[str, Any]:
    doc = row.param.doc if name == row.name else f"The same as {row.name}."
    bounds = bounds_text(row.param)
    number = {
        key: bound
        for key, bound in (
            ("minimum", row.param.ge),
            ("exclusiveMinimum", row.param.gt),
            ("maximum", row.param.le),
            ("exclusiveMaximum", row.param.lt),
        )
        if bound is not None
    }
    count: dict[str, Any] = {} if row.param.max_items is None else {"maxItems": row.param.max_items}
    if row.param.min_items:
        count["minItems"] = row.param.min_items
    length = {} if row.param.max_length is None else {"maxLength": row.param.max_length}
    text = {"type": "string", "minLength": 1, **length}
    token = {"type": "integer", "minimum": 0}

    def as_text(items: dict[str, Any]) -> dict[str, Any]:
        return {"anyOf": [items, {"type": "string"}]} if row.param.in_text else items

    kinds: dict[str, dict[str, Any]] = {
        "int": {"type": "integer", **number},
        "float": {"type": "number", **number},
        "bool": {"type": "boolean"},
        "choice": {"enum": list(row.choices)},
        "text": {"type": "string", **length},
        "ints": as_text({"type": "array", "items": token, **count}),
        "tokens": as_text({"type": "array", "items": token, **count}),
        "strings": {"anyOf": [text, {"type": "array", "items": text, **count}]},
        "sequences": as_text({"type": "array", "items": {"type": "array", "items": token, "minItems": 1}, **count}),
        "ranges": as_text({"type": "array", "items": _TOKEN_BAN_RANGE, **count}),
        "order": as_text({"type": "array", "items": {"anyOf": [text, {"type": "integer"}]}, **count}),
        "bias": {"type": "object", "additionalProperties": {"type": "number", **number}},
        "loop": _REPETITION_DETECTION,
        "grammar": FIELD_SCHEMAS.get(name, {}),
    }
    description = f"{doc} Range: {bounds}." if bounds else doc
    return {"anyOf": [kinds[row.kind], {"type": "null"}], "description": description}


_REPETITION_DETECTION = {
    "type": "object",
    "additionalProperties": False,
    "required": ["max_pattern_size", "min_count"],
    "properties": {
        "max_pattern_size": {"type": "integer", "minimum": 0, "maximum": MAX_LOOP_PATTERN},
        "min_pattern_size": {"type": "integer", "minimum": 0, "maximum": MAX_LOOP_PATTERN},
        "min_count": {"type": "integer", "minimum": 0, "maximum": MAX_LOOP_COUNT},
    },
}
_TOKEN_BAN_RANGE = {
    "type": "array",
    "prefixItems": [
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        {"type": "integer", "minimum": 0},
        {"type": "integer", "minimum": 0},
    ],
    "items": False,
    "minItems": 3,
}
