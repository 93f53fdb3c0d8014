"""Tiny model of the matrix: its loss forms, adapters and batches, and the measured KL of a step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from ctr_optim import CTROptimizer

VOCAB, WIDTH, CLASSES, USED = 64, 32, 5, 48  # The loss form "masked" uses only the first 48 tokens.
ROWS, LENGTH, PROMPT = 8, 16, 4
MAX_KL = float(inspect.signature(CTROptimizer).parameters["max_kl"].default)

FORMS = ("attached", "detached", "fused", "classification", "contrastive", "ctc", "masked")
ADAPTERS = ("lora", "dora", "only B", "only A", "ia3", "loha", "embedding", "conv", "bypassed", "whole model")


class ConvEmbedding(nn.Embedding):
    """Token embeddings followed by a causal convolution, so that the model has a convolution to adapt."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__(count, width)
        self.conv = nn.Conv1d(width, width, 3, padding=2)

    def forward(self, ids: Tensor) -> Tensor:
        embedded = super().forward(ids)
        return embedded + self.conv(embedded.mT)[..., :-2].mT


class TinyLM(LlamaForCausalLM):
    """A random two-layer Llama whose forward returns its loss in one of several forms."""

    form = "attached"

    def forward(self, input_ids: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if self.form == "attached":
            return super().forward(input_ids=input_ids, labels=labels, **kwargs)
        kwargs.pop("num_items_in_batch", None)
        out = super().forward(input_ids=input_ids, **kwargs)
        logits = out.logits
        if self.form == "contrastive":
            embedded = F.normalize(logits.mean(1), dim=-1)
            loss = F.cross_entropy(similarity(embedded), torch.arange(len(embedded) // 2))
            return loss, embedded
        if self.form == "classification":
            logits = logits[:, -1, :CLASSES]
            return CausalLMOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)
        if self.form == "ctc":
            return CausalLMOutput(loss=None if labels is None else ctc_loss(logits, labels), logits=logits)
        if self.form == "masked":
            logits = logits.masked_fill(torch.arange(logits.shape[-1]) >= USED, -torch.inf)
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        if self.form == "fused" and labels is not None:
            return CausalLMOutput(loss=loss)
        return CausalLMOutput(loss=loss, logits=logits.detach() if self.form == "detached" else logits)


def similarity(embedded: Tensor) -> Tensor:
    """Return the logits of a contrastive loss: the first half of the rows against the second half."""
    left, right = embedded.chunk(2)
    return 10 * left @ right.mT


def ctc_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the CTC loss of ``(B, S, V)`` logits with targets ``(B, T)`` and blank 0."""
    frames = torch.full((len(logits),), logits.shape[1])
    targets = torch.full((len(labels),), labels.shape[1])
    return F.ctc_loss(logits.log_softmax(-1).transpose(0, 1), labels, frames, targets)


def model_of(form: str, vocabulary: int = VOCAB, seed: int = 0) -> TinyLM:
    """Return the model without an adapter, with weights so large that its predictions differ between tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=vocabulary,
        max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=0, use_cache=False,
        initializer_range=0.15, attn_implementation="eager",
    )  # fmt: skip
    model = TinyLM(config)
    embedding = ConvEmbedding(vocabulary, WIDTH)
    with torch.no_grad():
        embedding.weight.normal_(std=0.5)
    model.model.embed_tokens = embedding
    model.form = form
    return model


def adapted(model: TinyLM, adapter: str) -> nn.Module:
    """Return the model with one kind of adapter. Only the adapter trains, except for ``whole model``."""
    if adapter == "whole model":
        return model
    linear = "all-linear"
    config: Any = {
        "dora": LoraConfig(r=4, lora_alpha=8, target_modules=linear, use_dora=True),
        "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "loha": LoHaConfig(r=4, alpha=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]),
        "embedding": LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens"]),
        "conv": LoraConfig(r=4, lora_alpha=8, target_modules=["conv"]),
    }.get(adapter, LoraConfig(r=4, lora_alpha=8, target_modules=linear))
    wrapped = get_peft_model(model, config)
    for name, p in wrapped.named_parameters():
        if adapter == "only B" and "lora_A" in name:
            p.requires_grad_(False)
        if adapter == "only A" and "lora_B" in name:
            nn.init.normal_(p, std=0.1)
            p.requires_grad_(False)
    if adapter == "bypassed":
        for module in wrapped.modules():
            if hasattr(module, "lora_A") and isinstance(getattr(module, "base_layer", None), nn.Linear):
                module.forward = bypass(module)
    return wrapped


def bypass(layer: Any) -> Callable[[Tensor], Tensor]:
    """Return a forward that reads the weights of A and B without calling their modules, like fused kernels."""

    def forward(x: Tensor) -> Tensor:
        out = F.linear(x, layer.base_layer.weight, layer.base_layer.bias)
        if not layer.disable_adapters:  # TRL disables the adapter to get its reference model.
            for name in layer.active_adapters:
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                out = out + layer.scaling[name] * F.linear(F.linear(x, a), b)
        return out

    return forward


def batch_of(form: str, step: int) -> dict[str, Tensor]:
    """Return sequences whose next token is ``5 x + 3``, with one random token in five."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(0, USED, (ROWS, LENGTH), generator=generator)
    chance = torch.rand(ROWS, LENGTH, generator=generator)
    for t in range(1, LENGTH):
        ids[:, t] = torch.where(chance[:, t] < 0.8, (5 * ids[:, t - 1] + 3) % USED, ids[:, t])
    if form == "classification":
        return {"input_ids": ids, "labels": ids[:, -1] % CLASSES}
    if form == "ctc":
        return {"input_ids": ids, "labels": 1 + ids[:, : LENGTH // 3]}
    if form == "contrastive":
        return {"input_ids": ids, "labels": ids[:, 0]}
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(LENGTH) < PROMPT, -100)}


def predictions(model: nn.Module, form: str, batch: dict[str, Tensor]) -> Tensor:
    """Return log-probabilities ``(n, V)`` of every prediction that enters the loss; the model gets no labels."""
    out = model(**{name: value for name, value in batch.items() if name in ("input_ids", "attention_mask")})
    if form == "contrastive":
        return similarity(out[1]).log_softmax(-1)
    log_p = out.logits.float().log_softmax(-1)
    if form == "classification":
        return log_p
    if form == "ctc":
        return log_p.flatten(0, 1)
    return log_p[:, :-1][batch["labels"][:, 1:] != -100]


def kl(before: Tensor, after: Tensor) -> float:
    """Return the mean ``KL(before || after)`` in nats; terms of probability 0 are 0.

    A single column holds the means of Gaussians with unit variance.
    """
    if before.shape[-1] == 1:
        return float(0.5 * (before.double() - after.double()).square().mean())
    p = before.double().exp()
    terms = torch.where(p > 0, p * (before.double() - after.double()), 0)
    return float(terms.sum(-1).mean())


class Meter:
    """Measures the KL of every step over its bound: runs the model on the step's batch before and after the step."""

    def __init__(self, optimizer: Any, run: Callable[[], Tensor | None], closure: bool = False) -> None:
        """Register hooks on the optimizer.

        Args:
            optimizer: the CTROptimizer to measure.
            run: returns the predictions on the step's batch, or None.
            closure: ``step()`` runs the forward, and the caller calls :meth:`start` in that forward.
        """
        self.ratios: list[float] = []
        self.unbounded = 0  # steps without any bound
        self.source = ""
        self._run, self._before, self._optimizer = run, None, optimizer
        if not closure:
            optimizer.register_step_pre_hook(self.start)
        optimizer.register_step_post_hook(self._finish)

    def start(self, *_: Any) -> None:
        """Store the predictions before the step."""
        with torch.no_grad():
            self._before = self._run()

    def _finish(self, *_: Any) -> None:
        if self._before is None:
            return
        with torch.no_grad():
            after = self._run()
        said = self._optimizer.metrics()
        self.source = said["trust/source"]
        bound = said["trust/max_kl"]
        if bound is None:  # Divide by the default bound, so that the table shows the size of an unbounded step.
            self.unbounded += 1
            bound = MAX_KL
        if bound and after is not None:
            self.ratios.append(kl(self._before, after) / bound)
