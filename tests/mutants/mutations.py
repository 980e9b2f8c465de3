"""The changes that are made to a module: a list for its source, and the changed syntax tree."""

from __future__ import annotations

import ast
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any

from . import sql

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_OPPOSITES = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_STATUSES = {
    "SCHEDULED": "RESCHEDULED",
    "RESCHEDULED": "SCHEDULED",
    "RUNNING": "FAILED",
    "SUCCEEDED": "FAILED",
    "FAILED": "SUCCEEDED",
    "CANCELLED": "FAILED",
    "CREATED": "SCHEDULED",
}
_CHAINED = {"filter", "exclude", "order_by", "select_for_update"}
# What is written there is no part of the protocol.
_LEFT_OUT = {"logger", "telemetry", "span"}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change: where it is, what it is, and the lines whose tests are run."""

    file: str
    function: str
    line: int
    # The first and last line of the statement.
    lines: tuple[int, int]
    change: str
    # The place in the order in which a module's changes are found.
    number: int
    # Of the function as it is in the source: a kill holds as long as it stays the same.
    digest: str

    # Whether it is a constant of the module, not a function.
    is_constant: bool

    @property
    def key(self) -> str:
        """What names the change for as long as its function stays the same."""
        text = "\n".join([self.file, self.function, self.change, self.digest])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Site:
    """A place in a tree, and what to put there."""

    def __init__(self, parent: Any, field: str, index: int | None, new: Any, change: str) -> None:
        self.parent, self.field, self.index, self.new = parent, field, index, new
        self.change = " ".join(change.split())
        self.statement: ast.stmt | None = None
        self.function = ""
        self.owner: ast.AST | None = None

    def swap(self) -> None:
        """Put the new there and keep the old; a second time undoes it."""
        if self.index is None:
            old = getattr(self.parent, self.field)
            setattr(self.parent, self.field, self.new)
        else:
            listed = getattr(self.parent, self.field)
            old, listed[self.index] = listed[self.index], self.new
        self.new = old


def mutants(file: str, source: str, left_out: frozenset[str]) -> list[Mutant]:
    """Return the changes to a module, none of them twice, and none in the functions left out."""
    found, seen, times = [], set(), Counter[tuple[str, str]]()
    originals: dict[int, str] = {}
    for number, site in enumerate(parsed(source)[1]):
        owner, statement = site.owner, site.statement
        assert owner is not None
        assert statement is not None
        if {site.function, site.function.split(".")[-1]} & left_out:
            continue
        original = originals.setdefault(id(owner), ast.unparse(owner))
        site.swap()
        try:
            changed = ast.unparse(ast.fix_missing_locations(owner))
        finally:
            site.swap()
        if changed == original or (site.function, changed) in seen:
            continue
        seen.add((site.function, changed))
        times[site.function, site.change] += 1
        nth = times[site.function, site.change]
        change = site.change if nth == 1 else f"{site.change} #{nth}"
        digest = hashlib.sha256(original.encode()).hexdigest()[:16]
        lines = (statement.lineno, _last_line(statement))
        found.append(
            Mutant(
                file=file,
                function=site.function,
                line=_line(site),
                lines=lines,
                change=change,
                number=number,
                digest=digest,
                is_constant=isinstance(owner, ast.Assign | ast.AnnAssign),
            )
        )
    return found


@cache
def parsed(source: str) -> tuple[ast.Module, list[Site]]:
    """Return a module's tree and the places to change in it, in the order of their numbers."""
    tree = ast.parse(source)
    return tree, list(_sites(tree))


def changed_code(source: str, number: int, path: str) -> CodeType:
    """Return a module's code with the change of that number."""
    tree, sites = parsed(source)
    sites[number].swap()
    try:
        return compile(ast.fix_missing_locations(tree), path, "exec")
    finally:
        sites[number].swap()


def _line(site: Site) -> int:
    parent = site.parent
    old = getattr(parent, site.field)
    old = old if site.index is None else old[site.index]
    for node in (old, parent, site.statement):
        if hasattr(node, "lineno"):
            return int(node.lineno)
    return 0


def _last_line(statement: ast.stmt) -> int:
    """Return the last line of a statement, or of a compound one's header."""
    body = getattr(statement, "body", None)
    if body:
        return max(statement.lineno, body[0].lineno - 1)
    return statement.end_lineno or statement.lineno


def _sites(tree: ast.Module) -> Iterator[Site]:
    yield from _in_block(tree.body, "", None)


def _in_block(body: list[ast.stmt], name: str, owner: ast.AST | None) -> Iterator[Site]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _in_block(node.body, f"{name}{node.name}.", None)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _in_function(node, f"{name}{node.name}", node)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and not name and node.value:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for site in _in_expression(node, "value", None):
                site.statement, site.owner = node, node
                site.function = ast.unparse(targets[0])
                yield site


