"""Which part of the library may import which: the rules as data, held against the imports in the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ctr_optim"

# A part may import itself and these: parts, or single modules of them. What only protocols connect is told so.
_PROTOCOLS = ("curvature.base", "curvature.factors.base", "trust_region.protocols")
_METHOD = ("runtime", "settings", "linalg", "model")
_BELOW = (*_METHOD, "curvature", "retention", "direction", "trust_region", "ranks", "holdout", "checkpoint")
RULES: Mapping[str, tuple[str, ...]] = {
    "settings": (),
    "runtime": ("settings",),
    "linalg": (),
    "model": ("runtime", "settings", "linalg"),
    "curvature": (*_METHOD, *_PROTOCOLS),
    "retention": (*_METHOD, *_PROTOCOLS),
    "direction": (*_METHOD, *_PROTOCOLS),
    "trust_region": ("runtime", "settings", *_PROTOCOLS),
    "ranks": (*_METHOD, *_PROTOCOLS),
    "holdout": (*_METHOD, "retention.passes"),
    "checkpoint": (*_METHOD, "curvature", "direction", "holdout.judge", "trust_region.rows", "trust_region.bound"),
    "metrics": _BELOW,
    "attached": (*_BELOW, "metrics"),
    "optimizer": (*_BELOW, "metrics", "attached"),
    # These build an optimizer, so they sit above it.
    "ranks.initialize": (*_BELOW, "optimizer"),
    "ranks.compress": (*_BELOW, "optimizer"),
    "ranks.measurement": (*_BELOW, "optimizer"),
    "ranks.refit": (*_BELOW, "optimizer"),
}
TOP = ("export", "report", "integrations", "cli", "events", "__init__")  # may import all; nothing below imports them


def modules() -> dict[str, Path]:
    """Every module's dotted name without the package's own, and its file."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = file
    return found


def imports(file: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """The library's modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "ctr_optim":
                yield _module(name.split(".")[1:], known)


def _module(parts: list[str], known: Mapping[str, Path]) -> str:
    """The longest prefix that is a module: the rest are names in it."""
    while parts and ".".join(parts) not in known:
        parts = parts[:-1]
    return ".".join(parts) or "__init__"


def edges() -> set[tuple[str, str]]:
    known = modules()
    return {(name, other) for name, file in known.items() for other in imports(file, known) if other != name}


def within(module: str, part: str) -> bool:
    return module == part or module.startswith(part + ".")


def allowed(importer: str, imported: str) -> bool:
    part = importer.split(".")[0]
    if part in TOP or within(imported, part):
        return True
    return any(within(imported, other) for other in RULES.get(importer, RULES[part]))


def test_every_part_has_a_rule() -> None:
    parts = {name.split(".")[0] for name in modules()}
    assert parts <= RULES.keys() | set(TOP), "a new part: say in RULES what it may import"


def test_imports_keep_to_the_rules() -> None:
    broken = {edge for edge in edges() if not allowed(*edge)}
    assert not broken, f"imports against the rules: {sorted(broken)}"


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for importer, imported in edges():
        graph.setdefault(importer, set()).add(imported)
    TopologicalSorter(graph).prepare()


def test_parts_do_not_import_each_other_in_a_circle() -> None:
    """But for protocols, which all may import, and for modules that sit above the optimizer."""
    graph: dict[str, set[str]] = {}
    for importer, imported in edges():
        one, other = (name if name in RULES else name.split(".")[0] for name in (importer, imported))
        if one != other and one not in TOP and imported not in _PROTOCOLS:
            graph.setdefault(one, set()).add(other)
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("importer, imported", [("curvature.kfac", "trust_region.region"), ("ranks.scheduler", "cli")])
def test_the_rules_would_notice(importer: str, imported: str) -> None:
    assert not allowed(importer, imported)
    assert allowed("direction.step", "curvature.base") and allowed("ranks.initialize", "optimizer")
