"""The one Jinja environment: Hugging Face's chat-template dialect in a sandbox with limits.

The dialect (trimmed blocks, loop controls, `raise_exception`, `strftime_now`, JSON without HTML escapes, the
`generation` tag) is what transformers' `apply_chat_template` documents, since checkpoints' templates are written
for it. The sandbox is Jinja's own; on top, only a list of methods of built-in types may be called, private names
raise at once, and every loop, call, filter and operator is counted (`limits`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import wraps
from types import BuiltinMethodType
from typing import Any, Final, cast

from jinja2 import Undefined, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace, _PassArg
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from aphrodite.chat import limits

# HTML helpers that chat templates do not need and that are slow on hostile text, and what is not deterministic.
_WITHOUT_FILTERS = {"urlize", "xmlattr", "striptags", "wordwrap", "pprint", "random"}
_NUMBER_FILTERS = {"batch", "slice", "center", "indent", "truncate", "round", "int", "tojson", "sum"}

_STRING_METHODS = frozenset(
    {
        "capitalize", "casefold", "center", "count", "endswith", "find", "format", "format_map", "index", "isalnum",
        "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isspace", "istitle",
        "isupper", "join", "ljust", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind",
        "rindex", "rjust", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase",
        "title", "upper", "zfill",
    }
)  # fmt: skip
_METHODS: Final[dict[type, frozenset[str]]] = {
    str: _STRING_METHODS,
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    bool: frozenset(),
    int: frozenset(),
    float: frozenset({"is_integer"}),
}


class TemplateRaisedError(TemplateError):
    """The template itself refused the conversation with `raise_exception`."""


class _Namespace(Namespace):
    """Jinja's namespace without private names, and with a text that does not show what is in it."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        instance, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_public(name)
        Namespace.__init__(instance, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_public(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace cannot have an attribute {name!r}")


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; when rendering it only opens a scope."""

    tags = {"generation"}  # noqa: RUF012  # as the base class declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Formatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        limits.check_format(format_spec)
        return limits.current().admit(super().format_field(value, format_spec))


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """See the module. Templates are made with `compile_template` only."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        self.finalize = _finalize
        self.concat = _concat_chunks  # type: ignore[method-assign]
        self.filters = {name: _limited(name, function) for name, function in _filters().items()}
        self.globals = {
            "range": _range,
            "dict": _make_dict,
            "namespace": _Namespace,
            "cycler": self.globals["cycler"],
            "joiner": self.globals["joiner"],
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may read an attribute: public, and for built-in types on the list of methods."""
        if isinstance(obj, Markup):  # its methods are not `str`'s and have no limits
            return False
        for kind, methods in _METHODS.items():
            if isinstance(obj, kind):
                return attr in methods
        return super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Refuse at once, where Jinja would go on with an undefined value."""
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is not allowed")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` with the sandbox's attribute rules and with limits on widths."""
        if not isinstance(value, BuiltinMethodType) or value.__name__ not in ("format", "format_map"):
            return None
        text = value.__self__
        if not isinstance(text, str):
            return None
        formatter = _Formatter(self)
        if value.__name__ == "format_map":
            return lambda mapping: formatter.vformat(text, (), mapping)
        return lambda *args, **kwargs: formatter.vformat(text, args, kwargs)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function, a method or a macro for the template."""
        limits.current().tick()
        if isinstance(__obj, LoopContext):  # a recursive loop
            args = (limits.Counted(args[0]), *args[1:]) if args else args
        elif isinstance(__obj, BuiltinMethodType) and isinstance(__obj.__self__, str):
            args = _check_string_method(__obj.__self__, __obj.__name__, args, kwargs)
        return limits.current().admit(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """One of the operators that can make large values."""
        limits.current().tick()
        limits.check_binary(operator, left, right)
        return limits.current().admit(self.binop_table[operator](left, right))


def _check_string_method(text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Check a call of a `str` method; returns the arguments to use."""
    limits.current().touch(text)
    if name == "join" and len(args) == 1:
        return (limits.check_join(text, args[0]),)
    if name == "replace" and len(args) >= 2:
        limits.check_replace(text, args[0], args[1])
    elif name in ("center", "ljust", "rjust", "zfill"):
        limits.check_numbers(args, kwargs)
    elif name in ("split", "rsplit", "splitlines"):
        separator = args[0] if name != "splitlines" and args and isinstance(args[0], str) and args[0] else None
        limits.current().check_items(len(text) // 2 if separator is None else text.count(separator))
    return args


@pass_context
def _finalize(context: Context, value: Any) -> str:
    """Turn what `{{ }}` shows into text, within the budget."""
    text = value if type(value) is str else str(value)
    limits.current().produce(len(text))
    return text


def _concat_chunks(chunks: Iterable[str]) -> str:
    """Join what a macro or a block wrote."""
    parts = list(chunks)
    limits.current().produce(sum(map(len, parts)))
    return "".join(parts)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """`dict` as a function: the class itself has more to call than a template needs."""
    return dict(*args, **kwargs)


def _range(*args: int) -> range:
    items = range(*args)
    if len(items) > limits.MAX_RANGE:
        raise limits.LimitError(f"the template loops over more than {limits.MAX_RANGE:,} numbers")
    return items


def _raise_exception(message: Any) -> None:
    raise TemplateRaisedError(str(message)[:2000])


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 256 or re.search(r"%[^a-zA-Z%]*\d", pattern):
        raise limits.LimitError("the template's date format is too long or has a width")
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    limits.current().admit(value)
    small = (indent, *(separators or ()))
    if any(len(part) > 16 if isinstance(part, str) else isinstance(part, int) and part > 16 for part in small):
        raise limits.LimitError("the template asks for JSON with very long separators or indentation")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


# Names that templates cannot write, for the transformer's own calls.
_CONCAT, _COUNT, _ADMIT = "aphrodite concat", "aphrodite count", "aphrodite admit"


def _filters() -> dict[str, Callable[..., Any]]:
    filters: dict[str, Callable[..., Any]] = {k: v for k, v in FILTERS.items() if k not in _WITHOUT_FILTERS}
    own = {
        "tojson": _tojson,
        _CONCAT: lambda parts: "".join(map(str, parts)),
        _COUNT: limits.Counted,
        _ADMIT: lambda value: value,
    }
    return filters | own


def _check_filter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Check a filter's arguments, the filtered value first; returns the arguments to use."""
    value, rest = args[0], args[1:]
    if name in _NUMBER_FILTERS:
        limits.check_numbers(rest, kwargs)
        if name == "indent" and isinstance(value, str):
            width = rest[0] if rest else kwargs.get("width", 4)
            limits.current().check_size(value.count("\n") * (len(width) if isinstance(width, str) else int(width)))
        if name == "sum" and not all(isinstance(item, (int, float, str)) for item in (*rest, *kwargs.values())):
            raise limits.LimitError("the filter sum adds numbers only")
    elif name == "join" and not kwargs.get("attribute") and len(rest) < 2:
        separator = rest[0] if rest else kwargs.get("d", "")
        return limits.check_join(separator, value), *rest
    elif name == "replace" and len(rest) >= 2:
        limits.check_replace(str(value), str(rest[0]), str(rest[1]))
    elif name == "format":
        limits.check_format(value, rest or kwargs)
    elif name == _CONCAT:
        limits.current().check_size(sum(len(part) for part in value if isinstance(part, str)))
    return args


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter with its limits. Taking the context also keeps Jinja from running it while compiling."""
    wanted = _PassArg.from_obj(function)

    @pass_context
    @wraps(function, assigned=(), updated=())
    def limited(context: Context, *args: Any, **kwargs: Any) -> Any:
        limits.current().touch(args[0])
        args = _check_filter(name, args, kwargs)
        if wanted is _PassArg.context:
            args = (context, *args)
        elif wanted is _PassArg.eval_context:
            args = (context.eval_ctx, *args)
        elif wanted is _PassArg.environment:
            args = (context.environment, *args)
        result = function(*args, **kwargs)
        if isinstance(result, Markup):  # nothing is escaped in prompts
            result = str.__str__(result)
        return limits.current().admit(result)

    return limited


class _Instrument(NodeTransformer):
    """Make loops, concatenations and container literals of a template go through the limits."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(cast(nodes.Expr, node.iter), _COUNT)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), _CONCAT)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, _ADMIT)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._admitted(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._admitted(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._admitted(node) if node.ctx == "load" else node

    def _admitted(self, node: nodes.Expr) -> nodes.Node:
        variable = (nodes.Name, nodes.Filter, nodes.BinExpr, nodes.Concat)
        constant = not any(node.find(kind) for kind in variable)
        self.generic_visit(node)
        return node if constant else _filtered(node, _ADMIT)


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


ENVIRONMENT: Final = TemplateEnvironment()


def parse_template(source: str) -> nodes.Template:
    """The syntax tree of a template, before it is instrumented.

    Raises:
        LimitError: the template is too long or too complex.
        TemplateSyntaxError, RecursionError: it cannot be read.
    """
    if len(source) > limits.MAX_SOURCE_CHARS:
        raise limits.LimitError(f"the template has more than {limits.MAX_SOURCE_CHARS:,} characters")
    tree = ENVIRONMENT.parse(source)
    if sum(1 for _ in tree.find_all(nodes.Node)) > limits.MAX_NODES:
        raise limits.LimitError("the template is too complex")
    return tree


def compile_template(tree: nodes.Template) -> Any:
    """A template that can be rendered under a `Budget`; changes `tree`."""
    return ENVIRONMENT.from_string(_Instrument().visit(tree))
