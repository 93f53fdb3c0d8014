"""Build the wheel, install it into a clean environment, list its dependencies, and run the README's snippets.

    python .ci/wheel.py [TORCH]        # TORCH: pip's requirement for torch, such as torch==2.13.0

Needs a package index. The script first tests the core package. Then it installs the ``hf`` extra and TRL, and runs the
README's snippets for the plain loop, the Trainer and SFT, and the DPO snippet of docs/coming-from-adamw.md. Each
snippet runs in an empty folder. The script prints the seconds of each.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from snippets import SETUPS, blocks  # noqa: E402

SNIPPETS = [("loop", "README.md", 0), ("trainer", "README.md", 1), ("sft", "README.md", 2)]
SNIPPETS += [("dpo", "docs/coming-from-adamw.md", 2)]
CORE = """
import torch
from torch import nn
from ctr_optim import CTROptimizer

class Adapted(nn.Linear):
    def __init__(self):
        super().__init__(8, 8)
        self.lora_A, self.lora_B, self.scaling = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False), 2.0
        self.requires_grad_(False)
        for half in (self.lora_A, self.lora_B):
            half.requires_grad_(True)
    def forward(self, x):
        return super().forward(x) + self.scaling * self.lora_B(self.lora_A(x))

model = Adapted()
opt = CTROptimizer([p for p in model.parameters() if p.requires_grad])
for _ in range(5):
    nn.functional.cross_entropy(model(torch.randn(16, 8)), torch.randint(8, (16,))).backward()
    opt.step()
    opt.zero_grad()
print("core:", len(opt.pairs), "layer,", opt.metrics()["trust/source"])
"""


def main(torch: str) -> None:
    """Install, run all checks and print their times; an error in any of them ends the script."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", folder, str(ROOT))
        wheel = next(work.glob("*.whl"))
        venv.create(work / "env", with_pip=True)
        python = str(work / "env" / "bin" / "python")
        began = time.perf_counter()
        pip(python, "install", torch)  # An unpinned torch may install gigabytes of CUDA packages.
        before = installed(python)
        pip(python, "install", str(wheel))
        print(f"{wheel.name}; packages besides {torch} and its dependencies: {sorted(installed(python) - before)}")
        run(python, work, CORE)
        run(python, work, "from ctr_optim.cli import main; main(['--help'])")
        pip(python, "install", f"{wheel}[hf]", "trl>=0.20")
        print(f"installed with pip: {time.perf_counter() - began:.0f} s, core test included", flush=True)
        for name, page, index in SNIPPETS:
            empty = work / name
            empty.mkdir()
            assets = f"ASSETS = {str(ROOT / 'examples' / 'assets')!r}\n"
            run(python, empty, assets + (SETUPS[page][index] or "") + blocks(page)[index])
        run(python, work / "loop", "from ctr_optim.cli import main; assert main(['inspect', 'out']) == 0")
        run(python, work / "sft", "from ctr_optim.cli import main; assert main(['report', 'out']) == 0")
    print("the README's snippets ran, from the wheel, in a clean environment")


def pip(python: str, *command: str) -> None:
    """Call pip quietly; raise CalledProcessError if it fails."""
    subprocess.run([python, "-m", "pip", "--quiet", "--disable-pip-version-check", *command], check=True)


def installed(python: str) -> set[str]:
    """Return the installed packages as pip lists them, ``name==version``."""
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True
    )
    return set(listed.stdout.split())


def run(python: str, folder: Path, code: str) -> None:
    """Run code in ``folder``, where it cannot import the repository's files by accident."""
    began = time.perf_counter()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([python, "-W", "ignore", "-c", code], cwd=folder, env=environment, check=True)
    print(f"{folder.name}: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "torch")
