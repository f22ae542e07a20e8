"""`GET /v1/presets`, and which sampler preset a request gets."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from aphrodite.sampling.presets import SamplerPreset, preset_card
from aphrodite.server.config import ServerConfig
from aphrodite.server.context import ServerContext
from aphrodite.server.errors import invalid
from aphrodite.server.responses import json_response


def preset_of(request: Request, name: str | None, config: ServerConfig) -> SamplerPreset | None:
    """The preset that the request names, else that of its API key, else the server's; None where there is none.

    Raises:
        ApiError: 400, there is no such preset.
    """
    library = config.presets
    if name is None:
        return library.of_key.get(request.scope["state"].get("api_key_digest"), config.preset)
    preset = library.presets.get(name)
    if preset is None:
        raise invalid("preset", f"there is no preset {name!r}; there are: {', '.join(library.presets)[:1000]}")
    return preset


class PresetsEndpoint:
    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def list(self, request: Request) -> Response:
        """The sampler presets that a request may name."""
        cards = [preset_card(preset) for preset in self._context.config.presets.presets.values()]
        return json_response({"object": "list", "data": cards})
