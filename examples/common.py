"""Shared code of the example scripts: batches of rows, the model with its LoRA layers, evaluation, generation."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

ASSETS = Path(__file__).parent / "assets"
MODULES = [
    "argparse", "calendar", "collections.abc", "contextlib", "datetime", "decimal", "difflib", "enum", "fractions",
    "functools", "gettext", "heapq", "inspect", "logging", "pickle", "queue", "random", "statistics", "subprocess",
    "textwrap", "threading", "timeit", "tokenize", "traceback", "unittest", "urllib.request", "weakref", "zipfile",
]  # fmt: skip

Row = dict[str, str]  # {"prompt": ..., "target": ...}
Batch = dict[str, Tensor]
Example = tuple[list[int], list[int]]  # token ids, and labels with -100 at tokens without a loss


def read_rows(path: str | Path) -> list[Row]:
    """Return the rows of a jsonl file; raise ValueError for a row without "prompt" or "target"."""
    with open(path, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    for number, row in enumerate(rows, 1):
        if "prompt" not in row or "target" not in row:
            raise ValueError(f'{path}, row {number}: expected "prompt" and "target", got {sorted(row)}')
    return rows


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer. Without a padding token it pads with the end-of-text token, which is masked."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode(rows: list[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
    """Encode prompt, target and end-of-text token; only the target and the end-of-text token have labels."""
    examples = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        target = tokenizer(row["target"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(prompt) < max_length:
            examples.append(((prompt + target)[:max_length], ([-100] * len(prompt) + target)[:max_length]))
    if not examples:
        raise ValueError(f"max_length: got {max_length} tokens, shorter than the prompt of each of {len(rows)} rows")
    return examples


def collate(examples: list[Example], pad_id: int, device: torch.device) -> Batch:
    """Return right-padded tensors of shape ``(batch, longest)``."""
    longest = max(len(ids) for ids, _ in examples)

    def stack(sequences: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([s + [fill] * (longest - len(s)) for s in sequences], device=device)

    return {
        "input_ids": stack([ids for ids, _ in examples], pad_id),
        "labels": stack([labels for _, labels in examples], -100),
        "attention_mask": stack([[1] * len(ids) for ids, _ in examples], 0),
    }


def batches(examples: list[Example], size: int, steps: int, seed: int) -> Iterator[list[Example]]:
    """Yield ``steps`` batches from shuffled passes over the data."""
    generator, order = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        while len(order) < size:
            order += torch.randperm(len(examples), generator=generator).tolist()
        yield [examples[i] for i in order[:size]]
        order = order[size:]


def load_base(name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return a pretrained causal language model, from a folder or from the hub."""
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)


def with_lora(base: PreTrainedModel, rank: int, seed: int, targets: str | list[str] = "all-linear") -> PeftModel:
    """Add LoRA to all linear layers except the output layer. The seed fixes the initial weights."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def shared_copy(base: PreTrainedModel) -> PreTrainedModel:
    """Return a copy with its own modules and shared weights, so that several adapters need the weights once."""
    return copy.deepcopy(base, {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})


def docstrings() -> str:
    """Return plain text that every machine has: docstrings of Python's own modules, technical English."""
    parts = []
    for name in MODULES:
        module = import_module(name)
        public = [getattr(module, n) for n in sorted(vars(module)) if not n.startswith("_")]
        for thing in [module, *(x for x in public if inspect.isclass(x) or inspect.isfunction(x))]:
            text = inspect.getdoc(thing) or ""
            if len(text) > 200 and ">>>" not in text and text[:500] not in parts:
                parts.append(text[:500])
    return "\n\n".join(parts)


def pieces(text: str, tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> list[Example]:
    """Return at most ``count`` pieces of ``length`` tokens with a label at every token."""
    ids = tokenizer(text)["input_ids"]
    found = [ids[start : start + length] for start in range(0, len(ids), length)][:count]
    return [(piece, piece) for piece in found if len(piece) > 1]


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    examples: list[Example],
    size: int,
    pad_id: int,
    device: torch.device,
    tick: Callable[[int], object] = lambda rows: None,
) -> float:
    """Return the loss per target token, in nats. ``tick`` receives the number of rows after each batch."""
    model.eval()
    total, tokens = 0.0, 0
    examples = sorted(examples, key=lambda example: len(example[0]))  # Rows of similar length need less padding.
    for start in range(0, len(examples), size):
        batch = collate(examples[start : start + size], pad_id, device)
        count = int((batch["labels"][:, 1:] != -100).sum())
        total, tokens = total + float(model(**batch).loss) * count, tokens + count
        tick(len(batch["labels"]))
    model.train()
    return total / tokens


@torch.no_grad()
def generate(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[str], length: int) -> list[str]:
    """Return greedy continuations of the prompts."""
    model.eval()
    device = next(model.parameters()).device
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(device)
    outputs = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=length,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.train()
    texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]
