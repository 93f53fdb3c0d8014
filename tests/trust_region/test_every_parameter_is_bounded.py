"""The measured KL stays near the bound for all kinds of trained parameters and layers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import batch, loss_of, net, tiny_llama, trainable
from torch import Tensor, nn
from torch.nn import functional as F

from ctr_optim import CTROptimizer

BOUND = 1e-2


def ids_and_labels(seed: int) -> tuple[Tensor, Tensor]:
    return batch(seed, 8, 12, 3, vocab=64)


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits.double()


def largest_ratio(model: nn.Module, steps: int = 20, **options: Any) -> tuple[float, CTROptimizer]:
    """Train on a repeated pattern; return the median ratio of the measured KL per loss token to the bound."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = CTROptimizer(trainable(model), max_kl=BOUND, kl_schedule="constant", **options)
    ratios = []
    for step in range(steps):
        ids, labels = ids_and_labels(step % 4)
        opt.zero_grad()
        loss_of(model(input_ids=ids).logits, labels).backward()
        before = logits_of(model, ids)
        opt.step()
        p, q = before.log_softmax(-1), logits_of(model, ids).log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)[labels != -100].mean()
        ratios.append(float(kl) / BOUND)
    return max(ratios[1:]), opt


def bare() -> nn.Module:
    return tiny_llama(torch.float32, peft=False)


def peft_model(config: Any) -> nn.Module:
    from peft import get_peft_model

    return get_peft_model(bare(), config)


def ia3() -> nn.Module:
    from peft import IA3Config

    modules = ["k_proj", "v_proj", "down_proj"]
    return peft_model(IA3Config(target_modules=modules, feedforward_modules=["down_proj"]))


def loha() -> nn.Module:
    from peft import LoHaConfig

    return peft_model(LoHaConfig(r=4, target_modules=["q_proj", "v_proj"]))


def only(half: str) -> nn.Module:
    model = tiny_llama(torch.float32)
    for name, p in model.named_parameters():
        p.requires_grad_(half in name)
    return model


def bypassed() -> nn.Module:
    """Return a model whose LoRA layers use the weights directly, as fused kernels do: no hook on A or B runs."""
    model = tiny_llama(torch.float32)
    for module in model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):

            def forward(x: Tensor, *_: Any, m: Any = module, **__: Any) -> Tensor:
                a, b, s = m.lora_A["default"].weight, m.lora_B["default"].weight, m.scaling["default"]
                return m.base_layer(x) + s * F.linear(F.linear(x, a), b)

            module.forward = forward
    return model


def embeddings() -> nn.Module:
    from peft import LoraConfig

    return peft_model(LoraConfig(r=4, target_modules=["embed_tokens"]))


def and_a_head() -> nn.Module:
    from peft import LoraConfig

    return peft_model(LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))


@pytest.mark.parametrize(
    "build", [bypassed, bare, ia3, loha, lambda: only("lora_A"), lambda: only("lora_B"), embeddings, and_a_head],
    ids=["fused", "whole", "ia3", "loha", "only-a", "only-b", "embeddings", "lora-and-head"],
)  # fmt: skip
def test_a_measured_bound_for_every_kind_of_parameter(build: Callable[[], nn.Module]) -> None:
    model = build()
    worst, opt = largest_ratio(model)
    metrics = opt.metrics()
    assert metrics["trust/source"] == "measured" and metrics["trust/unbounded"] == 0
    assert worst < (
        8 if build is bare else 3
    )  # On a whole tiny model with eight rows, kappa changes by a factor of ten between steps.
    assert metrics["trust/predicted_kl"] <= BOUND * (1 + 1e-5)


@pytest.mark.parametrize("quiet", [1, 9])
def test_the_first_gradient_that_is_not_zero_counts_in_full(quiet: int) -> None:
    """After ``quiet`` zero gradients, such as those of a closed gate, Adam's second moment is ``g^2 / (quiet + 1)``."""
    late, early = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(()))
    opt = CTROptimizer(
        [late, early], curvature="gradient", calibration_interval=None, max_kl=1e-6, kl_schedule="constant"
    )
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for step in range(quiet + 1):
        opt.zero_grad()
        ((late * weight).sum() * (step == quiet) + early.sum()).backward()
        before = [p.detach().clone() for p in (late, early)]
        opt.step()
    moved = [p.detach() - b for p, b in zip((late, early), before, strict=True)]
    assert late.grad is not None and early.grad is not None
    form = sum(float((p.grad * d).square().sum()) for p, d in zip((late, early), moved, strict=True))
    assert opt.metrics()["trust/scale"] < 1 and opt.metrics()["trust/predicted_kl"] == pytest.approx(1e-6, rel=1e-4)
    assert 0.5 * form == pytest.approx(1e-6, rel=0.05)


def test_the_gradient_metric_can_be_chosen() -> None:
    worst, opt = largest_ratio(tiny_llama(torch.float32), curvature="gradient")
    assert worst < 3 and opt.metrics()["trust/source"] == "measured"


