"""Command-line options made from the settings table and the table of sampling parameters.

No option is listed by hand: a new field of either table is a flag of every command that takes them.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer

from aphrodite.config import EngineConfig, ServerSettings, settings_table
from aphrodite.config_values import Setting, parse_value
from aphrodite.errors import ConfigError, InvalidRequestError, did_you_mean
from aphrodite.sampling.fields import canonical_names, from_mapping, parameter_table
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.presets import shipped_presets
from aphrodite.sampling.table import ParamRow
from aphrodite.settings import CONFIG_ENV, resolve

SAMPLING_PANEL = "Sampling"

Owner = type[EngineConfig] | type[ServerSettings]


def with_options(
    *owners: Owner, sampling: bool = False, model_argument: bool = True, skip: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the flags of settings tables, and of the sampling table if asked for.

    The command is called with its own parameters and with `settings: Settings` (resolved over flags,
    environment and YAML) and, if asked for, `sampling: SamplingFlags`.

    Args:
        owners: settings classes whose fields become flags.
        sampling: add sampling flags.
        model_argument: the model is a positional argument instead of a flag.
        skip: names of settings or sampling parameters without a flag here.
    """
    rows = [row for row in settings_table().values() if row.owner in owners and row.name not in skip]
    sampling_rows = [row for row in parameter_table() if row.name not in skip] if sampling else []

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function, eval_str=True)
        own = [entry for entry in signature.parameters.values() if entry.name not in ("settings", "sampling")]

        @functools.wraps(function)
        def command(**values: Any) -> Any:
            flags = {row.name: _checked(row, values.pop(row.name)) for row in rows}
            config_file = values.pop("config", None)
            if "settings" in signature.parameters:
                values["settings"] = resolve(flags, config_file=config_file)
            if sampling:
                values["sampling"] = SamplingFlags({row.name: values.pop(row.name) for row in sampling_rows})
            return function(**values)

        generated = [_setting_parameter(row, model_argument=model_argument) for row in rows]
        if "settings" in signature.parameters:
            generated.append(_config_parameter())
        generated += [_sampling_parameter(row) for row in sampling_rows]
        command.__signature__ = signature.replace(parameters=[*own, *generated])  # type: ignore[attr-defined]
        return command

    return decorate


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _config_parameter() -> inspect.Parameter:
    option = typer.Option("--config", help=f"YAML file of settings (or {CONFIG_ENV}).", metavar="FILE")
    return _keyword("config", Annotated[str | None, option])


def _setting_parameter(row: Setting, *, model_argument: bool) -> inspect.Parameter:
    if row.name == "model" and model_argument:
        argument = typer.Argument(help=row.help, metavar="MODEL", show_default=False)
        return _keyword("model", Annotated[str | None, argument])
    names = (f"{row.flag}/--no-{row.flag.removeprefix('--')}",) if row.kind == "bool" else (row.flag,)
    option = typer.Option(
        *names,
        help=_setting_help(row),
        rich_help_panel=row.group,
        metavar=None if row.kind == "bool" else _metavar(row),
        show_default=False,
    )
    kinds: dict[str, Any] = {"bool": bool | None, "list": list[str] | None}
    return _keyword(row.name, Annotated[kinds.get(row.kind, str | None), option])


def _setting_help(row: Setting) -> str:
    notes = [row.help]
    if row.choices:
        notes.append("One of " + ", ".join(str(choice) for choice in row.choices) + ".")
    if row.kind == "list":
        notes.append("May be repeated.")
    elif row.default not in (None, ""):
        notes.append(f"Default: {row.default_text}.")
    return " ".join(notes)


def _metavar(row: Setting) -> str:
    return {"tokens": "TOKENS", "bytes": "SIZE", "seconds": "SECONDS"}.get(row.meta.unit, _KIND_METAVARS[row.kind])


_KIND_METAVARS = {"int": "N", "float": "X", "str": "TEXT", "list": "TEXT", "choice": "NAME"}


