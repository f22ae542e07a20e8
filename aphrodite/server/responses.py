"""JSON responses."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response

from aphrodite.server.errors import Headers


def json_response(content: Any, headers: Headers = ()) -> Response:
    """200 with `content`, which may be encoded already, and further headers."""
    body = content if isinstance(content, bytes) else msgspec.json.encode(content)
    shown = {name.decode(): value.decode() for name, value in headers}
    return Response(body, media_type="application/json", headers=shown)
