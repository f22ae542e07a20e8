"""Settings of the server that are names of their own: hosts, origins, the root path."""

from __future__ import annotations

import pytest

from aphrodite.config import ServerSettings
from aphrodite.errors import ConfigError
from aphrodite.server.config import ServerConfig


def made(**values: object) -> ServerConfig:
    return ServerConfig.from_settings(ServerSettings(**values))  # type: ignore[arg-type]


def test_names_as_browsers_and_proxies_send_them() -> None:
    config = made(
        allowed_hosts=("*", "models.example.org", "host_1", "[::1]", "fe80::1"),
        cors_origins=("*", "null", "http://LocalHost:8000/", "https://lite.koboldai.net", "app+x://page"),
        root_path="/llm/",
    )
    assert config.allowed_hosts == ("*", "models.example.org", "host_1", "[::1]", "fe80::1")
    assert config.cors_origins[2:] == ("http://localhost:8000", "https://lite.koboldai.net", "app+x://page")
    assert config.root_path == "/llm"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("allowed_hosts", ("http://models.example.org",)),
        ("allowed_hosts", ("models.example.org:2242",)),
        ("allowed_hosts", ("a b",)),
        ("cors_origins", ("lite.koboldai.net",)),
        ("cors_origins", ("https://lite.koboldai.net/page",)),
        ("root_path", "llm"),
    ],
)
def test_what_would_never_match_is_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match="--" + name.replace("_", "-")):
        made(**{name: value})