def test_layers_without_factors_count_by_their_gradients() -> None:
    """A layer that bypasses its hooks adds its gradient term to the form; the other layers add K-FAC's."""
    model = net()
    layer = model.up
    layer.forward = lambda x: (
        layer.base(x) + layer.scaling * F.linear(F.linear(x, layer.lora_A.weight), layer.lora_B.weight)
    )
    opt = CTROptimizer(trainable(model), max_kl=1e-3, calibration_interval=None, factor_interval=1)
    ids, labels = batch(0)
    loss_of(model(ids), labels).backward()
    opt.step()
    (unseen,) = (block for block in opt.blocks if block.pairs[0].layer is layer)
    assert not bool(unseen.seen.any())
    assert 0 < opt.metrics()["trust/scale"] < 1
    tokens = float((labels != -100).sum())
    halves = [(unseen.a, layer.lora_A), (unseen.b, layer.lora_B)]
    # Adam's first direction is the sign of the gradient in its basis, so v^ delta^2 is (lr g)^2.
    expected = tokens * sum(float((0.08 * m.weight.grad).square().sum()) for _, m in halves)
    steps = {stack: -0.08 * stack.tensors["exp_avg"] / stack.tensors["exp_avg"].abs() for stack, _ in halves}
    got = unseen.quadratic(steps, torch.tensor(tokens))
    assert math.isclose(float(got), expected, rel_tol=1e-4)


def test_hutchinson_without_measurements_and_a_closed_optimizer_are_bounded() -> None:
    model = tiny_llama(torch.float32)
    opt = CTROptimizer(trainable(model), curvature="hutchinson", calibration_interval=None, max_kl=1e-4)
    for step in range(4):
        ids, labels = ids_and_labels(step)
        opt.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        opt.step()
        if step == 2:
            opt.close()
        assert 0 < opt.metrics()["trust/scale"] < 1


@pytest.mark.parametrize("options", [dict(max_kl=None), dict(curvature="none")], ids=str)
def test_without_a_trust_region_the_rate_is_adamws(options: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="no trust region here"):
        opt = CTROptimizer(trainable(net()), **options)
    assert opt.param_groups[0]["lr"] == 2e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CTROptimizer(trainable(net()), lr=1e-3, **options).param_groups[0]["lr"] == 1e-3


def test_steps_that_cannot_be_measured_are_as_short_as_adamws() -> None:
    class NoLogits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net(dtype=torch.float32)

        def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"objective": loss_of(self.inner(ids), labels)}

    model = NoLogits()
    opt = CTROptimizer(trainable(model), model=model)
    before = [p.detach().clone() for p in trainable(model)]
    model(*batch(0))["objective"].backward()
    with pytest.warns(UserWarning, match="cannot measure the KL"):
        opt.step()
    furthest = max(float((p - b).abs().max()) for p, b in zip(trainable(model), before, strict=True))
    assert furthest < 2e-4 * 3 and opt.metrics()["trust/unbounded"] > 0


class Contrastive(nn.Module):
    """Model that embeds pairs of sequences, with a contrastive loss over the pairs."""

    def __init__(self, scores: bool) -> None:
        super().__init__()
        self.inner, self.scores = tiny_llama(torch.float32), scores

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        embedded = F.normalize(self.inner(input_ids=ids).logits.mean(1), dim=-1)
        left, right = embedded.chunk(2)
        similar = 10 * left @ right.mT
        loss = F.cross_entropy(similar, torch.arange(len(similar)))
        return {"loss": loss, "logits": similar} if self.scores else {"loss": loss, "embeddings": embedded}


def trained(model: nn.Module, opt: torch.optim.Optimizer, steps: int = 20) -> float:
    """Train on pairs that share their first half; return the loss of the last steps."""
    losses = []
    for step in range(steps):
        ids = ids_and_labels(step % 4)[0]
        ids[4:, :9] = ids[:4, :9]
        opt.zero_grad()
        loss = model(ids)["loss"]
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    return sum(losses[-5:]) / 5


@pytest.mark.filterwarnings("ignore:CTROptimizer cannot measure")
def test_embeddings_alone_train_as_with_adamw() -> None:
    """An assumed bound in addition to AdamW's rate made steps a hundred times shorter than AdamW's."""
    ours, theirs = Contrastive(False), Contrastive(False)
    adamw = torch.optim.AdamW(trainable(theirs), lr=2e-4, betas=(0.8, 0.999), weight_decay=0.0)
    start = [p.detach().clone() for p in trainable(ours)]
    opt = CTROptimizer(trainable(ours), model=ours, kl_schedule="lr")  # All batches have the same rows.
    reached, aim = trained(ours, opt), trained(theirs, adamw)
    assert opt.metrics()["trust/source"].startswith("assumed")
    assert reached < 1.15 * aim  # The betas differ from AdamW's.
    way = [
        torch.stack([(p - s).detach().norm() for p, s in zip(trainable(m), start, strict=True)]).norm()
        for m in (ours, theirs)
    ]
    assert 0.5 < float(way[0] / way[1]) < 2


def test_similarities_that_are_named_logits_are_measured() -> None:
    model = Contrastive(True)
    opt = CTROptimizer(trainable(model), model=model)
    trained(model, opt, 5)
    assert opt.metrics()["trust/source"] == "measured" and opt.metrics()["trust/unbounded"] == 0


def test_a_forward_that_no_hook_sees_keeps_the_whole_bound() -> None:
    """The number of loss tokens is unknown then; the bound must shrink only for a known small number."""
    model = bypassed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = CTROptimizer(trainable(model), max_kl=BOUND)
    for step in range(3):
        ids, labels = ids_and_labels(step)
        opt.zero_grad()
        loss_of(model(input_ids=ids).logits, labels).backward()
        opt.step()
        assert opt.metrics()["trust/max_kl"] == pytest.approx(BOUND / (1 + step / 25))
        opt.load_state_dict(opt.state_dict())  # A checkpoint must not change that.