def _in_function(node: Any, name: str, owner: ast.AST) -> Iterator[Site]:
    for site in _in_statements(node, "body"):
        site.owner = owner
        site.function = name
        yield site


def _in_statements(parent: Any, field: str) -> Iterator[Site]:
    for index, node in enumerate(getattr(parent, field)):
        for site in _in_statement(parent, field, index, node):
            if site.statement is None:
                site.statement = node
            yield site


def _shown(node: ast.AST) -> str:
    text = ast.unparse(node).splitlines()[0]
    return text if len(text) <= 90 else f"{text[:87]}..."


def _is_left_out(call: ast.AST) -> bool:
    node = call
    while isinstance(node, ast.Call | ast.Attribute):
        node = node.func if isinstance(node, ast.Call) else node.value
    return isinstance(node, ast.Name) and node.id in _LEFT_OUT


def _in_statement(parent: Any, field: str, index: int, node: ast.stmt) -> Iterator[Site]:
    removed = Site(parent, field, index, ast.Pass(), f"removed: {_shown(node)}")
    if isinstance(node, ast.Expr):
        if isinstance(node.value, ast.Constant) or _is_left_out(node.value):
            return
        if isinstance(node.value, ast.Call | ast.Await):
            yield removed
        yield from _in_expression(node, "value", None)
    elif isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        flat = [t for x in targets for t in (x.elts if isinstance(x, ast.Tuple) else [x])]
        is_local = all(isinstance(target, ast.Name) for target in flat)
        if isinstance(node, ast.AugAssign) or not is_local:
            yield removed
        if node.value is not None:
            yield from _in_expression(node, "value", None)
    elif isinstance(node, ast.Return):
        if node.value is not None:
            if not (isinstance(node.value, ast.Constant) and not node.value.value):
                nothing = ast.Constant(None)
                yield Site(node, "value", None, nothing, f"return None, not {_shown(node.value)}")
            yield from _in_expression(node, "value", None)
    elif isinstance(node, ast.Raise | ast.Break | ast.Continue):
        # An error's text is not the protocol's.
        yield removed
    elif isinstance(node, ast.If | ast.While):
        yield from _negated(node, "test", None)
        yield from _in_expression(node, "test", None)
        yield from _in_statements(node, "body")
        yield from _in_statements(node, "orelse")
    elif isinstance(node, ast.For):
        yield from _in_expression(node, "iter", None)
        yield from _in_statements(node, "body")
        yield from _in_statements(node, "orelse")
    elif isinstance(node, ast.With):
        for at, item in enumerate(node.items):
            if _is_left_out(item.context_expr):
                continue
            if item.optional_vars is None:
                call = ast.parse("__import__('contextlib').nullcontext()", mode="eval").body
                shown = f"without `with {_shown(item.context_expr)}`"
                yield Site(item, "context_expr", None, call, shown)
            yield from _in_expression(node.items[at], "context_expr", None)
        yield from _in_statements(node, "body")
    elif isinstance(node, ast.Try):
        yield from _in_statements(node, "body")
        for handler in node.handlers:
            if isinstance(handler.type, ast.Tuple):
                for at in range(len(handler.type.elts)):
                    left = [x for n, x in enumerate(handler.type.elts) if n != at]
                    fewer = ast.Tuple(left, ast.Load())
                    shown = f"except without {_shown(handler.type.elts[at])}"
                    yield _stating(Site(handler, "type", None, fewer, shown), handler)
            yield from _in_statements(handler, "body")
        yield from _in_statements(node, "orelse")
        yield from _in_statements(node, "finalbody")
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield from _in_statements(node, "body")
    elif isinstance(node, ast.Delete):
        yield removed


def _stating(site: Site, statement: Any) -> Site:
    site.statement = statement
    return site


def _negated(parent: Any, field: str, index: int | None) -> Iterator[Site]:
    test = getattr(parent, field)
    test = test if index is None else test[index]
    if isinstance(test, ast.Compare) and isinstance(test.ops[0], _OPPOSITES):
        # What changes the comparison does the same.
        return
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        yield Site(parent, field, index, test.operand, f"negated: {_shown(test)}")
    elif not isinstance(test, ast.Constant):
        negated = ast.UnaryOp(ast.Not(), test)
        yield Site(parent, field, index, negated, f"negated: {_shown(test)}")


