"""The reference page of all sampling parameters (`docs/samplers.md`), made from the table and the stages.

`aphrodite samplers docs` prints it; a test holds the committed page against it.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from aphrodite.sampling.fields import MAX_TRACED_TOKENS
from aphrodite.sampling.params import builtin_table
from aphrodite.sampling.table import Kind, ParamRow

if TYPE_CHECKING:
    from aphrodite.sampling.stages.base import Stage

KIND_WORDS: dict[Kind, str] = {
    "int": "integer",
    "float": "number",
    "bool": "true or false",
    "choice": "name",
    "text": "text",
    "ints": "list of integers",
    "tokens": "list of token ids",
    "strings": "string or list of strings",
    "bias": "object: token id → number",
    "sequences": "list of lists of token ids",
    "ranges": "list of [token ids, start, length]",
    "order": "list of names or ids",
    "loop": "object",
    "grammar": "text or object",
}


class StageText(NamedTuple):
    """A stage as a reader wants it.

    Attributes:
        place: where it stands in the default order, in words.
        definition: its module's and its class's docstrings.
    """

    name: str
    place: str
    parameters: tuple[str, ...]
    definition: str


def samplers_page() -> str:
    """The whole page; parameters of installed extensions are not on it."""
    rows = builtin_table()
    return (
        "\n\n".join(
            [
                _INTRODUCTION,
                "## Parameters",
                _table(("Parameter", "Aliases", "Type", "Default", "Range", "Meaning"), [_cells(row) for row in rows]),
                "## Order",
                _ORDER,
                _table(
                    ("Stage", "Parameters"), [(f"`{text.name}`", _names(text.parameters)) for text in _stage_texts()]
                ),
                _CHOOSING_ORDER,
                "## Definitions",
                *(f"### {text.name}\n\n{text.definition}{_sources(text)}" for text in _stage_texts()),
                _STRUCTURED,
                _GUIDANCE,
                _EXPLAIN,
                _WARNINGS,
                _EXTENSIONS,
            ]
        )
        + "\n"
    )


def stages_reading(name: str) -> list[StageText]:
    """The stages that read a parameter, extensions included. Imports torch."""
    from aphrodite.sampling.stages.registry import all_stages

    return [_stage_text(stage) for stage in all_stages() if name in stage.parameters]


def default_text(row: ParamRow) -> str:
    """The default as a client would write it."""
    return value_text(row.default)


def value_text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool | int | float):
        return str(value).lower() if isinstance(value, bool) else f"{value:g}"
    return "none" if value in ((), {}, "") else json.dumps(value, ensure_ascii=False).strip('"')


def range_text(row: ParamRow) -> str:
    """The bounds in short; numbers of a vocabulary and lengths of lists included."""
    param = row.param
    low = "" if param.ge is None else f"≥ {param.ge:g}"
    low = low if param.gt is None else f"> {param.gt:g}"
    high = "" if param.le is None else f"≤ {_large(param.le)}"
    high = high if param.lt is None else f"< {param.lt:g}"
    if param.ge is not None and param.le is not None:
        bounds = f"{_large(param.ge)} … {_large(param.le)}"
    else:
        bounds = ", ".join(part for part in (low, high) if part)
    count = "" if param.max_items is None else f"up to {param.max_items:,} entries"
    return "; ".join(part for part in (bounds, count, "token ids" if param.vocabulary else "") if part)


def _large(bound: float) -> str:
    for exponent in (31, 63, 64):
        for number, text in ((2**exponent, f"2^{exponent}"), (2**exponent - 1, f"2^{exponent} - 1")):
            if abs(bound) == number:
                return text if bound > 0 else f"-{text}"
    return f"{bound:,g}" if abs(bound) < 1e6 else f"{bound:,.0f}"


def _cells(row: ParamRow) -> tuple[str, ...]:
    meaning = row.param.doc
    if row.param.neutral is not None and row.param.neutral != row.default:
        meaning += f" Neutral: {value_text(row.param.neutral)}."
    if row.param.source:
        meaning += f" *{row.param.source}*"
    kind = ", ".join(f"`{choice}`" for choice in row.choices) or KIND_WORDS[row.kind]
    return f"`{row.name}`", _names(row.param.aliases), kind, f"`{default_text(row)}`", range_text(row), meaning


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    escaped = ([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in escaped)])


def _stage_texts() -> list[StageText]:
    """Our own stages in the default order."""
    from aphrodite.sampling.stages.guard import GuardedStage
    from aphrodite.sampling.stages.registry import all_stages

    return [_stage_text(stage) for stage in all_stages() if not isinstance(stage, GuardedStage)]


def _stage_text(stage: Stage) -> StageText:
    from aphrodite.sampling.stages.guard import GuardedStage

    kind = type(stage.guarded if isinstance(stage, GuardedStage) else stage)
    module = inspect.cleandoc(sys.modules[kind.__module__].__doc__ or "")
    own = inspect.cleandoc(kind.__doc__ or "")
    if stage.constraint:
        place = "a constraint: before the others in every order"
    elif stage.selector:
        place = "after the others in every order"
    else:
        place = f"rank {stage.rank} of the default order"
    return StageText(stage.name, place, stage.parameters, f"{module}\n\n{own}".strip())


def _sources(text: StageText) -> str:
    """The parameters of a stage, with its constraints on place."""
    return f"\n\nParameters: {_names(text.parameters)}. Place: {text.place}."


_INTRODUCTION = """\
# Samplers

