"""Typed reading of a model's configuration: config.json and the like, or GGUF metadata.

Whoever reads a key says what it must be; what the file holds instead ends in one line that names the
file, the key, what was expected and what was found.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar, overload

import numpy as np

from aphrodite.errors import ModelFormatError
from aphrodite.loading.files import read_small_file

T = TypeVar("T", bool, int, float, str)
V = TypeVar("V")


class _Required:
    """Marks a key without a default."""


REQUIRED: Final = _Required()
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class ConfigReader:
    """Reads typed values out of a mapping that nobody has checked yet.

    Args:
        source: the file, for error messages.
        values: the mapping as it was parsed.
        prefix: put before every key, in look-ups and messages (`"llama."` for GGUF metadata).
    """

    def __init__(self, source: str | Path, values: Mapping[str, object], *, prefix: str = "", label: str = "") -> None:
        self.source = str(source)
        self._values = values
        self._prefix = prefix
        self._label = label  # path of a nested object, for messages

    @classmethod
    def from_file(cls, path: Path) -> ConfigReader:
        """A JSON object in a file.

        Raises:
            ModelFormatError: the file is missing, is not JSON, or is not an object.
        """
        return cls(path, load_json_object(path))

    def with_defaults(self, defaults: Mapping[str, object]) -> ConfigReader:
        """The same with values for keys that are absent."""
        values = {**{self._prefix + key: value for key, value in defaults.items()}, **self._values}
        return ConfigReader(self.source, values, prefix=self._prefix, label=self._label)

    def has(self, key: str) -> bool:
        """Whether the key is present, even as null."""
        return self._prefix + key in self._values

    def is_set(self, key: str) -> bool:
        """Whether the key is present and neither null, false, zero nor empty."""
        return bool(self._values.get(self._prefix + key))

    @property
    def keys(self) -> list[str]:
        """All keys, in order."""
        return [key.removeprefix(self._prefix) for key in self._values if key.startswith(self._prefix)]

    @overload
    def read(self, key: str, expected: type[T], *, low: float = ..., high: float = ...) -> T: ...
    @overload
    def read(self, key: str, expected: type[T], default: T, *, low: float = ..., high: float = ...) -> T: ...
    @overload
    def read(self, key: str, expected: type[T], default: None, *, low: float = ..., high: float = ...) -> T | None: ...
    def read(
        self,
        key: str,
        expected: type[T],
        default: T | _Required | None = REQUIRED,
        *,
        low: float = -math.inf,
        high: float = math.inf,
    ) -> T | None:
        """The value of `key`, or `default` when the key is absent or null.

        A whole number is accepted where a number is expected; nothing else is converted. `low` and
        `high` are inclusive and apply to the file's values only.

        Raises:
            ModelFormatError: absent without a default, of another type, not finite or out of bounds.
        """
        value = self._values.get(self._prefix + key)
        if value is None:
            if isinstance(default, _Required):
                raise ModelFormatError(
                    f"{self.source}: {self._name(key)} is missing; the model cannot be described without it"
                )
            return default
        if expected is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000:
            value = float(value)
        if type(value) is not expected or not _inside(value, low, high):
            raise self.wrong(key, _expectation(expected, low, high), value)
        return value

    def choice(self, key: str, choices: Mapping[str, V], default: str) -> V:
        """The value that `choices` gives for the text under `key`.

        Raises:
            ModelFormatError: the text is none of the choices.
        """
        name = self.read(key, str, default)
        if name not in choices:
            raise self.wrong(key, "one of " + ", ".join(sorted(choices)), name)
        return choices[name]

    def section(self, key: str) -> ConfigReader | None:
        """The object under `key`, or None when it is absent, null or empty.

        Raises:
            ModelFormatError: it is not an object.
        """
        value = self._values.get(self._prefix + key)
        if value is None or value == {}:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(key, "an object", value)
        return ConfigReader(self.source, value, label=self._name(key) + ".")

    def sections(self) -> list[ConfigReader]:
        """The objects under all keys, in order; what is no object is passed over."""
        found = (self.section(key) for key, value in self._values.items() if isinstance(value, Mapping))
        return [section for section in found if section is not None]

    def strings(self, key: str) -> list[str]:
        """A list of texts; empty when it is absent or null.

        Raises:
            ModelFormatError: it is anything else.
        """
        value = self._values.get(self._prefix + key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "a list of texts", value)
        return value

    def integers(self, key: str, *, low: int, high: int) -> list[int]:
        """One whole number or a list (in GGUF, an array) of them; empty when it is absent or null.

        Raises:
            ModelFormatError: it is anything else, or one is out of bounds (inclusive).
        """
        value = self._values.get(self._prefix + key)
        if value is None:
            return []
        items = _items(value)
        found = [item for item in items if type(item) is int and low <= item <= high]
        if len(found) < len(items):
            raise self.wrong(key, _expectation(int, low, high) + " or a list of such", value)
        return found

    def flags(self, key: str) -> list[bool]:
        """The truth values of a list or array; empty when the key is absent or holds no such."""
        items = _items(self._values.get(self._prefix + key))
        return [item for item in items if isinstance(item, bool)] if len(items) > 1 else []

    def numbers(self, key: str, *, low: float, high: float) -> list[float]:
        """A list of numbers; empty when it is absent or null.

        Raises:
            ModelFormatError: it is anything else, or one is out of bounds (inclusive).
        """
        value = self._values.get(self._prefix + key)
        if value is None:
            return []
        items: list[object] = value if isinstance(value, list) else [None]
        found = [float(item) for item in items if type(item) is int or type(item) is float]
        found = [item for item in found if low <= item <= high]
        if len(found) < len(items):
            raise self.wrong(key, "a list in which each is " + _expectation(float, low, high), value)
        return found

    def wrong(self, key: str, expected: str, found: object) -> ModelFormatError:
        """The error for a key that is not what it should be."""
        return ModelFormatError(
            f"{self.source}: {self._name(key)} should be {expected}, but is {_describe(found)}; "
            "the configuration is damaged or describes a model that is not supported"
        )

    def _name(self, key: str) -> str:
        return self._label + self._prefix + key


def load_json_object(path: Path) -> dict[str, object]:
    """A file that holds one JSON object.

    Raises:
        ModelFormatError: the file is missing, too large, not JSON, or not an object.
    """
    return parse_json_object(read_small_file(path), str(path))


def parse_json_object(data: bytes, source: str) -> dict[str, object]:
    """The JSON object in `data`; a name that appears twice is refused.

    Raises:
        ModelFormatError: not JSON, or not an object.
    """
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error).replace("\n", " ")
        raise ModelFormatError(f"{source} is not valid JSON: {reason}; download it again") from None
    if not isinstance(value, dict):
        raise ModelFormatError(f"{source} should hold a JSON object, but holds {_describe(value)}")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:80]!r} appears twice")
    return found


def _items(value: object) -> list[object]:
    """Of a list or an array its items, of anything else itself."""
    if isinstance(value, np.ndarray):
        return list(value.tolist())
    return value if isinstance(value, list) else [value]


def _inside(value: bool | int | float | str, low: float, high: float) -> bool:
    if isinstance(value, str):
        return True
    return low <= value <= high and value not in (math.inf, -math.inf)


def _expectation(expected: type, low: float, high: float) -> str:
    kind = _KINDS[expected]
    if expected not in (int, float) or (low == -math.inf and high == math.inf):
        return kind
    if high == math.inf:
        return f"{kind} of at least {_plain(low)}"
    return f"{kind} from {_plain(low)} to {_plain(high)}" if low > -math.inf else f"{kind} of at most {_plain(high)}"


def _plain(bound: float) -> str:
    return str(int(bound)) if bound == int(bound) and abs(bound) < 1e12 else f"{bound:g}"


def _describe(found: object) -> str:
    if found is None:
        return "null"
    if isinstance(found, Mapping):
        return "an object"
    if isinstance(found, np.ndarray) or (isinstance(found, Sequence) and not isinstance(found, str)):
        return f"a list of {len(found)}"
    text = json.dumps(found) if isinstance(found, str | bool) else str(found)
    return text if len(text) <= 80 else text[:77] + "..."
