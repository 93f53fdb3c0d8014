"""Rules of which part of the library may import which, compared with the imports in the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ctr_optim"

# A part may import itself and the listed parts or modules. Parts that need only protocols list the protocol modules.
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
    "checkpoint": (
        *_METHOD,
        "curvature",
        "direction",
        "holdout.judge",
        "retention.boundary",
        "trust_region.rows",
        "trust_region.bound",
    ),
    "metrics": _BELOW,
    "numbered": _BELOW,
    "attached": (*_BELOW, "metrics", "numbered"),
    "weights": (*_BELOW, "attached"),
    "ranked": (*_BELOW, "attached", "weights"),
    "optimizer": (*_BELOW, "metrics", "attached", "weights", "ranked"),
    # These modules build an optimizer, so that they may import it.
    "ranks.initialize": (*_BELOW, "optimizer"),
    "ranks.compress": (*_BELOW, "optimizer"),
    "ranks.measurement": (*_BELOW, "optimizer"),
    "ranks.refit": (*_BELOW, "optimizer"),
}
TOP = ("export", "report", "integrations", "cli", "events", "__init__")  # They may import all parts; none imports them.


def modules() -> dict[str, Path]:
    """Return the file of every module, by its dotted name without the package's name."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = file
    return found


def imports(file: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """Yield the library's modules that a file imports, also inside functions."""
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
    """Return the longest prefix that is a module; the remaining parts are names in it."""
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
    assert parts <= RULES.keys() | set(TOP), "a new part: add the parts that it may import to RULES"


def test_imports_keep_to_the_rules() -> None:
    broken = {edge for edge in edges() if not allowed(*edge)}
    assert not broken, f"imports against the rules: {sorted(broken)}"


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for importer, imported in edges():
        graph.setdefault(importer, set()).add(imported)
    TopologicalSorter(graph).prepare()


def test_parts_do_not_import_each_other_in_a_circle() -> None:
    """Exceptions are the protocols, which all parts may import, and the modules that build an optimizer."""
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
