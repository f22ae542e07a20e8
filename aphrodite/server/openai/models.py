"""`GET /v1/models` and `GET /v1/models/{id}`."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from aphrodite.sampling.fields import to_mapping
from aphrodite.server.adapters import adapter_card
from aphrodite.server.context import ServerContext
from aphrodite.server.responses import json_response
from aphrodite.server.served_model import ServedModel


class ModelsEndpoint:
    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def list(self, request: Request) -> Response:
        """The names this server answers to."""
        self._context.models.refresh()
        names = [name for served in self._context.models.models for name in (*served.names, *served.adapter_names)]
        cards = [self._card(name) for name in names]
        return json_response({"object": "list", "data": cards})

    async def show(self, request: Request) -> Response:
        """One model."""
        return json_response(self._card(request.path_params["model_id"]))

    def _card(self, name: str) -> dict[str, Any]:
        served = self._context.models.find(name)
        first, facts = served.names[0], served.facts
        card: dict[str, Any] = {
            "id": name,
            "object": "model",
            "created": served.created,
            "owned_by": "aphrodite",
            "parent": None if name == first else first,
        }
        if self._context.models.loads:
            card["status"] = _status(served)
        if facts is not None:
            card |= {
                "root": facts.root,
                "max_model_len": facts.max_model_len,
                "sampling_defaults": to_mapping(facts.sampling_defaults),
            }
        return card if name in served.names else {**card, **adapter_card(served, name)}


def _status(model: ServedModel) -> dict[str, Any]:
    """Whether the model is loaded, as llama.cpp's router says it."""
    failed = {} if model.failure is None else {"failed": True, "message": model.failure.error.message}
    latest = model.progress.latest
    progress = {} if latest is None else {"bytes": latest.done, "total_bytes": latest.total}
    return {"value": model.state, **failed, **progress}
