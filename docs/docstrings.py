"""For mkdocstrings: docstrings speak reStructuredText where it shows formulas and names; the site speaks Markdown."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object
from latex2mathml.converter import convert


class Roles(Extension):
    """``:class:`~a.b``` becomes code, ``:math:`` and ``.. math::`` become MathML, which browsers show by themselves."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is None:
            return
        text = obj.docstring.value
        text = re.sub(r":math:`([^`]*)`", lambda m: convert(m[1]), text)
        text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
        text = re.sub(r"^ *\.\. math::\n((?:\n|[ ]+.*\n)+?)(?=^\S|\Z|\n^\S)", _display, text, flags=re.M)
        # a line that begins with a formula would become a paragraph of its own
        obj.docstring.value = re.sub(r'\n *(<math[^>]*display="inline")', r" \1", text).replace("::\n\n", ":\n\n")


def _display(found: re.Match[str]) -> str:
    lines = [line.strip().removesuffix(r"\quad") for line in found[1].splitlines() if line.strip()]
    return "\n" + "\n\n".join(convert(line, display="block") for line in lines) + "\n"
