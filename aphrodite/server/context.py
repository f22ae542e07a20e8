"""What every endpoint of one server shares."""

from __future__ import annotations

from dataclasses import dataclass

from aphrodite.server.config import ServerConfig
from aphrodite.server.engine import Engine
from aphrodite.server.errors import ApiError
from aphrodite.server.lifecycle import Lifecycle
from aphrodite.server.metrics import ServerMetrics
from aphrodite.server.supervise import Supervisor


@dataclass(frozen=True, slots=True)
class ServerContext:
    engine: Engine
    config: ServerConfig
    metrics: ServerMetrics
    lifecycle: Lifecycle
    supervisor: Supervisor

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names the model answers to; the first is its own."""
        model = self.engine.model
        return self.config.served_model_name or (model.name, *model.aliases)

    def resolve_model(self, name: str | None) -> str:
        """The name to answer under; None is the model's own.

        Raises:
            ApiError: 404, no such model.
        """
        names = self.model_names
        if name is None:
            return names[0]
        if name not in names:
            raise ApiError(
                404,
                f"The model {name[:200]!r} does not exist here. This server has: {', '.join(names)}.",
                param="model",
                code="model_not_found",
            )
        return name
