"""Options as the source declares them, read without an import.

Importing transformers takes seconds. A mistyped flag, `--help` and shell completion must not wait
for it.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_SCALARS = ("int", "float", "bool", "str")


@dataclass(frozen=True)
class Kind:
    """What an option takes: a scalar's name ("any" if it is not known), a list, choices."""

    scalar: str = "any"
    is_list: bool = False
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Declared:
    """An option.

    Attributes:
        text: its help text.
        kind: what it takes.
        default: its default; None also if that is computed.
        facts: further facts that are literals, as given to `softpref.options.option`.
        package: the package that declares it.
        group: `GROUP` of the class that declares it.
    """

    text: str
    kind: Kind
    default: Any
    facts: Mapping[str, Any]
    package: str
    group: str | None


def options_of(path: str) -> dict[str, Declared] | None:
    """Return the options of a dataclass, by name.

    Args:
        path: MODULE:CLASS.

    Returns:
        None if the class or one of its bases is in no installed package.
    """
    module, _, name = path.partition(":")
    module, node = _find(module, name) or (module, None)
    if not isinstance(node, ast.ClassDef):
        return None
    options: dict[str, Declared] = {}
    for base in reversed(node.bases):  # the order of a dataclass's fields
        inherited = options_of(f"{module}:{base.id}") if isinstance(base, ast.Name) else None
        if inherited is None:
            return None
        options |= inherited
    return options | _own(module, node)


def _own(module: str, node: ast.ClassDef) -> dict[str, Declared]:
    group, options = None, {}
    for line in node.body:
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
            continue
        name = line.target.id
        if "ClassVar" in ast.unparse(line.annotation):
            group = _value(module, line.value) if name == "GROUP" else group
            continue
        text, default, facts = _declaration(module, line.value)
        if facts.get("init", True):
            kind = _kind(module, line.annotation)
            package = module.partition(".")[0]
            options[name] = Declared(text, kind, default, facts, package, group)
    return options


def _declaration(module: str, value: ast.expr | None) -> tuple[str, Any, dict[str, Any]]:
    """Return text, default and facts of a field's right-hand side."""
    if not isinstance(value, ast.Call):
        return "", _value(module, value), {}
    facts = {of.arg: _value(module, of.value) for of in value.keywords if of.arg}
    given = [_value(module, argument) for argument in value.args]
    metadata = facts.pop("metadata", None) or {}
    text = given[0] if given else metadata.get("help")
    default = facts.pop("default", given[1] if len(given) > 1 else None)
    return str(text or ""), default, facts


def _value(module: str, node: ast.expr | None) -> Any:
    """Return a literal, or a name's if it is one; None for anything else."""
    if isinstance(node, ast.Name):
        place = _find(module, node.id)
        defined = getattr(place[1], "value", None) if place else None
        return _value(place[0], defined) if place else None
    try:
        return ast.literal_eval(node) if node else None
    except ValueError:
        return None


def _kind(module: str, node: ast.expr) -> Kind:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _kind(module, ast.parse(node.value, mode="eval").body)
    if isinstance(node, ast.BinOp):
        return _any_of([_kind(module, part) for part in _members(node)])
    if isinstance(node, ast.Subscript):
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        outer = ast.unparse(node.value)
        if outer == "Literal":
            return Kind("str", choices=tuple(ast.literal_eval(part) for part in parts))
        inner = _any_of([_kind(module, part) for part in parts])
        if outer in ("Optional", "Union"):
            return inner
        return Kind(inner.scalar, True, inner.choices) if outer == "list" else Kind()
    if isinstance(node, ast.Name) and node.id not in _SCALARS:
        place = _find(module, node.id)
        defined = getattr(place[1], "value", None) if place else None
        return _kind(place[0], defined) if place and defined else Kind()
    return Kind(ast.unparse(node))


def _members(node: ast.expr) -> list[ast.expr]:
    """Return the members of a union such as `None | str | list[str]`."""
    if not isinstance(node, ast.BinOp):
        return [node]
    return [*_members(node.left), *_members(node.right)]


def _any_of(kinds: list[Kind]) -> Kind:
    """Return what a union takes; of a list and text the list, as in transformers' parser."""
    others = [kind for kind in kinds if kind != Kind("None")]
    lists = [kind for kind in others if kind.is_list]
    if lists and len(kinds) == 2:
        return lists[0]
    return others[0] if len(others) == 1 else Kind()


def _find(module: str, name: str) -> tuple[str, ast.stmt] | None:
    """Return where a name of a module is defined, and its statement."""
    source = _source(module)
    if source is None:
        return None
    is_package, tree = source
    for line in _statements(tree.body):
        if isinstance(line, ast.ClassDef) and line.name == name:
            return module, line
        if isinstance(line, ast.Assign | ast.AnnAssign):
            targets = line.targets if isinstance(line, ast.Assign) else [line.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return module, line
        if isinstance(line, ast.ImportFrom):
            for alias in line.names:
                if (alias.asname or alias.name) == name:
                    return _find(_imported(module, is_package, line), alias.name)
    return None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield a module's statements, with those under a condition such as TYPE_CHECKING."""
    for line in body:
        yield line
        if isinstance(line, ast.If | ast.Try):
            yield from _statements([*line.body, *line.orelse])


def _imported(module: str, is_package: bool, line: ast.ImportFrom) -> str:
    if not line.level:
        return line.module or ""
    parents = module.split(".")
    parents = parents[: len(parents) - line.level + is_package]
    return ".".join([*parents, *([line.module] if line.module else [])])


@cache
def _source(module: str) -> tuple[bool, ast.Module] | None:
    """Return whether a module is a package, and its syntax tree; None if there is no source."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0], *rest)
    is_package = path.is_dir()
    file = path / "__init__.py" if is_package else path.with_name(f"{path.name}.py")
    if not file.is_file():
        return None
    return is_package, ast.parse(file.read_text(encoding="utf-8"))
