"""The Python blocks of README and docs, and a setup for each: code that defines the names that the block expects.

A setup is text, so that ``.ci/wheel.py`` can run it together with a block in another environment. It may use
``ASSETS``, the path of the bundled model and data.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]

MODEL = """
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(ASSETS + "/base5m").float()
tokenizer = AutoTokenizer.from_pretrained(ASSETS + "/base5m")
"""
ROWS = """
import json
examples = [json.loads(line) for line in open(ASSETS + "/e2e/train.jsonl", encoding="utf-8")][:8]
def encoded(row):
    ids = tokenizer(row["prompt"] + row["target"], padding="max_length", truncation=True, max_length=64)
    return {**ids, "labels": [i if m else -100 for i, m in zip(ids["input_ids"], ids["attention_mask"])]}
rows = [encoded(row) for row in examples]
"""
ADAPTER = """
from peft import LoraConfig, get_peft_model
model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
"""
LOADER = """
import torch
def joined(some):
    return {key: torch.tensor([row[key] for row in some]) for key in ("input_ids", "attention_mask", "labels")}
loader = torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=joined)
batches = list(loader)
"""
LOOP = MODEL + ROWS + ADAPTER + LOADER
TRAINER = MODEL + ROWS + ADAPTER
SFT = """
import json
from functools import partial
import torch
import trl
if not torch.cuda.is_available():  # TRL's configs ask for bfloat16, and refuse a machine without a GPU
    trl.SFTConfig, trl.DPOConfig = (partial(config, use_cpu=True) for config in (trl.SFTConfig, trl.DPOConfig))
from datasets import Dataset
model = ASSETS + "/base5m"
examples = [json.loads(line) for line in open(ASSETS + "/e2e/train.jsonl", encoding="utf-8")][:8]
rows = Dataset.from_list([{"prompt": row["prompt"], "completion": row["target"]} for row in examples])
"""
DPO = (
    SFT
    + """
rows = Dataset.from_list([
    {"prompt": one["prompt"], "chosen": one["target"], "rejected": other["target"]}
    for one, other in zip(examples, examples[::-1])
])
"""
)
GRPO = (
    SFT
    + """
trl.GRPOConfig = partial(trl.GRPOConfig, max_steps=2, max_completion_length=8, use_cpu=not torch.cuda.is_available())
"""
)
SAMPLES = """
loader = [{**batch, "advantage": torch.tensor([1.0, -1.0])} for batch in batches]
"""
ONE_PROCESS = """
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
"""
FSDP = LOOP + ONE_PROCESS + "from torch.distributed.fsdp import fully_shard\nfrom ctr_optim import CTROptimizer\n"
FSDP += "import torch.distributed.checkpoint as dcp\nfolder = 'checkpoint'\n"
STAND_IN = """
import sys, types
def stand_in(name, **attributes):
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        module = sys.modules.setdefault(".".join(parts[:depth]), types.ModuleType(".".join(parts[:depth])))
        module.__path__ = []
    for key, value in attributes.items():
        setattr(module, key, value)
"""
STEPS = """
opt = CTROptimizer(model.parameters())
for batch in loader:
    model(**batch).loss.backward()
    opt.step()
    opt.zero_grad()
opt.close()
"""
CTR = "from ctr_optim import CTROptimizer, RankScheduler\n"

SETUPS: dict[str, list[str | None]] = {
    "README.md": [LOOP, TRAINER, SFT],
    "docs/README.md": [LOOP],
    "docs/choosing.md": [LOOP],
    "docs/coming-from-adamw.md": [LOOP, TRAINER, DPO],
    "docs/compress.md": [LOOP + CTR + STEPS, LOOP + CTR],
    "docs/distributed.md": [FSDP, None],
    "docs/integrations.md": [
        TRAINER,
        DPO,
        LOOP,
        LOOP,
        STAND_IN
        + 'stand_in("llamafactory.train.sft.trainer", create_custom_optimizer=None)\n'
        + 'stand_in("llamafactory.train.tuner", run_exp=lambda callbacks: None)\n',
        STAND_IN + 'stand_in("swift.optimizers", OptimizerCallback=object, optimizers_map={})\n',
        STAND_IN
        + 'from dataclasses import make_dataclass\nCONFIG = make_dataclass("Config", ["param_groups"])\n'
        + 'stand_in("torchtitan.components.optimizer", ParamGroupConfig=dict,\n'
        + '         OptimizersContainer=type("OptimizersContainer", (), {"Config": CONFIG}))\n',
    ],
    "docs/holdout.md": [LOOP + CTR],
    "docs/not-forgetting.md": [LOOP + CTR],
    "docs/reinforcement-learning.md": [GRPO, LOOP + SAMPLES],
}
"""Setups by page, one per block. None: the block uses the names of the previous block."""

ELSEWHERE = {
    "docs/extending.md": "tests/test_docs_extending.py",
    "docs/tutorial.md": "tests/test_docs.py::test_the_tutorial_runs",
    "examples/peft/README.md": "tests/integrations/test_peft_draft.py",
}


def blocks(page: str) -> list[str]:
    """Return the Python blocks of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
