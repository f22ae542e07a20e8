"""Sampler presets over HTTP: by request, by key, as the server's default; what they force is said."""

from __future__ import annotations

from typing import Any

import pytest
from fake_engine import FakeEngine, FakeModel
from running import running_server

from aphrodite.config import ServerSettings
from aphrodite.errors import ConfigError
from aphrodite.sampling.params import SamplingParams
from aphrodite.server.config import ServerConfig

FILE = """
presets:
  cold: {about: Cold., override: {temperature: 0.1, top_k: 7}}
  strict: {force: {temperature: 0.2}}
keys: {strict-key: strict}
"""
CHAT = {"messages": [{"role": "user", "content": "Tell"}], "max_tokens": 2}


@pytest.fixture
def settings(tmp_path: Any) -> dict[str, Any]:
    """The server's settings with `FILE`, as `ServerConfig` takes them."""
    file = tmp_path / "presets.yaml"
    file.write_text(FILE)
    config = ServerConfig.from_settings(ServerSettings(sampler_presets=str(file), sampler_preset="cold"))
    return {"presets": config.presets, "preset": config.preset}


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/completions", {"prompt": "Tell", "max_tokens": 2}), ("/v1/chat/completions", CHAT)]
)
async def test_a_request_names_a_preset(path: str, body: dict[str, Any], settings: dict[str, Any]) -> None:
    engine = FakeEngine()
    engine.model = FakeModel(sampling_defaults=SamplingParams(temperature=0.6, min_p=0.3))
    async with running_server(engine, **settings) as server:
        for fields, expected in (
            ({}, (0.1, 7, 0.3)),
            ({"preset": None, "top_k": 9}, (0.1, 9, 0.3)),
            ({"preset": "balanced"}, (1.0, 0, 0.05)),
            ({"preset": "balanced", "min_p": 0.2}, (1.0, 0, 0.2)),
        ):
            response = await server.http.post(path, json={**body, **fields})
            assert response.status_code == 200, response.text
            params = engine.seen[-1][1]
            assert (params.temperature, params.top_k, params.min_p) == expected, fields
            assert "warnings" not in response.json()
            assert "x-ignored-fields" not in response.headers


async def test_what_a_preset_forces_is_said(settings: dict[str, Any]) -> None:
    async with running_server(**settings) as server:
        response = await server.http.post("/v1/chat/completions", json={**CHAT, "preset": "strict", "temperature": 1.5})
        assert server.engine.seen[-1][1].temperature == 0.2
        (warning,) = response.json()["warnings"]
        assert "`temperature` is set by the preset 'strict'" in warning


async def test_a_key_has_a_preset_of_its_own(settings: dict[str, Any]) -> None:
    async with running_server(**settings, api_keys=("strict-key", "other")) as server:
        for key, temperature in (("strict-key", 0.2), ("other", 0.1)):
            headers = {"authorization": f"Bearer {key}"}
            response = await server.http.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert response.status_code == 200, response.text
            assert server.engine.seen[-1][1].temperature == temperature


async def test_presets_are_listed_and_an_unknown_one_is_refused(settings: dict[str, Any]) -> None:
    async with running_server(**settings) as server:
        listed = (await server.http.get("/v1/presets")).json()
        cards = {card["id"]: card for card in listed["data"]}
        assert cards["cold"] == {
            "id": "cold",
            "object": "sampler_preset",
            "about": "Cold.",
            "default": {},
            "override": {"temperature": 0.1, "top_k": 7},
            "force": {},
        }
        assert "roleplay" in cards
        for name in ("nothing", ""):
            response = await server.http.post("/v1/chat/completions", json={**CHAT, "preset": name})
            assert response.status_code == 400
            assert response.json()["error"]["param"] == "preset"
        assert not server.engine.seen


def test_the_servers_default_has_to_exist() -> None:
    with pytest.raises(ConfigError, match="there is no preset 'nothing'"):
        ServerConfig.from_settings(ServerSettings(sampler_preset="nothing"))


def test_presets_in_the_home_of_nobody_are_not_there() -> None:
    with pytest.raises(ConfigError, match=r"~nobody-of-this-name/presets\.yaml"):
        ServerConfig.from_settings(ServerSettings(sampler_presets="~nobody-of-this-name/presets.yaml"))
