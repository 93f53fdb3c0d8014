"""Run a script with every CTROptimizer set to plain AdamW at 2e-4: no curvature, no trust region.

python tests/as_adamw.py SCRIPT [ARGUMENTS]
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

from ctr_optim import CTROptimizer

AS_ADAMW: dict[str, Any] = {"max_kl": None, "curvature": "none", "lr": 2e-4, "betas": (0.9, 0.999)}


def main() -> None:
    """Change the defaults of CTROptimizer, then run the script as the main module."""
    build = CTROptimizer.__init__

    def plain(self: CTROptimizer, *args: Any, **options: Any) -> None:
        build(self, *args, **{**options, **AS_ADAMW, "rank_scheduler": None})

    CTROptimizer.__init__ = plain  # type: ignore[method-assign]
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