def _in_expression(parent: Any, field: str, index: int | None) -> Iterator[Site]:
    node = getattr(parent, field)
    node = node if index is None else node[index]

    def put(new: ast.AST, change: str) -> Site:
        return Site(parent, field, index, new, change)

    if isinstance(node, ast.BoolOp):
        for at, operand in enumerate(node.values):
            left = [x for n, x in enumerate(node.values) if n != at]
            fewer = left[0] if len(left) == 1 else ast.BoolOp(node.op, left)
            yield put(fewer, f"without {_shown(operand)} in: {_shown(node)}")
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        other = _COMPARISONS[type(node.ops[0])]
        new = ast.Compare(node.left, [other()], node.comparators)
        yield put(new, f"{_shown(node)}: now {_shown(new)}")
    elif isinstance(node, ast.IfExp):
        yield from _negated(node, "test", None)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield put(node.operand, f"{_shown(node)}: now {_shown(node.operand)}")
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        new = ast.BinOp(node.left, _OPERATORS[type(node.op)](), node.right)
        yield put(new, f"{_shown(node)}: now {_shown(new)}")
    elif isinstance(node, ast.Constant):
        yield from _constants(node, put)
        return
    elif isinstance(node, ast.JoinedStr):
        yield from _of_joined(node, put)
    elif isinstance(node, ast.Attribute):
        is_status = isinstance(node.value, ast.Name) and node.value.id in {
            "FlowStatus",
            "TaskStatus",
        }
        if is_status and (other_status := _STATUSES.get(node.attr)):
            new_status = ast.Attribute(node.value, other_status, node.ctx)
            yield put(new_status, f"{_shown(node)}: now {_shown(new_status)}")
    elif isinstance(node, ast.Call):
        if _is_left_out(node):
            return
        yield from _of_call(node, put)
    elif isinstance(node, ast.Dict):
        yield from _of_dict(node, put)
    elif isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        for generator in node.generators:
            for at, test in enumerate(generator.ifs):
                yield from _negated(generator, "ifs", at)
                yield Site(generator, "ifs", at, ast.Constant(True), f"without if {_shown(test)}")
    for name, value in ast.iter_fields(node):
        if isinstance(value, ast.expr):
            yield from _in_expression(node, name, None)
        elif isinstance(value, list):
            for at, item in enumerate(value):
                if isinstance(item, ast.expr):
                    yield from _in_expression(node, name, at)
                elif isinstance(item, ast.keyword):
                    yield from _in_expression(item, "value", None)
                elif isinstance(item, ast.comprehension):
                    yield from _in_expression(item, "iter", None)
                    for number in range(len(item.ifs)):
                        yield from _in_expression(item, "ifs", number)


def _constants(node: ast.Constant, put: Any) -> Iterator[Site]:
    value = node.value
    if isinstance(value, bool):
        yield put(ast.Constant(not value), f"{value}: now {not value}")
    elif isinstance(value, int):
        yield put(ast.Constant(value + 1), f"{value}: now {value + 1}")
    elif isinstance(value, str):
        for change, text in sql.changes(value):
            yield put(ast.Constant(text), change)


def _of_joined(node: ast.JoinedStr, put: Any) -> Iterator[Site]:
    text = "".join(
        part.value if isinstance(part, ast.Constant) else f"⟦{at}⟧"
        for at, part in enumerate(node.values)
    )
    for change, changed in sql.changes(text):
        parts: list[ast.expr] = []
        for piece in re.split(r"(⟦\d+⟧)", changed):
            if piece.startswith("⟦"):
                parts.append(node.values[int(piece[1:-1])])
            elif piece:
                parts.append(ast.Constant(piece))
        shown = re.sub(
            r"⟦(\d+)⟧",
            lambda found: f"{{{ast.unparse(node.values[int(found[1])].value)}}}",  # type: ignore[attr-defined]
            change,
        )
        yield put(ast.JoinedStr(parts), shown)


def _of_call(node: ast.Call, put: Any) -> Iterator[Site]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    if isinstance(node.func, ast.Name) and node.func.id in {"min", "max"}:
        other = "max" if node.func.id == "min" else "min"
        call = ast.Call(ast.Name(other, ast.Load()), node.args, node.keywords)
        yield put(call, f"{_shown(node)}: now {other}")
    if isinstance(node.func, ast.Attribute) and name in _CHAINED:
        yield put(node.func.value, f"without .{name}() in: {_shown(node)}")
    if name in {"filter", "exclude"}:
        for at, argument in enumerate(node.args):
            fewer = [x for n, x in enumerate(node.args) if n != at]
            call = ast.Call(node.func, fewer, node.keywords)
            yield put(call, f"without {_shown(argument)} in .{name}()")
    for at, keyword in enumerate(node.keywords):
        left = [x for n, x in enumerate(node.keywords) if n != at]
        call = ast.Call(node.func, node.args, left)
        shown = f"{keyword.arg}=" if keyword.arg else f"**{_shown(keyword.value)}"
        yield put(call, f"without {shown} in: {_shown(node.func)}()")


def _of_dict(node: ast.Dict, put: Any) -> Iterator[Site]:
    for at, key in enumerate(node.keys):
        keys = [x for n, x in enumerate(node.keys) if n != at]
        values = [x for n, x in enumerate(node.values) if n != at]
        shown = _shown(key) if key is not None else f"**{_shown(node.values[at])}"
        yield put(ast.Dict(keys, values), f"without the item {shown}")
