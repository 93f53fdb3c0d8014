"""Small models, batches, and oracles that share no code with the library."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctr_optim import CTROptimizer
from ctr_optim.curvature.factors import STRUCTURES

VOCAB = 11

needs_newer_compiler = pytest.mark.skipif(
    torch.__version__.startswith("2.6."),
    reason="torch 2.6 cannot compile PEFT's models as one graph",
)


class LoRALinear(nn.Module):
    """y = W0 x + s B A x, in the usual hand-written form."""

    def __init__(self, d_in: int, d_out: int, rank: int, scaling: float) -> None:
        super().__init__()
        self.base = nn.Linear(d_in, d_out, bias=False).requires_grad_(False)
        self.lora_A = nn.Linear(d_in, rank, bias=False)
        self.lora_B = nn.Linear(rank, d_out, bias=False)
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * self.lora_B(self.lora_A(x))


class Net(nn.Module):
    """Token ids to logits through two LoRA layers; each token is independent of the others."""

    def __init__(self, rank: int = 3, scaling: float = 2.0, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8).requires_grad_(False)
        self.up = LoRALinear(8, 10, rank, scaling)
        self.down = LoRALinear(10, 7, rank, 0.5 * scaling)
        self.norm = nn.BatchNorm1d(10).requires_grad_(False) if norm else None
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(7, VOCAB).requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.up(self.embed(ids)).tanh()
        if self.norm is not None:
            x = self.norm(x.mT).mT
        return self.head(self.down(self.dropout(x)).tanh())


class TorchtuneLinear(nn.Module):
    """A copy of torchtune's LoRALinear: s = alpha / rank, computed in every forward."""

    def __init__(self, d_in: int, d_out: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in), requires_grad=False)
        self.rank, self.alpha = rank, alpha
        self.lora_a, self.lora_b = nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT + (self.alpha / self.rank) * self.lora_b(self.lora_a(x))


class TorchtitanLinear(nn.Linear):
    """A copy of torchtitan's LoRALinear: a linear layer with submodules, s in one attribute, and no rank."""

    def __init__(self, d_in: int, d_out: int, rank: int, alpha: float) -> None:
        super().__init__(d_in, d_out, bias=False)
        self.weight.requires_grad_(False)
        self._lora_scaling = alpha / rank
        self.lora_a, self.lora_b = nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=False)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self._lora_scaling * self.lora_b(self.lora_a(x))


def net(seed: int = 0, dtype: torch.dtype = torch.float64, b_std: float = 0.3, **options: Any) -> Net:
    """Return a seeded Net. B is not zero, so that no factor is zero; ``b_std=0`` gives a fresh adapter."""
    torch.manual_seed(seed)
    model = Net(**options)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B.weight, std=b_std)
    return model.to(dtype)


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the hand-written LoRA layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def batch(seed: int = 0, n: int = 4, length: int = 6, ignored: int = 2, vocab: int = VOCAB) -> tuple[Tensor, Tensor]:
    """Return token ids and labels, ``(n, length)`` each; the first ``ignored`` labels of a sequence are -100."""
    generator = torch.Generator().manual_seed(1000 + seed)
    ids = torch.randint(0, vocab, (n, length), generator=generator)
    labels = torch.randint(0, vocab, (n, length), generator=generator)
    labels[:, :ignored] = -100
    return ids, labels


