"""What clients of TabbyAPI and llama.cpp ask before they use a server, and the page that lists all paths."""

from __future__ import annotations

from pathlib import Path

from fake_engine import BOS
from running import RunningServer, running_server

from aphrodite.server.api_page import api_page


async def test_what_tabbys_clients_read(server: RunningServer) -> None:
    card = (await server.http.get("/v1/model")).json()
    assert card["id"] == "fake/story"
    assert (card["parameters"]["max_seq_len"], card["parameters"]["max_batch_size"]) == (512, 4)
    assert card["parameters"]["cache_size"] == 2048
    names = [entry["id"] for entry in (await server.http.get("/v1/model/list")).json()["data"]]
    assert names == ["fake/story", "story-alias"]
    assert (await server.http.get("/v1/auth/permission")).json() == {"permission": "api"}
    encoded = (await server.http.post("/v1/token/encode", json={"text": "ab"})).json()
    assert encoded == {"tokens": [BOS, 97, 98], "length": 3}
    bare = (await server.http.post("/v1/token/encode", json={"text": "ab", "add_bos_token": False})).json()
    assert bare["tokens"] == [97, 98]
    chat = (await server.http.post("/v1/token/encode", json={"text": [{"role": "user", "content": "Hi"}]})).json()
    assert bytes(chat["tokens"]).decode() == "user: Hi"
    decoded = await server.http.post("/v1/token/decode", json={"tokens": [BOS, 97], "decode_special_tokens": False})
    assert decoded.json() == {"text": "a"}


async def test_what_llama_cpps_clients_read(server: RunningServer) -> None:
    props = (await server.http.get("/props")).json()
    assert (props["default_generation_settings"]["n_ctx"], props["total_slots"]) == (512, 4)
    assert (props["bos_token"], props["eos_token"], props["model_alias"]) == ("<s>", "</s>", "fake/story")
    slots = (await server.http.get("/slots")).json()
    assert [slot["is_processing"] for slot in slots] == [False] * 4
    assert (await server.http.post("/tokenize", json={"content": "ab"})).json() == {"tokens": [97, 98]}
    with_start = await server.http.post("/tokenize", json={"content": "ab", "add_special": True})
    assert with_start.json() == {"tokens": [BOS, 97, 98]}
    assert (await server.http.post("/detokenize", json={"tokens": [97]})).json()["content"] == "a"
    assert (await server.http.post("/tokenize", json={"prompt": "ab"})).json()["count"] == 3  # vLLM's, as ever


async def test_the_service_tells_its_protocols(server: RunningServer) -> None:
    info = (await server.http.get("/.well-known/serviceinfo")).json()
    assert info["software"]["name"] == "Aphrodite Engine"
    assert info["api"]["koboldai"]["rel_url"] == "/api"


async def test_probes_need_a_key_where_there_are_keys() -> None:
    async with running_server(api_keys=("right",)) as server:
        for path in ("/v1/model", "/props", "/slots", "/v1/auth/permission", "/api/extra/version"):
            assert (await server.http.get(path)).status_code == 401, path
            allowed = await server.http.get(path, headers={"x-api-key": "right"})
            assert allowed.status_code == 200, path


async def test_wrong_bodies_name_the_field(server: RunningServer) -> None:
    for path, body, param in (
        ("/v1/token/encode", {}, "text"),
        ("/v1/token/encode", {"text": 3}, "text"),
        ("/v1/token/decode", {"tokens": [999]}, "tokens"),
        ("/tokenize", {"content": 3}, "content"),
    ):
        response = await server.http.post(path, json=body)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param


def test_the_committed_page_of_all_paths_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "api.md"
    assert page.read_text("utf-8") == api_page(), "run: python -m aphrodite.server.api_page > docs/api.md"
