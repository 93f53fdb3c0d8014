"""The model, its batch and the rounds of training steps that all benchmarks of this folder time."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim import Optimizer

from benchmarks.performance.common import Clock, Report, tensor_bytes
from ctr_optim import CTROptimizer

SHAPES: dict[str, dict[str, int]] = {
    "llama2-7b": dict(
        hidden_size=4096, num_hidden_layers=32, intermediate_size=11008, num_attention_heads=32, vocab_size=32000
    ),
    "tiny": dict(hidden_size=64, num_hidden_layers=2, intermediate_size=160, num_attention_heads=4, vocab_size=256),
}
PERIOD = 50  # CTROptimizer's longest interval, a multiple of the others


@dataclass
class Bench:
    """A model, its batch and the clock."""

    model: nn.Module
    device: torch.device
    clock: Clock
    report: Report
    batch: tuple[int, int]
    vocabulary: int
    autocast: bool

    @property
    def params(self) -> list[nn.Parameter]:
        """The trained parameters: A and B of each layer in turn."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def forward_backward(self) -> None:
        """Run forward and backward on one batch of random tokens."""
        tokens = torch.randint(0, self.vocabulary, self.batch, device=self.device)
        context: AbstractContextManager = nullcontext()
        if self.autocast:
            context = torch.autocast(self.device.type, dtype=torch.bfloat16)
        with context:
            loss = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()

    def free(self) -> None:
        """Release unused memory to the device."""
        gc.collect()
        if self.clock.cuda:
            torch.cuda.empty_cache()


def build_base(shape: str, path: str | None, device: torch.device, dtype: torch.dtype, length: int) -> nn.Module:
    """Return the base model on the device: a local model, or a shape with random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if shape == "base5m":
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=max(length, 64), use_cache=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def build(args: argparse.Namespace, report: Report, device: torch.device) -> Bench:
    """Return the benchmark with LoRA on every linear layer of the model."""
    dtype = torch.float32 if args.precision == "float32" else torch.bfloat16
    base = build_base(args.shape, args.model, device, dtype, args.length)
    base.config.use_cache = False
    if args.checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear")
    model = get_peft_model(base, config, autocast_adapter_dtype=args.precision != "bfloat16").train()
    shape, autocast = (args.batch, args.length), args.precision == "autocast"
    bench = Bench(model, device, Clock(device), report, shape, base.config.vocab_size, autocast)
    params = bench.params
    report.add(
        "model",
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in params),
        pairs=len(params) // 2,
        adapter_dtype=str(params[0].dtype),
    )
    return bench


@dataclass
class Round:
    """Results of consecutive steps: wall-clock seconds per step, device times of the parts, peak memory."""

    seconds: float
    model_ms: list[float]
    step_ms: list[float]
    peak: int = 0
    kinds: list[str] = field(default_factory=list)


def run_round(bench: Bench, optimizer: Optimizer, steps: int, kind: Callable[[], str] = lambda: "") -> Round:
    """Time ``steps`` training steps: forward, backward, step, zero_grad."""
    clock, marks, kinds = bench.clock, [], []
    if clock.cuda:
        torch.cuda.reset_peak_memory_stats()
    clock.wait()
    start = time.perf_counter()
    for _ in range(steps):
        kinds.append(kind())
        begin = clock.mark()
        bench.forward_backward()
        middle = clock.mark()
        optimizer.step()
        optimizer.zero_grad()
        marks.append((begin, middle, clock.mark()))
    clock.wait()
    seconds = (time.perf_counter() - start) / steps
    peak = torch.cuda.max_memory_allocated() if clock.cuda else 0
    return Round(seconds, [clock.ms(a, b) for a, b, _ in marks], [clock.ms(b, c) for _, b, c in marks], peak, kinds)


class Resumable:
    """CTROptimizer that is detached from the model between rounds and attached again with its state."""

    def __init__(self, bench: Bench, **options: Any) -> None:
        self.bench, self.options = bench, options
        self.saved: dict[str, Any] | None = None

    def open(self, **options: Any) -> CTROptimizer:
        """Attach an optimizer to the model and load the saved state."""
        optimizer = CTROptimizer(self.bench.params, model=self.bench.model, **self.options, **options)
        if self.saved is not None:
            optimizer.load_state_dict(self.saved)
            self.saved = None
        return optimizer

    def close(self, optimizer: CTROptimizer) -> None:
        """Save the state and detach the optimizer from the model."""
        self.saved = optimizer.state_dict()
        optimizer.close()

    @property
    def bytes(self) -> int:
        """Bytes of the saved state."""
        return 0 if self.saved is None else tensor_bytes(self.saved["state"].values())