def loss_of(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross-entropy over the tokens that have a label."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction=reduction)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require a gradient."""
    return [p for p in model.parameters() if p.requires_grad]


def optimizer(model: nn.Module, **options: Any) -> CTROptimizer:
    """Return an optimizer that updates factors and bases at every step, without calibration, unless overridden."""
    defaults = dict(model=model, factor_interval=1, basis_interval=1, calibration_interval=None, kl_schedule="lr")
    return CTROptimizer(trainable(model), **{**defaults, **options})


def plain_bound(params: Any, *args: Any, **options: Any) -> CTROptimizer:
    """Return an optimizer whose bound is ``max_kl`` times the schedule, independent of the number of loss tokens."""
    return CTROptimizer(params, *args, **{"kl_schedule": "lr", **options})


def backward(model: nn.Module, data: tuple[Tensor, Tensor], reduction: str = "mean", weight: float = 1.0) -> Tensor:
    """Run one forward and backward of the model; return the loss."""
    ids, labels = data
    loss = loss_of(model(ids), labels, reduction) * weight
    loss.backward()
    return loss.detach()


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    """Train on a new batch at every step."""
    for step in range(start, start + steps):
        opt.zero_grad()
        backward(model, batch(step))
        opt.step()


def tiny_llama(
    dtype: torch.dtype = torch.float64, seed: int = 0, dropout: float = 0.0, peft: bool = True, **lora: Any
) -> nn.Module:
    """Return a random two-layer Llama of width 32 with LoRA on every linear layer and nonzero B."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64, attention_dropout=dropout, attn_implementation="eager",
        pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    if not peft:
        return model
    options = dict(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False)
    model = get_peft_model(model, LoraConfig(**{**options, **lora}), autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.mul_(0.3)
    return model.train()


def llama_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return PEFT's LoRA layers by their name in the base model."""
    prefix = "base_model.model."
    return {name.removeprefix(prefix): module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def llama_batch(seed: int = 0, n: int = 4, length: int = 8, prompt: int = 3) -> dict[str, Tensor]:
    """Return sequences for a causal language model: labels already shifted by one, and -100 on the prompt."""
    ids, labels = batch(seed, n, length, prompt, vocab=64)
    positions = torch.arange(length).expand(n, length)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "position_ids": positions}


def llama_loss(model: nn.Module, data: dict[str, Tensor], reduction: str = "mean") -> Tensor:
    """Return the loss in the model's own precision, from its logits."""
    logits = model(**{k: v for k, v in data.items() if k != "labels"}).logits
    return loss_of(logits, data["labels"], reduction)


# -- oracles ----------------------------------------------------------------------------------------------------------


def dense_factors(
    model: nn.Module,
    layers: dict[str, nn.Module],
    weights: Callable[[nn.Module], Any],
    mean_loss: Callable[..., Tensor],
) -> dict[str, dict[str, Tensor]]:
    """Return C, S, H and D of each layer from first principles, on a copy of the model.

    A hook adds zeros to each layer's output. The gradient of the mean loss with respect to these zeros is ``delta``,
    one row per token. The factors then follow from their definitions. ``weights(layer)`` returns ``(A, B, s)``.
    """
    clone = copy.deepcopy(model)
    names = {id(m): name for name, m in model.named_modules()}
    copies = dict(clone.named_modules())
    inputs: dict[str, Tensor] = {}
    zeros: dict[str, Tensor] = {}
    handles = []
    for key, layer in layers.items():

        def hook(_: nn.Module, args: tuple[Any, ...], out: Tensor, key: str = key) -> Tensor:
            inputs[key] = args[0].detach().flatten(0, -2)
            zeros[key] = torch.zeros_like(out, requires_grad=True)
            return out + zeros[key]

        handles.append(copies[names[id(layer)]].register_forward_hook(hook))
    loss = mean_loss(clone)
    grads = dict(zip(layers, torch.autograd.grad(loss, [zeros[k] for k in layers]), strict=True))
    for handle in handles:
        handle.remove()
    delta = {key: g.flatten(0, -2) for key, g in grads.items()}
    active = {key: (d != 0).any(-1) for key, d in delta.items()}
    tokens = min(int(a.sum()) for a in active.values())
    result = {}
    for key, layer in layers.items():
        a, b, s = weights(layer)
        x, per_token = inputs[key][active[key]], tokens * s * delta[key]
        C, S = x.mT @ x / x.shape[0], per_token.mT @ per_token / tokens
        result[key] = {"C": C, "S": S, "H": a @ C @ a.mT, "D": b.mT @ S @ b}
    return {key: {k: v.detach() for k, v in f.items()} for key, f in result.items()}


def plain_weights(layer: nn.Module) -> tuple[Tensor, Tensor, float]:
    """Return A, B and s of a hand-written layer."""
    return layer.lora_A.weight.detach(), layer.lora_B.weight.detach(), layer.scaling


def peft_weights(layer: nn.Module) -> tuple[Tensor, Tensor, float]:
    """Return A, B and s of a PEFT layer."""
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach(), layer.scaling["default"]


def factors_of(opt: CTROptimizer) -> dict[str, dict[str, Tensor]]:
    """Return the optimizer's factors as dense matrices."""
    opt.metrics()  # It creates the state before the first step.
    result = {}
    for pair in opt.pairs:
        state = opt.state[pair.B]
        held = {key.removeprefix("input_") for key in state if key.startswith("input_")}
        structure = next(s for s in STRUCTURES.values() if set(s.fields) == held)
        C, S = (structure(*(state[f"{side}_{f}"] for f in structure.fields)) for side in ("input", "output"))
        dense = {"C": C.to_dense(), "S": S.to_dense(), "H": state["rank_input"], "D": state["rank_output"]}
        result[pair.name] = {k: v.detach().clone() for k, v in dense.items()}
    return result


def numbers(opt: CTROptimizer) -> dict[str, Any]:
    """Return the optimizer's own numbers in the form of a checkpoint."""
    found: dict[str, Any] = opt.state_dict()["param_groups"][0]["ctr"]
    return found


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return the Frobenius norm of the difference, divided by that of ``expected``."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def assert_factors(got: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]], tol: float) -> None:
    """Assert that the layers are the same and that each factor has a relative error below ``tol``."""
    assert got.keys() == expected.keys() and got
    errors = {(n, k): relative_error(got[n][k], expected[n][k]) for n in got for k in expected[n]}
    worst = max(errors, key=lambda key: errors[key])
    assert errors[worst] < tol, f"{worst}: relative error {errors[worst]:.3g}"


def kl_of_step(factors: dict[str, dict[str, Tensor]], before: dict[str, Any], after: dict[str, Any]) -> float:
    """Return ``q / 2`` of a change of A and B, summed over layers, in plain dense algebra.

    As documented for ``quadratic``, the cross term is limited to the Cauchy-Schwarz bound of the two squares.
    """
    total = 0.0
    for name, f in factors.items():
        C, S, H, D = (f[k].double() for k in "CSHD")
        a, b = (t.double() for t in before[name])
        da, db = (y.double() - x.double() for x, y in zip(before[name], after[name], strict=True))
        square_a, square_b = float(torch.trace(da.mT @ D @ da @ C)), float(torch.trace(db.mT @ S @ db @ H))
        cross = float(torch.trace((S @ b @ da @ C @ a.mT).mT @ db))
        limit = (max(square_a, 0) * max(square_b, 0)) ** 0.5
        total += square_a + square_b + 2 * min(max(cross, -limit), limit)
    return total / 2


def weights_of(opt: CTROptimizer) -> dict[str, tuple[Tensor, Tensor]]:
    """Return copies of every A and B."""
    return {pair.name: (pair.A.detach().clone(), pair.B.detach().clone()) for pair in opt.pairs}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters and buffers."""
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Return whether two snapshots are bit-equal."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def exact_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Return ``KL(p || q)`` of each token, in float64."""
    log_p, log_q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def finite(model: torch.nn.Module) -> bool:
    return all(p.isfinite().all() for p in model.parameters())


def held(opt: CTROptimizer) -> bool:
    """Return whether the last step's predicted KL is within its bound."""
    metrics = opt.metrics()
    return metrics["trust/max_kl"] is None or metrics["trust/predicted_kl"] <= metrics["trust/max_kl"] * (1 + 1e-4)
