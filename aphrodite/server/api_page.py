"""`docs/api.md`: which path speaks what, from the routes.

python -m aphrodite.server.api_page > docs/api.md
"""

from __future__ import annotations

import inspect
import sys
from typing import Any, cast

from starlette.routing import Route

from aphrodite.server.app import route_groups
from aphrodite.server.config import ServerConfig
from aphrodite.server.context import ServerContext
from aphrodite.server.lifecycle import Lifecycle
from aphrodite.server.metrics import ServerMetrics
from aphrodite.server.resumable import StreamStore
from aphrodite.server.supervise import Supervisor

_HEAD = """\
# The API

Several protocols share one server and one port; every one of them takes every sampling parameter of
[samplers.md](samplers.md), and what it sends becomes the same internal request. Fields in full: `/docs` of a running
server, offline.

Errors have the shape that a path's own clients expect: OpenAI's everywhere but where a section says otherwise. Keys
(`--api-key`) open every path alike, as `Authorization: Bearer KEY` or `X-API-Key: KEY`; `/health`, `/` and `/docs` need
none. What changes the server (loading, unloading, fetching and removing models) needs the `--admin-key`, also as
`X-Admin-Key: KEY`, and is closed without one.

A `model` field chooses among several models, and loads what it names: [several_models.md](several_models.md). Where the
protocol has no such field, or a request leaves it out, the one used last is meant.

Bodies are JSON, sent with `Content-Type: application/json`. A request that comes from no web page may leave the type
out, and name any on Ollama's paths, where `curl -d` is customary.

This page is made from the routes: `python -m aphrodite.server.api_page > docs/api.md`.
"""

_NOTES = {
    "OpenAI": """\
`/v1/models` is also what clients of TabbyAPI, koboldcpp and llama.cpp read. Chat answers have `tool_calls` and, beside
their text, `reasoning_content`: [templates.md](templates.md#reasoning-tools-documents). `/v1/responses` keeps its
latest answers in memory for `previous_response_id`, apart for each API key; functions are the only tools.
`/v1/embeddings` pools as the checkpoint says, a decoder that says nothing at its last token; `pooling` (mean, last,
cls) and `normalize` choose otherwise.""",
    "Aphrodite": """\
`/health` goes through the engine's loop: an engine that hangs is not healthy. A stream that was asked for with
`resumable` numbers its events; a client that lost it goes on at `/v1/streams/{id}`, with the response's id and
`Last-Event-ID`, for `--stream-resume-seconds`.""",
    "vLLM; llama.cpp": """\
vLLM's clients send `prompt` and read `count` and `tokens`; llama.cpp's send `content`, and read `tokens` or, of
`/detokenize`, `content`. Both are answered.""",
    "vLLM": """\
A loaded adapter is asked for by its name as `model`, on every path that has the field: [lora.md](lora.md). Both paths
need the admin key.""",
    "TabbyAPI": """\
`/v1/token/encode` takes a text or a list of messages. `/v1/model/load` and `download` answer with events that tell how
far they are.""",
    "llama.cpp": """\
A slot stands for each answer that can run at once; requests are not bound to one. `/models` tells of each model whether
it is loaded. Errors are llama.cpp's: `code` is the status; `param`, which field is wrong, stands beside.""",
    "KoboldAI": """\
KoboldAI's API with koboldcpp's additions. `memory` stands before the prompt, which loses its beginning to make room;
`genkey` names a run for `check` and `abort`. What a request leaves open is the model's recommendation, not koboldcpp's
fixed values, and `max_length` is 512. Errors are `{"detail": {"msg", "type", "param"}}`; in a stream they come as
`event: error`.""",
    "Anthropic": """\
A last message of the assistant is continued. Blocks are text, `tool_use`, `tool_result` (a failed one's text begins
with `Error: `) and `thinking`, whose signatures are ours; another server's are taken, and its `redacted_thinking` is
left out. Tools are those that clients run themselves. Thinking is off unless `thinking` says otherwise; `budget_tokens`
is [`thinking_token_budget`](samplers.md#thinking_token_budget), of any size. Arguments of a call that was cut off come
as `{"INVALID_JSON": text}`. `output_config` has `effort` and a `format` of kind `json_schema`. Sampling parameters go
by their own names. Errors are `{"type": "error", "error": {"type", "message"}}`.""",
    "Ollama": """\
Sampling parameters stand in `options`, all of them under any of their names; `num_predict` below 0 is no limit. Streams
are lines of JSON, and errors `{"error"}`. `tools` are called in `tool_calls`, each whole; results without an id belong
to the first open call of their `tool_name`. `think` is true, false or a level; left out, models that can think do, and
`thinking` has it. `capabilities` names tools where the template is made for them; other models are told of tools in the
system message. Names may end in `:latest`. Models are pulled from the Hugging Face hub:
`ORG/NAME:Q4_K_M`, with or without `hf.co/` before it.""",
}


def api_page() -> str:
    """The page as Markdown."""
    lifecycle, config = Lifecycle(), ServerConfig()
    models = cast(Any, None)  # routes are made, and none is called
    supervisor = Supervisor(lifecycle, config)
    streams = StreamStore(config.stream_resume_seconds, supervisor, write_timeout=config.write_timeout)
    context = ServerContext(models, config, ServerMetrics(), lifecycle, supervisor, streams)
    parts = [_HEAD]
    for group in route_groups(context):
        rows = [f"| {_method(route)} | `{route.path}` | {_summary(route.endpoint)} |" for route in group.routes]
        note = _NOTES.get(group.protocol)
        heading = f"## {group.protocol}\n\n" + (f"{note}\n\n" if note else "")
        parts.append(heading + "\n".join(["| | path | |", "| --- | --- | --- |", *rows]) + "\n")
    return "\n".join(parts)


def _method(route: Route) -> str:
    return ", ".join(sorted((route.methods or set()) - {"HEAD"}))


def _summary(endpoint: object) -> str:
    return (inspect.getdoc(endpoint) or "").partition("\n")[0].replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(api_page())
