"""A setting and its values: what is known of it, how text becomes a value of its type, and the checks.

What people write in flags, variables and YAML is read here, sizes with a suffix and times with units among it, and
written so that it reads back the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from aphrodite.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from aphrodite.config import EngineConfig, ServerSettings

ENV_PREFIX = "APHRODITE_"

Unit = Literal["plain", "tokens", "bytes", "seconds"]


class SettingMeta(NamedTuple):
    """What a field says of itself beyond its type and default."""

    help: str
    group: str
    ge: float | None = None
    le: float | None = None
    choices: tuple[int, ...] = ()
    unit: Unit = "plain"
    example: str = ""
    secret: bool = False


Kind = Literal["bool", "int", "float", "str", "choice", "list"]


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the settings table."""

    name: str
    owner: type[EngineConfig] | type[ServerSettings]
    kind: Kind
    optional: bool  # None is a value: automatic, or none
    default: Any
    choices: tuple[Any, ...]
    meta: SettingMeta

    @property
    def help(self) -> str:
        return self.meta.help

    @property
    def group(self) -> str:
        return self.meta.group

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.name.upper()

    @property
    def default_text(self) -> str:
        """The default as a person writes it in YAML."""
        return format_value(self, self.default)


def parse_value(setting: Setting, value: object, origin: str) -> Any:
    """Turn text or a YAML value into the setting's type and check its bounds.

    Raises:
        ConfigError: names `origin`, what is wrong and what is accepted.
    """
    if value is None or (setting.optional and setting.kind != "str" and value in ("auto", "none")):
        if not setting.optional:
            raise ConfigError(f"{origin}: needs a value; expected {_accepted(setting)}.")
        return None
    try:
        parsed = _PARSERS[setting.kind](setting, value)
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}; expected {_accepted(setting)}.") from None
    problem = _problem(setting, parsed)
    if problem:
        raise ConfigError(f"{origin}: {problem}")
    return parsed


def format_value(setting: Setting, value: Any) -> str:
    """`value` as text that `parse_value` and YAML read back."""
    if value is None:
        return "null" if setting.kind == "str" else "auto"
    if setting.kind == "bool":
        return "true" if value else "false"
    if setting.kind == "list":
        return "[" + ", ".join(_quoted(item) for item in value) + "]"
    if setting.meta.unit == "bytes":
        return format_bytes_exactly(value)
    return _quoted(value) if setting.kind == "str" else str(value)


def format_bytes_exactly(size: int) -> str:
    """`size` with the largest binary suffix that loses nothing (`32MiB`, `1000`)."""
    for suffix, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale and size % scale == 0:
            return f"{size // scale}{suffix}"
    return str(size)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _accepted(setting: Setting) -> str:
    """What a value may be, for the end of an error message."""
    meta = setting.meta
    if setting.choices:
        return "one of " + ", ".join(str(choice) for choice in setting.choices)
    if setting.kind == "bool":
        return "true or false"
    if setting.kind == "list":
        return "texts, separated by commas"
    if setting.kind == "str":
        return "text (quote it in YAML)"
    bounds = ""
    if meta.ge is not None and meta.le is not None:
        bounds = f" from {meta.ge} to {meta.le}" if meta.le < 2**31 - 1 else f" of at least {meta.ge}"
    what = _UNIT_TEXT[meta.unit]
    return what + bounds + (", or auto" if setting.optional else "")


_UNIT_TEXT: dict[Unit, str] = {
    "plain": "a number",
    "tokens": "a number of tokens such as 4096, 32k or 32K",
    "bytes": "a size such as 4GiB",
    "seconds": "a number of seconds, or a time such as 5m",
}


def _problem(setting: Setting, value: Any) -> str | None:
    """What is wrong with a value of the right type, as a whole sentence, or None."""
    if setting.choices and value not in setting.choices:
        guess = did_you_mean(str(value), [str(choice) for choice in setting.choices])
        return f"{value!r} is not known; expected {_accepted(setting)}.{guess}"
    meta = setting.meta
    if (meta.ge is not None and value < meta.ge) or (meta.le is not None and value > meta.le):
        return f"{value} is out of range; expected {_accepted(setting)}."
    return None


