"""What the HTTP server is told when it starts."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from aphrodite.chat.reasoning import ReasoningParserName
from aphrodite.chat.tools.parser import ToolParserName
from aphrodite.config import ServerSettings
from aphrodite.errors import ConfigError
from aphrodite.sampling.presets import PresetLibrary, SamplerPreset, load_presets, shipped_presets


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Settings of one server. Times are seconds, sizes are bytes.

    Attributes:
        api_keys: keys that open every route that is not public; empty lets everyone in.
        admin_keys: keys that open those as well, and what changes the server; empty lets nobody do that.
        allowed_hosts: further `Host` names (loopback names and the bound address are always allowed);
            "*" accepts any, which takes away the protection against DNS rebinding.
        cors_origins: exact origins whose pages may call the API from a browser; "*" is all.
        presets: the sampler presets that requests may name.
        preset: that of requests that name none and whose key has none.
        tool_parser: how answers call tools; None: as the chat template asks for it.
        reasoning_parser: how answers mark reasoning; None: as the chat template says.
        response_store: bytes for the latest answers of /v1/responses, which others may go on from; 0 keeps none.
        root_path: prefix under which a proxy that strips it serves this server; shown in the OpenAPI document.
        shutdown_timeout: how long running requests may go on after SIGTERM.
        request_timeout: longest life of one generation; None is no limit.
        ping_interval: a stream that is silent for so long gets an SSE comment, so that proxies keep it.
        write_timeout: a client that does not read its stream for so long counts as gone.
        stream_resume_seconds: how long a resumable stream waits while nobody listens; 0: there are none.
        health_timeout: how long a round trip through the engine loop may take before `/health` says 503.
    """

    host: str = "127.0.0.1"
    port: int = 2242
    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    root_path: str = ""
    presets: PresetLibrary = field(default_factory=shipped_presets)
    preset: SamplerPreset | None = None
    trust_request_chat_template: bool = False
    tool_parser: ToolParserName | None = None
    reasoning_parser: ReasoningParserName | None = None
    response_store: int = 64 * 2**20
    log_requests: bool = False

    shutdown_timeout: float = 30.0
    request_timeout: float | None = None
    ping_interval: float = 10.0
    write_timeout: float = 60.0
    stream_resume_seconds: float = 60.0
    health_timeout: float = 10.0
    header_timeout: float = 15.0
    body_timeout: float = 60.0
    keep_alive_timeout: float = 30.0

    max_body_bytes: int = 32 * 2**20
    max_header_bytes: int = 32 * 2**10
    max_headers: int = 100
    max_connections: int = 4096
    max_json_depth: int = 32
    max_prompts: int = 1024
    max_messages: int = 4096
    max_stored_responses: int = 4096

    def for_model(self, settings: ServerSettings) -> ServerConfig:
        """This configuration with what one of several models may have for its own.

        Raises:
            ConfigError: there is no preset of the name.
        """
        return replace(
            self,
            preset=_chosen(settings.sampler_preset, self.presets),
            tool_parser=None if settings.tool_parser == "auto" else settings.tool_parser,
            reasoning_parser=None if settings.reasoning_parser == "auto" else settings.reasoning_parser,
        )

    @classmethod
    def from_settings(cls, settings: ServerSettings) -> ServerConfig:
        """The part that users set; bounds of the protocol keep their defaults.

        Raises:
            ConfigError: the file of sampler presets is wrong, or has not the one that is to be used; a host name, an
                origin or the root path is none.
        """
        config = cls(
            host=settings.host,
            port=settings.port,
            api_keys=settings.api_key,
            admin_keys=settings.admin_key,
            allowed_hosts=tuple(map(_host_name, settings.allowed_hosts)),
            cors_origins=tuple(map(_origin, settings.cors_origins)),
            root_path=_root_path(settings.root_path),
            presets=load_presets(
                None if settings.sampler_presets is None else Path(os.path.expanduser(settings.sampler_presets))
            ),
            trust_request_chat_template=settings.trust_request_chat_template,
            response_store=settings.response_store,
            log_requests=settings.log_requests,
            shutdown_timeout=settings.shutdown_timeout,
            request_timeout=settings.request_timeout,
            ping_interval=settings.ping_interval,
            write_timeout=settings.write_timeout,
            stream_resume_seconds=settings.stream_resume_seconds,
            health_timeout=settings.health_timeout,
            max_body_bytes=settings.max_body_bytes,
        )
        return config.for_model(settings)


def _chosen(name: str | None, library: PresetLibrary) -> SamplerPreset | None:
    if name is not None and name not in library.presets:
        raise ConfigError(f"--sampler-preset: there is no preset {name!r}; there are: {', '.join(library.presets)}")
    return None if name is None else library.presets[name]


def _host_name(text: str) -> str:
    """A name as the `Host` header has it, which is compared without its port."""
    if text != "*" and not re.fullmatch(r"[\w.-]+|\[?[0-9a-fA-F:]+\]?", text):
        raise ConfigError(f"--allowed-hosts {text}: write the name alone, without http://, port and path")
    return text


def _origin(text: str) -> str:
    """An origin as browsers send it: in lower case and without a path. Pages opened from a file send `null`."""
    if text in ("*", "null"):
        return text
    if not re.fullmatch(r"[a-zA-Z][\w+.-]*://[^/?#\s]+/?", text):
        raise ConfigError(
            f"--cors-origins {text}: write scheme, host and port of the page as its address begins, such as "
            "http://localhost:8000, without a path"
        )
    return text.rstrip("/").lower()


def _root_path(text: str) -> str:
    if text and not text.startswith("/"):
        raise ConfigError(f"--root-path {text}: has to begin with a slash, as in /{text}")
    return text.rstrip("/")
