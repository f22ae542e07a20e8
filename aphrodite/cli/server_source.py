"""A running server as a source of text. A module of its own, since HTTP and its parsers are slow to import."""

from __future__ import annotations

import contextlib
import http.client
import json
import urllib.parse
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from aphrodite.cli.sources import Message, Piece
from aphrodite.errors import AphroditeError, ConfigError, InvalidRequestError
from aphrodite.sampling.fields import from_mapping, to_mapping
from aphrodite.sampling.params import SamplingParams


class ServerSource:
    """A running server that speaks OpenAI's protocol."""

    interruptible = True

    def __init__(self, url: str, *, api_key: str | None = None, model: str | None = None) -> None:
        """
        Args:
            url: base address, with or without a path such as `/v1`.
            model: name to ask for; None takes the first that the server lists.

        Raises:
            ConfigError: the address is not an HTTP address.
            AphroditeError: the server cannot be reached or refuses.
        """
        parts = urllib.parse.urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url: {url!r} is not an address; expected one such as http://127.0.0.1:2242.")
        self._secure = parts.scheme == "https"
        self._host = parts.hostname
        try:
            self._port = parts.port
        except ValueError:
            raise ConfigError(f"--url: {url!r} has a port that is not a number from 0 to 65535.") from None
        self._address = f"{parts.scheme}://{parts.netloc}"
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self.model = model or self._first_model()

    @cached_property
    def sampling_defaults(self) -> SamplingParams:
        """What the server says of the model; a server of another kind says nothing."""
        card = next((card for card in self._models() if card.get("id") == self.model), {})
        defaults = card.get("sampling_defaults")
        try:
            return from_mapping(defaults if isinstance(defaults, dict) else {})
        except InvalidRequestError as error:
            raise AphroditeError(
                f"the server at {self._address} names sampling defaults that are none: {error}"
            ) from None

    def chat(self, messages: Sequence[Message], params: SamplingParams, *, continues: bool = False) -> Iterator[Piece]:
        body: dict[str, object] = {"messages": list(messages)}
        if continues:
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        return self._stream("/v1/chat/completions", body, params)

    def complete(self, prompt: str, params: SamplingParams) -> Iterator[Piece]:
        return self._stream("/v1/completions", {"prompt": prompt}, params)

    def close(self) -> None:
        """Nothing stays open between requests."""

    def _first_model(self) -> str:
        models = self._models()
        if not models:
            raise AphroditeError(f"the server at {self._address} offers no model.")
        return str(models[0]["id"])

    def _models(self) -> list[dict[str, Any]]:
        with self._request("GET", "/v1/models", None) as response:
            models: list[dict[str, Any]] = json.load(response).get("data", [])
        return models

    def _stream(self, path: str, body: dict[str, object], params: SamplingParams) -> Iterator[Piece]:
        # Values that the server would replace by the model's have to be said, general defaults or not.
        said = {name: getattr(params, name) for name in to_mapping(self.sampling_defaults)}
        body = {"model": self.model, "stream": True, **body, **said, **to_mapping(params)}
        with self._request("POST", path, body) as response:
            for line in response:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise AphroditeError(f"the server ended the answer: {event['error'].get('message')}")
                for choice in event.get("choices", ()):
                    delta = choice.get("delta") or {}
                    thought = delta.get("reasoning_content") or delta.get("reasoning")
                    if thought:
                        yield Piece(thought, 1, thought=True)
                    text = choice.get("text") or delta.get("content")
                    yield Piece(text or "", 1 if text else 0, choice.get("finish_reason"))

    @contextlib.contextmanager
    def _request(self, method: str, path: str, body: object) -> Iterator[http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=600)
        try:
            payload = None if body is None else json.dumps(body).encode()
            connection.request(method, self._base + path, body=payload, headers=self._headers)
            response = connection.getresponse()
            if response.status != 200:
                raise AphroditeError(f"the server at {self._address} answered {response.status}: {_reason(response)}")
            yield response
        except (OSError, http.client.HTTPException) as error:
            raise AphroditeError(f"cannot talk to the server at {self._address}: {error}. Is it running?") from None
        finally:
            connection.close()


def _reason(response: http.client.HTTPResponse) -> str:
    text = response.read(65536).decode("utf-8", "replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text.strip()[:200] or response.reason