def _checked(row: Setting, value: Any) -> Any:
    """The typed value of a flag, None if it was not given; a wrong one is a usage error."""
    if value is None or value == []:
        return None
    try:
        return parse_value(row, value, row.flag)
    except ConfigError as error:
        hint = "MODEL" if row.name == "model" else row.flag
        raise typer.BadParameter(str(error).removeprefix(f"{row.flag}: "), param_hint=hint) from None


# --- sampling ----------------------------------------------------------------------------------------------------


def _sampling_parameter(row: ParamRow) -> inspect.Parameter:
    flag = "--" + row.name.replace("_", "-")
    repeated = row.kind in ("strings", "ints")
    notes = [row.param.doc]
    if row.choices:
        notes.append("One of " + ", ".join(row.choices) + ".")
    if repeated:
        notes.append("May be repeated.")
    if row.default not in (None, ()):
        notes.append(f"Default: {str(row.default).lower()}.")
    option = typer.Option(
        *((f"{flag}/--no-{flag.removeprefix('--')}",) if row.kind == "bool" else (flag,)),
        help=" ".join(notes),
        rich_help_panel=SAMPLING_PANEL,
        metavar=_SAMPLING_METAVARS[row.kind],
        show_default=False,
    )
    kind: Any = bool | None if row.kind == "bool" else (list[str] | None if repeated else str | None)
    return _keyword(row.name, Annotated[kind, option])


_SAMPLING_METAVARS = {
    "int": "N",
    "float": "X",
    "bool": None,
    "choice": "NAME",
    "text": "TEXT",
    "ints": "ID",
    "tokens": "[ID, ...]",
    "strings": "TEXT",
    "bias": '{"ID": X}',
    "sequences": "[[ID, ...], ...]",
    "ranges": "[[[ID, ...], START, LENGTH], ...]",
    "order": "NAME,NAME,...",
    "loop": '{"max_pattern_size": N, "min_count": N}',
    "grammar": "TEXT",
}


def sampling_from_texts(texts: Mapping[str, Any], *, base: SamplingParams | None = None) -> SamplingParams:
    """Sampling parameters from what a person typed: names (aliases too) and texts, or lists of texts.

    Raises:
        ConfigError: an unknown name, or a value of a wrong type or out of bounds.
    """
    rows = {row.name: row for row in parameter_table()}
    names = canonical_names()
    values = {}
    for name, text in texts.items():
        key = name.replace("-", "_")
        values[key] = _sampling_value(rows[names[key]], text) if key in names else text
    try:
        return from_mapping(values, base=base)
    except InvalidRequestError as error:
        raise ConfigError(str(error)) from None


def with_preset(base: SamplingParams, name: str) -> SamplingParams:
    """`base` with the values of a sampler preset that ships.

    Raises:
        ConfigError: there is none of this name.
    """
    presets = shipped_presets().presets
    if name not in presets:
        raise ConfigError(
            f"there is no sampler preset {name}.{did_you_mean(name, presets)} There are {', '.join(presets)}."
        )
    preset = presets[name]
    return from_mapping(preset.force, base=preset.base(base))


def _sampling_value(row: ParamRow, text: Any) -> Any:
    """Text as the JSON value that a request would carry; what is not of the kind stays text, to be refused."""
    if row.kind == "ints":  # several flags, one number, or a JSON list
        value = [_json_or_text(item) for item in text] if isinstance(text, list) else _json_or_text(text)
        return value if isinstance(value, list) else [value]
    return text if row.kind in ("strings", "choice", "order", "text") else _json_or_text(text)


def _json_or_text(text: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text


class SamplingFlags:
    """The sampling flags that a person gave. What they did not give is the model's to say, so `over` waits for it.

    Raises:
        typer.BadParameter: a value of a wrong type or out of bounds.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._given = {name: text for name, text in values.items() if text is not None and text != []}
        self.over(SamplingParams())

    def over(self, base: SamplingParams) -> SamplingParams:
        """`base` with what was given."""
        for name, text in self._given.items():
            try:
                base = sampling_from_texts({name: text}, base=base)
            except ConfigError as error:
                raise typer.BadParameter(str(error), param_hint="--" + name.replace("_", "-")) from None
        return base