def check_value(setting: Setting, value: object) -> None:
    """Check a value given in Python, where nothing was parsed.

    Raises:
        ConfigError: it is not of the setting's type, or out of bounds.
    """
    if value is None and setting.optional:
        return
    expected = {"bool": bool, "int": int, "float": (int, float), "str": str, "list": tuple}.get(setting.kind, object)
    wrong_bool = isinstance(value, bool) and setting.kind != "bool"
    if wrong_bool or not isinstance(value, expected):  # type: ignore[arg-type]
        raise ConfigError(f"{setting.name}: {value!r} is not accepted; expected {_accepted(setting)}.")
    if isinstance(value, tuple) and not all(isinstance(item, str) and item for item in value):
        raise ConfigError(f"{setting.name}: {value!r} must hold texts only, and no empty ones.")
    problem = _problem(setting, value)
    if problem:
        raise ConfigError(f"{setting.name}: {problem}")


def _parse_bool(setting: Setting, value: object) -> bool:
    words = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ValueError(f"{value!r} is neither true nor false")


def _parse_int(setting: Setting, value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a whole number")
    return parse_scaled(value, _SCALES[setting.meta.unit])


def _parse_float(setting: Setting, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{value!r} is not a number")
    try:
        seconds = parse_duration(value) if isinstance(value, str) and setting.meta.unit == "seconds" else None
        number = float(value) if seconds is None else seconds
    except ValueError:
        raise ValueError(f"{value!r} is not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not finite")
    return number


def parse_duration(text: str) -> float | None:
    """Seconds of a time with units (`90s`, `5m`, `1h30m`); None if it is none."""
    if not re.fullmatch(r"(\d+(\.\d+)?(ms|s|m|h))+", text):
        return None
    return sum(float(count) * _DURATIONS[unit] for count, unit in re.findall(r"([\d.]+)(ms|s|m|h)", text))


_DURATIONS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def _parse_str(setting: Setting, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    if not value.strip() and setting.default != "":
        raise ValueError("it is empty; leave it out")
    return value


def _parse_list(setting: Setting, value: object) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
        raise ValueError(f"{value!r} is not a list of texts")
    texts = tuple(item.strip() for item in items)
    # What a shell makes of an unset variable must not pass for no keys, which lets everyone in.
    if (items and not any(texts)) or (not isinstance(value, str) and not all(texts)):
        raise ValueError("it is empty; leave it out" if len(texts) == 1 else "one of its entries is empty")
    return tuple(text for text in texts if text)


_PARSERS = {"bool": _parse_bool, "int": _parse_int, "float": _parse_float, "str": _parse_str, "choice": _parse_str,
            "list": _parse_list}  # fmt: skip

_SCALES: dict[str, dict[str, int]] = {
    "plain": {},
    "seconds": {},
    "tokens": {"k": 10**3, "m": 10**6, "K": 2**10, "M": 2**20},
    "bytes": {
        "B": 1,
        "kB": 10**3,
        "KB": 10**3,
        "MB": 10**6,
        "GB": 10**9,
        "TB": 10**12,
        "KiB": 2**10,
        "MiB": 2**20,
        "GiB": 2**30,
        "TiB": 2**40,
    },
}


def parse_scaled(text: str, scales: Mapping[str, int]) -> int:
    """A whole number with an optional suffix out of `scales`; fractions are fine where the result is whole."""
    match = re.fullmatch(r"\s*([+-]?\d[\d_]*)(\.\d+)?\s*([A-Za-z]*)\s*", text)
    if not match:
        raise ValueError(f"{text!r} is not a whole number")
    whole, fraction, suffix = match[1], match[2] or "", match[3]
    if suffix and suffix not in scales:
        known = ", ".join(name for name in scales if name)
        raise ValueError(f"{text!r} has an unknown suffix" + (f" (known: {known})" if known else ""))
    digits = max(len(fraction) - 1, 0)
    number, rest = divmod(int(whole.replace("_", "") + fraction[1:]) * scales.get(suffix, 1), int("1" + "0" * digits))
    if rest:
        raise ValueError(f"{text!r} is not a whole number")
    return number