Every parameter below is a field of `/v1/completions` and `/v1/chat/completions`, of `SamplingParams` in Python, \
and a flag of `aphrodite chat`, `complete` and `samplers explain` (`--min-p 0.05`). Aliases are accepted wherever \
names are. A request pays only for the stages that it uses, and no stage touches another request's text.

This page is made from the table of parameters: `aphrodite samplers docs > docs/samplers.md`. \
`aphrodite samplers` shows the same table in the terminal, `aphrodite samplers NAME` one parameter with its \
definition."""

_ORDER = """\
Each stage works on what the one before it left. The default order, constraints first:"""

_CHOOSING_ORDER = """\
`temperature_last` moves the temperature behind XTC. `sampler_priority` (also `sampler_order`, `samplers`) is a list \
of stage names, or of the ids that other engines use; the stages that it names take, in its order, the places that \
they have between them in the default order, and all others stay where they are. Constraints come first and \
selectors last in every order. After the last stage the token is drawn; `temperature: 0` takes the most likely one."""

_STRUCTURED = """\
## Structured output

`grammar` has many spellings, so that clients of other servers find theirs. A request may use one of them:

| Field | Holds |
|---|---|
| `response_format` | `{"type": "json_schema", "json_schema": {"name": ..., "schema": ...}}`, \
`{"type": "json_object"}` or `{"type": "text"}`. Schemas are kept to, be `strict` set or not |
| `structured_outputs` | an object with one of `json`, `regex`, `choice`, `grammar`, `json_object`; beside JSON also \
`whitespace_pattern` and `disable_any_whitespace`. `disable_fallback` changes nothing: there \
is nothing to fall back to |
| `guided_json`, `json_schema` | a JSON schema, as an object or text |
| `guided_regex`, `regex_pattern` | a regular expression for the whole answer (Rust's syntax, with `\\d` for 0 to 9: \
no look-around, no back references) |
| `guided_choice` | a list of texts, one of which is the answer |
| `guided_json_object` | `true`: any JSON object |
| `grammar`, `grammar_string`, `guided_grammar` | GBNF (`root ::= ...`) or llguidance's Lark (`start: ...`) |

In Python: `SamplingParams(grammar=Grammar("regex", r"\\d{3}"))` with `Grammar` of `aphrodite.sampling.table`, or \
`from_mapping({"guided_regex": r"\\d{3}"})` of `aphrodite.sampling.fields`.

- Every sampler works on the tokens that are left, and seeds, `n`, log-probabilities, guidance and streaming as ever. \
Banned strings are avoided as far as what is asked for lets them; where bans leave no token at all, the request ends \
with an error.
- The answer ends by itself where nothing may follow (`finish_reason` is `stop`, `stop_reason` `grammar_complete`), \
whatever `min_tokens` and `ignore_eos` say. If `max_tokens` comes first, it is `length`, and the answer is a beginning \
only.
- `oneOf` is taken for `anyOf`; what else of a schema is not supported is refused, with its name. GBNF's rules are \
followed exactly where they are not recursive. In recursive grammars a part such as `[a-z]+` takes as much as it can.
- A grammar is compiled once and kept. It is tried in a process of its own first: one that takes more than 5 seconds \
or 1 GiB, or crashes there, is refused."""

_GUIDANCE = """\
## Guidance

`guidance_scale` other than 1 computes every token twice: behind the prompt and behind `negative_prompt`, both \
followed by the same answer. With c and u the two log-probabilities of a token, u + scale · (c − u) takes the \
place of the model's logits, and everything above works on that. 1.2 to 2 is usual.

- `/v1/completions`: `negative_prompt` is the text that stands in the prompt's place, encoded as the prompt is. Write \
the whole of it, with what should stay the same.
- `/v1/chat/completions`: `negative_prompt` takes the place of the system message (or of those that the conversation \
begins with), the rest of the chat stays: `"You are a helpful assistant."` there makes the model follow its own system \
message more. `negative_prompt_ids` is the whole prompt instead.
- Without a negative prompt its last token alone stands for it, as in transformers.

`logprobs` (`raw`) and the `model` of a trace speak of the guided distribution, `prompt_logprobs` of the model's own. \
Penalties and DRY read the prompt and the answer, never the negative prompt. Token counts of a response leave it out. \
A guided answer takes two of the `--max-num-seqs` places and room for two sequences in the KV cache; both have to fit \
the context. The negative prompt shares the prefix cache, so its start is computed once for many requests."""

_EXPLAIN = f"""\
## Seeing what they do

With `"sampler_trace": true` each choice of the response has a `sampler_trace`: one object a token, streamed or not.

```json
{{
  "token": " time", "token_id": 655, "selection": "drawn",
  "why": "Drawn with 41.2 % as number 2 of 7 candidates; the model gave it 18.3 % as number 2.",
  "model": {{"candidates": 49152, "rank": 2, "probability": 0.183, "top": [{{"token": " day", "token_id": 1194, \
"probability": 0.31}}]}},
  "stages": [
    {{"stage": "min_p", "candidates_before": 49152, "rank_before": 2, "probability_before": 0.183,
     "candidates": 7, "rank": 2, "probability": 0.412, "top": []}}
  ]
}}
```

`model` is the distribution before all stages; each stage that acts on the request follows in the order in which it \
ran. `rank` and `probability` are the chosen token's after the stage (a rank of null: it was not a candidate), `top` \
holds the ten most likely tokens. The text is the same as without the trace. A request may trace up to \
{MAX_TRACED_TOKENS:,} tokens (`n` times `max_tokens`).

`aphrodite samplers explain` draws the same in the terminal:

```
aphrodite samplers explain --prompt "Once upon a time" --temperature 1.2 --min-p 0.05 --tokens 5
```"""

_WARNINGS = """\
## Misspelt and unsupported fields

A field that no table knows does not fail a request, because clients send many. If it looks like a parameter's name, \
or is a sampler of another engine that this one does not have, the response says so in `warnings` (a list of \
sentences; in a stream, on the first chunk), and the log once a name. All fields that were ignored are named in the \
header `x-ignored-fields`."""

_EXTENSIONS = '''\
## Adding a sampler

A sampler is a stage and its rows of the table. In this repository it is a module in `aphrodite/sampling/stages/` \
and fields of `SamplingParams`. In a package of your own it is an entry point of the group `aphrodite.samplers`. \
A complete one, `flatten.py`:

```python
"""Flatten: mixes the uniform distribution over the candidates into theirs."""

from aphrodite.sampling.extensions import parameter_row
from aphrodite.sampling.stages.base import Stage


class Flatten(Stage):
    name = "flatten"
    rank = 850  # where it stands in the default order: behind min_p
    parameters = ("flatten",)
    rows = (parameter_row("flatten", "float", 0.0, "Share of the uniform distribution.", ge=0.0, le=1.0),)

    def apply(self, logits, values, context):  # [rows, vocab] float32, [rows, 1] float32
        candidates = logits.isfinite()
        uniform = candidates / candidates.sum(-1, keepdim=True)
        return ((1 - values) * logits.softmax(-1) + values * uniform).log()


STAGE = Flatten()
```

and its `pyproject.toml`:

```toml
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "aphrodite-flatten"
version = "1.0"

[project.entry-points."aphrodite.samplers"]
flatten = "flatten:STAGE"

[tool.setuptools]
py-modules = ["flatten"]
```

After `pip install .` beside the engine, `"flatten": 0.2` is a field of every endpoint (checked like our own, and in \
`/openapi.json`), `--flatten 0.2` a flag, `from_mapping({"flatten": 0.2})` and \
`SamplingParams(extensions={"flatten": 0.2})` its Python forms, and `flatten` a name for `sampler_priority`.

- `apply` gets the rows that use the stage and nobody else's, in float32, with -inf for what is out already. It may \
change them in place. Set `can_empty = True` if it might mask everything: it is then undone for that row.
- What it returns for a row must depend on that row alone. Random numbers come from \
`aphrodite.sampling.random.uniforms` with `context.seeds`, so that a seed gives the same text in any batch.
- Rows are of the kinds int, float, bool, choice, ints and strings. By default a stage is neutral, and left out, where \
all its parameters equal their `neutral` value, which is the default unless you name another.
- Override `prepare` for data made once a request and `new_state` for memory from token to token \
(`aphrodite/sampling/stages/base.py` says what a state must be able to do).
- The API and the command line import the module too, for its rows. Import torch inside functions and they stay light.
- An extension that cannot be imported, or whose names are taken, is left out with a line in the log. If `apply` \
raises, the requests that use it end with an error, and no others.
- Entry points are code: they run with the server's rights. Install only what you trust.'''
