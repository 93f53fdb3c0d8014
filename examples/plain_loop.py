"""The smallest example: a pretrained model, LoRA layers from PEFT, a plain loop, and one changed line."""

import json
from pathlib import Path

from peft import LoraConfig, get_peft_model
from torch.optim.lr_scheduler import CosineAnnealingLR
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctr_optim import CTROptimizer

STEPS = 20
assets = Path(__file__).parent / "assets"
rows = [json.loads(line) for line in (assets / "e2e" / "train.jsonl").read_text(encoding="utf-8").splitlines()]

tokenizer = AutoTokenizer.from_pretrained(assets / "base5m")
model = AutoModelForCausalLM.from_pretrained(assets / "base5m").float()
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))

opt = CTROptimizer([p for p in model.parameters() if p.requires_grad])  # was: torch.optim.AdamW(...)
schedule = CosineAnnealingLR(opt, T_max=STEPS)

for step in range(STEPS):
    texts = [row["prompt"] + row["target"] for row in rows[8 * step : 8 * step + 8]]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    loss.backward()
    opt.step()
    opt.zero_grad()
    schedule.step()
    trust = opt.metrics()
    print(f"step {step:2}  loss {loss:.3f}  KL from base {trust['kl_from_base']:.4f}  scale {trust['trust/scale']:.2f}")

# model.save_pretrained("my-adapter") writes a plain PEFT adapter
