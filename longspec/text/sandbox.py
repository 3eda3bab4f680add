"""Jinja under limits: a template from a stranger can be refused, and do nothing more.

Takes a template's source and its variables; gives text. Jinja's sandbox keeps a template from Python, but not from
`10**10000000`: operators, calls, filters, tests, literals, comparisons and what is printed come through here before
they run, so that none takes longer than a moment (`longspec.text.limits`). Knows no messages and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from types import BuiltinMethodType
from typing import Any

from jinja2 import nodes
from jinja2.runtime import Context, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from longspec.text.limits import GUARDS, charge, check_operands, refuse_widths, settled, step, taken, weigh

__all__ = ["BoundedEnvironment"]

_TEXT_METHODS = """
    capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal isdigit isidentifier islower
    isnumeric isprintable isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind
    rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper
"""
_METHODS: tuple[tuple[type | tuple[type, ...], frozenset[str]], ...] = (
    (str, frozenset(_TEXT_METHODS.split())),
    (dict, frozenset(("copy", "get", "items", "keys", "values"))),
    ((list, tuple), frozenset(("copy", "count", "index"))),
    ((bool, int, float, bytes, type), frozenset()),
)
"""What a template may use of Python's own types: the others make texts of any length, and none is needed."""

_NO_FILTERS = ("batch", "center", "pprint", "random", "slice", "striptags", "urlize", "wordwrap", "xmlattr")
"""Filters that no chat template needs, and whose cost or result isn't bounded by what they are given."""

_DEEP = frozenset(("dictsort", "groupby", "join", "max", "min", "sort", "string", "sum", "unique"))
_DEEP_TESTS = frozenset(("!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in"))
_DEEP_TESTS |= frozenset(("le", "lessthan", "lt", "ne"))
"""Filters and tests that look into lists within lists."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which every operation of a template is counted. Compile and render within `limited`."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_printed, **options)
        del self.globals["lipsum"]
        for name in _NO_FILTERS:
            del self.filters[name]
        tables: tuple[tuple[dict[str, Any], frozenset[str]], ...] = (self.filters, _DEEP), (self.tests, _DEEP_TESTS)
        for table, deep in tables:
            table.update({name: _counted(name, function, deep=name in deep) for name, function in table.items()})

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """The text of a macro or a block."""
        whole = list(pieces)
        charge(sum(map(len, whole)))
        return "".join(whole)

    @property
    def turn(self) -> None:
        """A turn of a loop: read for its effect, since a property costs a tenth of a call in a template."""
        step()

    def joined(self, *values: Any) -> str:
        """The operator `~`."""
        return self.concat(map(_printed, values))

    def weighed(self, value: Any) -> Any:
        """A literal, or an operand of a comparison."""
        return weigh(value)

    def _generate(self, source: nodes.Template, *rest: Any, **more: Any) -> str:
        return super()._generate(_Instrumented().visit(source), *rest, **more)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        allowed = next((names for kind, names in _METHODS if isinstance(obj, kind)), None)
        return (allowed is None or attr in allowed) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            refuse_widths(value.__self__)
        return wrapped

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        step()
        check_operands(operator, left, right)
        return taken(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, /, *args: Any, **named: Any) -> Any:
        step()
        if isinstance(obj, BuiltinMethodType) and isinstance(obj.__self__, str):
            if guard := GUARDS.get(obj.__name__):
                args = tuple(map(settled, args))
                guard(obj.__self__, *args, **named)
        elif isinstance(obj, Macro) or obj is dict:  # their arguments can become lists
            for value in (*args, *named.values()):
                if not isinstance(value, Namespace):
                    weigh(value)
        return taken(super().call(context, obj, *args, **named))


class _Instrumented(NodeTransformer):
    """Puts a step into every loop and macro, and a call where jinja has no hook: `~`, literals, comparisons."""

    def generic_visit(self, node: nodes.Node, *args: Any, **named: Any) -> nodes.Node:
        super().generic_visit(node, *args, **named)
        match node:
            case nodes.For() | nodes.Macro() | nodes.CallBlock():
                node.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("turn"), lineno=node.lineno))
            case nodes.Concat():
                return _call("joined", node.nodes, node)
            case nodes.List() | nodes.Dict() if _grows(node):
                return _call("weighed", [node], node)
            case nodes.Tuple(ctx="load") if _grows(node):
                return _call("weighed", [node], node)
            case nodes.Compare() if not any(isinstance(one, nodes.Const) for one in _operands(node)):
                node.expr = _call("weighed", [node.expr], node)
                for operand in node.ops:
                    operand.expr = _call("weighed", [operand.expr], node)
        return node


def _grows(literal: nodes.Expr) -> bool:
    """Whether a literal holds what isn't constant."""
    return any(not isinstance(node, nodes.Const | nodes.Pair) for node in literal.iter_child_nodes()) or any(
        not isinstance(pair.value, nodes.Const) for pair in literal.find_all(nodes.Pair)
    )


def _operands(node: nodes.Compare) -> list[nodes.Expr]:
    return [node.expr, *(operand.expr for operand in node.ops)]


def _call(name: str, values: list[nodes.Expr], node: nodes.Node) -> nodes.Expr:
    place = {"lineno": node.lineno, "environment": node.environment}
    return nodes.Call(nodes.EnvironmentAttribute(name, **place), values, [], None, None, **place)


def _printed(value: Any) -> str:
    """What an output expression prints."""
    step()
    if isinstance(value, str):
        return value
    text = str(value if isinstance(value, Undefined) else weigh(value))
    charge(len(text))
    return text


def _counted(name: str, function: Callable[..., Any], *, deep: bool) -> Callable[..., Any]:
    """A filter or test whose result is counted; what it is given is weighed if it looks into it (`deep`)."""
    guard = GUARDS.get(name)
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        step()
        if deep:
            args = (*args[:first], *(weigh(settled(value)) for value in args[first:]))
        if guard is not None:
            guard(*args[first:], **named)
        return taken(function(*args, **named))

    return call
