"""The page "Coming from AdamW", compared with the code."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import torch

from ctr_optim import CTROptimizer

PAGE = (Path(__file__).parents[1] / "docs" / "coming-from-adamw.md").read_text(encoding="utf-8")


def test_the_defaults_in_the_table_are_the_codes() -> None:
    ours = inspect.signature(CTROptimizer).parameters
    for line in re.findall(r"^\| `(?:lr|betas|eps|weight_decay|fused).*$", PAGE, flags=re.M):
        name, value = re.match(r"`(\w+)=(.+)`", line.split(" | ")[1]).groups()  # type: ignore[union-attr]
        assert eval(value) == ours[name].default, line


def test_every_option_of_adamw_is_mapped() -> None:
    theirs = set(inspect.signature(torch.optim.AdamW).parameters) - {"params", "maximize"}
    assert theirs == {name for name in theirs if f"`{name}" in PAGE}
