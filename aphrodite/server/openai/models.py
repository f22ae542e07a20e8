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
        cards = [self._card(name) for name in self._context.models.names]
        return json_response({"object": "list", "data": cards})

    async def show(self, request: Request) -> Response:
        """One model."""
        return json_response(self._card(request.path_params["model_id"]))

    def _card(self, name: str) -> dict[str, Any]:
        served = self._context.models.find(name)
        first, facts = served.names[0], served.facts
        card = {
            "id": name,
            "object": "model",
            "created": served.created,
            "owned_by": "aphrodite",
            "parent": None if name == first else first,
        }
        if facts is None:
            return card
        return {
            **card,
            "root": facts.model.root,
            "max_model_len": facts.model.max_model_len,
            "sampling_defaults": to_mapping(facts.model.sampling_defaults),
        }
