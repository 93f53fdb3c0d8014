"""Build the wheel, install it into a clean environment, see what came along, and run the README's snippet.

    python .ci/wheel.py [TORCH]        # TORCH: what to give pip for torch, such as torch==2.13.0

Needs a package index. First the core alone; then with the ``hf`` extra, since the snippet's model is PEFT's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
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
SETUP = """
import json
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

assets = {assets!r}
model = AutoModelForCausalLM.from_pretrained(assets + "/base5m").float()
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
tokenizer = AutoTokenizer.from_pretrained(assets + "/base5m")
rows = [json.loads(line) for line in open(assets + "/e2e/train.jsonl", encoding="utf-8")]
loader = []
for i in range(4):
    batch = tokenizer([r["prompt"] + r["target"] for r in rows[4 * i : 4 * i + 4]], return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loader.append({{"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}})
"""


def main(torch: str) -> None:
    """Print what was installed, and fail where anything does."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", folder, str(ROOT))
        wheel = next(work.glob("*.whl"))
        venv.create(work / "env", with_pip=True)
        python = str(work / "env" / "bin" / "python")
        pip(python, "install", torch)  # an unpinned torch may bring gigabytes of CUDA
        before = installed(python)
        pip(python, "install", str(wheel))
        print(f"{wheel.name}; besides {torch} and what it needs it brought: {sorted(installed(python) - before)}")
        run(python, work, CORE)
        run(python, work, "from ctr_optim.cli import main; main(['--help'])")
        pip(python, "install", f"{wheel}[hf]")
        snippet = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
        assert snippet is not None
        run(python, work, SETUP.format(assets=str(ROOT / "examples" / "assets")) + snippet[1])
        run(python, work, "from ctr_optim.cli import main; assert main(['inspect', 'out']) == 0")
    print("the README's snippet ran, from the wheel, in a clean environment")


def pip(python: str, *command: str) -> None:
    """One quiet call of pip."""
    subprocess.run([python, "-m", "pip", "--quiet", "--disable-pip-version-check", *command], check=True)


def installed(python: str) -> set[str]:
    """Names and versions, as pip lists them."""
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True
    )
    return set(listed.stdout.split())


def run(python: str, folder: Path, code: str) -> None:
    """Run code in ``folder``, where nothing of the repository can be imported by accident."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([python, "-W", "ignore", "-c", code], cwd=folder, env=environment, check=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "torch")
