"""`GET /v1/models` and `GET /v1/models/{id}`."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from aphrodite.sampling.params import to_mapping
from aphrodite.server.context import ServerContext
from aphrodite.server.responses import json_response


class ModelsEndpoint:
    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def list(self, request: Request) -> Response:
        """The names this server answers to."""
        cards = [self._card(name) for name in self._context.model_names]
        return json_response({"object": "list", "data": cards})

    async def show(self, request: Request) -> Response:
        """One model."""
        return json_response(self._card(self._context.resolve_model(request.path_params["model_id"])))

    def _card(self, name: str) -> dict[str, Any]:
        model = self._context.engine.model
        first = self._context.model_names[0]
        return {
            "id": name,
            "object": "model",
            "created": model.created,
            "owned_by": "aphrodite",
            "root": model.root,
            "parent": None if name == first else first,
            "max_model_len": model.max_model_len,
            "sampling_defaults": to_mapping(model.sampling_defaults),
        }
