"""Statements of the documentation, compared with the code."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from ctr_optim import CTROptimizer, RankScheduler

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").rglob("README.md"))]


def text(page: str) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("of", [CTROptimizer, RankScheduler], ids=lambda c: c.__name__)
def test_every_option_is_listed_with_its_default(of: Any) -> None:
    section = text("options.md").split(f"## {of.__name__}\n")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \| (?:`(.*?)`)? *\|", section, flags=re.M)
    expected = [
        (name, "" if p.default is p.empty else repr(p.default)) for name, p in inspect.signature(of).parameters.items()
    ]
    assert listed == expected


def messages(file: str, least: int = 12) -> list[str]:
    """Return the longest fixed text of every error and warning of a file, including module-level message constants."""
    tree = ast.parse((ROOT / "ctr_optim" / file).read_text(encoding="utf-8"))
    calls = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    calls += [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "warnings.warn"]
    texts = [call.args[0] for call in calls if isinstance(call, ast.Call) and call.args]
    texts += [node.value for node in tree.body if isinstance(node, ast.Assign)]
    pieces = [[c.value for c in ast.walk(t) if isinstance(c, ast.Constant) and isinstance(c.value, str)] for t in texts]
    return [max(found, key=len) for found in pieces if found and len(max(found, key=len)) > least]


@pytest.mark.parametrize("file, least", [("model/checks.py", 40), ("runtime/messages.py", 50)])
def test_the_faq_knows_every_refusal_and_warning(file: str, least: int) -> None:
    quoted = re.findall(r'^### "(.*)"$', text("faq.md"), flags=re.M)
    found = messages(file, least)
    assert found
    unknown = [message for message in found if not any(quote in message for quote in quoted)]
    assert not unknown, "explain these messages in docs/faq.md, each under a heading that quotes the message"


def test_the_faq_quotes_what_is_said() -> None:
    said = " ".join(m for file in (ROOT / "ctr_optim").rglob("*.py") for m in messages(str(file), 0))
    for quote in re.findall(r'^### "(.*)"$', text("faq.md"), flags=re.M):
        assert quote in said


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    content = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)]*))?\)", content):
        file = (page.parent / target) if target else page
        assert file.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.M)
            assert anchor in [re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads], anchor


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="the tutorial's adapters are PEFT's")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    train, save, resume, hand_over = re.findall(r"^```python\n(.*?)^```", text("tutorial.md"), flags=re.M | re.S)
    short = train.replace("steps = 60", "steps = 3").replace("interval=15", "interval=1, hysteresis=0.0, until=1.0")
    assert "steps = 3" in short and "interval=1" in short
    names: dict[str, Any] = {}
    exec("import torch\n" + short + save, names)
    ranks = names["opt"].metrics()["ranks"]
    assert len(set(ranks.values())) > 1
    before = {name: p.detach().clone() for name, p in names["model"].named_parameters() if p.requires_grad}
    rebuild = short[short.index("model = ") : short.index("log = ")]
    exec(rebuild + resume + hand_over, names)
    assert names["opt"].metrics()["ranks"] == ranks
    assert all((p == before[name]).all() for name, p in names["model"].named_parameters() if p.requires_grad)
    assert (tmp_path / "my-adapter" / "adapter_config.json").is_file()
