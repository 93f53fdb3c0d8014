"""For mkdocs: pages link to files of the repository outside ``docs/``; the site gets what it can show of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
SHOWN = (
    "benchmarks/**/*.md", "benchmarks/**/*.png", "benchmarks/**/*.svg",
    "examples/**/*.py", "examples/**/*.yaml", "examples/*/*.md",
)  # fmt: skip
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add what the pages show from outside ``docs/``, under its own path."""
    for path in sorted(path for pattern in SHOWN for path in ROOT.glob(pattern)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at the same files on the site; a file that is not there is named without a link."""
    here = Path(page.file.src_uri)
    own = ROOT / "docs" / here
    start = own.parent if own.is_file() else (ROOT / here).parent

    def on_site(found: re.Match[str]) -> str:
        image, text, target, anchor = found.groups()
        path = (start / target).resolve()
        for base in (ROOT / "docs", ROOT):
            uri = path.relative_to(base).as_posix() if path.is_relative_to(base) else ""
            if files.get_file_from_path(uri) is not None:
                up = "../" * (len(here.parts) - 1)
                return f"{image}[{text}]({up}{uri}{anchor or ''})"
        return text if path.exists() else found[0]  # what exists nowhere is left for mkdocs to complain of

    return LINK.sub(on_site, markdown)
