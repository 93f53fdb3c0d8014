"""Which outputs are logits, and how the probe finds the loss tokens."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import needs_gloo, spawn
from support import batch, exact_kl, loss_of, net, optimizer, plain_bound, same, snapshot, tiny_llama, trainable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ctr_optim.trust_region.logits import kl_divergence
from ctr_optim.trust_region.loss_tokens import from_labels, shifts_labels

OPTIONS: dict[str, Any] = dict(lr=1.0, max_kl=1e-3, calibration_interval=1)


class WithLoss(nn.Module):
    """Causal model that returns its loss, as those of transformers do, and its logits in one of several forms."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = net(), kind

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(input_ids)
        given = logits.detach() if self.kind == "detached" else logits.clone() if self.kind == "copied" else logits
        if labels is None:
            return {"logits": given}
        return {"loss": loss_of(logits[:, :-1], labels[:, 1:]), "logits": given}


def measured_kl(model: nn.Module, ids: Tensor, labels: Tensor, step: Any) -> float:
    """Return the KL per loss token of the change that ``step`` makes."""
    counts = labels[:, 1:] != -100
    with torch.no_grad():
        before = model(ids)["logits"][:, :-1][counts]
        step()
        return float(exact_kl(before, model(ids)["logits"][:, :-1][counts]).mean())


@pytest.mark.parametrize("kind", ["attached", "copied", "detached"])
def test_logits_without_a_gradient_are_masked_by_labels(kind: str) -> None:
    model, (ids, labels) = WithLoss(kind), batch(n=8, ignored=4)
    opt = optimizer(model, **OPTIONS)
    model(ids, labels=labels)["loss"].backward()
    found = measured_kl(model, ids, labels, opt.step)
    assert opt.metrics()["trust/source"] == "measured"
    assert found == pytest.approx(1e-3, rel=0.1)


@pytest.mark.usefixtures("a_token_is_enough")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_a_checkpoint_that_recomputes_a_pass_changes_nothing(whole: bool, reentrant: bool) -> None:
    """Checkpointing recomputes modules in the backward pass, and may stop before the end of a module."""
    runs = []
    for checkpointed in (False, True):
        if whole:
            model: Any = net()
            dummy = torch.zeros((), dtype=torch.float64, requires_grad=True)
            kept = partial(checkpoint, lambda x, y, m=model: m(x) + y, use_reentrant=reentrant)
            run = (lambda x, kept=kept, y=dummy: kept(x, y)) if checkpointed else model
        else:  # The only layer with LoRA contains all trained parameters, and each layer is checkpointed.
            model = tiny_llama(target_modules=["q_proj", "v_proj"], layers_to_transform=[0]).train()
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                model.enable_input_require_grads()
            run = lambda x, m=model: m(input_ids=x).logits  # noqa: E731
        opt = optimizer(model, max_kl=1e-3, calibration_interval=1)
        for step in range(3):
            ids, labels = batch(step)
            loss_of(run(ids), labels).backward()
            opt.step()
            opt.zero_grad()
        assert opt.metrics()["trust/source"] == "measured"
        runs.append((snapshot(model), opt._trust.loss_scale._now))
    (plain, scale), (other, same_scale) = runs
    torch.testing.assert_close(same_scale, scale)
    for name, value in plain.items():
        torch.testing.assert_close(other[name], value)


def test_without_gradient_and_labels_nothing_is_measured() -> None:
    model, (ids, labels) = WithLoss("detached"), batch()
    opt = optimizer(model, **OPTIONS)
    model(ids)
    n = model.net
    loss_of(n.head(n.down(n.up(n.embed(ids)).tanh()).tanh()), labels).backward()
    opt.step()
    assert "no gradient at the model's logits" in opt.metrics()["trust/source"]


def _ddp(rank: int, folder: Path, first: str, kind: str) -> Any:
    """Train in one process; ``first`` names the object that is built first."""
    model = WithLoss(kind)
    if first == "optimizer":
        opt = plain_bound(trainable(model), **OPTIONS)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    if first == "model":
        opt = plain_bound(trainable(wrapped), **OPTIONS)
    kls = []
    for step in range(4):
        opt.zero_grad()
        ids, labels = batch(10 * step + rank, n=8, ignored=4)
        wrapped(ids, labels=labels)["loss"].backward()
        kls.append(measured_kl(model, ids, labels, opt.step))
    return snapshot(model), kls, opt.metrics()["trust/source"]


@needs_gloo
@pytest.mark.parametrize("kind", ["attached", "detached"])
@pytest.mark.parametrize("first", ["model", "optimizer"])
def test_ddp_that_looks_for_unused_parameters(tmp_path: Path, first: str, kind: str) -> None:
    (one, kls, source), (two, others, _) = spawn(_ddp, tmp_path, first, kind)
    assert source == "measured" and same(one, two)
    for a, b in zip(kls, others, strict=True):
        assert 0.3e-3 < (a + b) / 2 < 3e-3
    assert (kls[0] + others[0]) / 2 == pytest.approx(1e-3, rel=0.1)


def _one_fails(rank: int, folder: Path) -> Any:
    """Run a measurement whose re-run fails in only one process."""

    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, ids: Tensor) -> Tensor:
            if rank == 1 and not torch.is_grad_enabled():
                raise RuntimeError("not here")
            return self.net(ids)

    wrapped = DistributedDataParallel(Once())
    opt = plain_bound(trainable(wrapped), **OPTIONS)
    for step in range(5):
        opt.zero_grad()
        ids, labels = batch(10 * step + rank)
        loss_of(wrapped(ids), labels).backward()
        opt.step()
    return snapshot(wrapped), opt.metrics()["trust/source"], opt.metrics()["trust/coupling"]


@needs_gloo
def test_a_failure_in_one_process_is_everyones(tmp_path: Path) -> None:
    (one, first, kappa), (two, second, other) = spawn(_one_fails, tmp_path)
    assert same(one, two) and kappa == other
    assert first.startswith("assumed (") and "not here" in second


# -- outputs that are not logits --------------------------------------------------------------------------------------


def train(model: nn.Module, loss: Any) -> str:
    opt = optimizer(model, **OPTIONS)
    for step in range(2):
        opt.zero_grad()
        loss(model, batch(step, n=8)[0]).backward()
        opt.step()
    return str(opt.metrics()["trust/source"])


def test_embeddings_of_a_contrastive_loss_are_no_logits() -> None:
    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        z = F.normalize(model(ids).mean(1), dim=-1)
        return F.cross_entropy(z[:4] @ z[4:].T / 0.1, torch.arange(4))

    assert "takes no softmax" in train(net(), loss)


def test_a_diffusion_models_tuple_is_no_logits() -> None:
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, ids: Tensor) -> tuple[Tensor]:
            return (self.net(ids).unsqueeze(1),)

    assert "takes no softmax" in train(Noise(), lambda model, ids: (model(ids)[0] - 1).square().mean())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_feeds_a_softmax_is_logits_whatever_it_is_called(dtype: torch.dtype) -> None:
    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        return F.cross_entropy(model(ids).flatten(0, 1).to(dtype).float(), ids.flatten(), label_smoothing=0.1)

    assert train(net(dtype=dtype), loss) == "measured"


def test_log_probabilities_are_logits() -> None:
    class Normal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, ids: Tensor) -> Tensor:
            return self.net(ids).log_softmax(-1)

    assert train(Normal(), lambda m, ids: F.nll_loss(m(ids).flatten(0, 1), ids.flatten())) == "measured"


def test_outputs_that_hardly_move_are_not_believed() -> None:
    class Constant(nn.Module):
        """Model whose output named logits is not used by the loss."""

        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(ids)
            return {"loss": loss_of(logits, labels), "logits": 1e-6 * logits.detach()}

    opt = optimizer(model := Constant(), **OPTIONS)
    ids, labels = batch(n=8)
    model(ids, labels=labels)["loss"].backward()
    opt.step()
    assert "hardly move" in opt.metrics()["trust/source"]


def test_a_masked_vocabulary_adds_nothing() -> None:
    p, q = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    masked_p, masked_q = (F.pad(t, (0, 2), value=-torch.inf) for t in (p, q))
    total, count = kl_divergence(masked_p, masked_q, torch.ones(6, dtype=torch.bool))
    torch.testing.assert_close(total, exact_kl(p, q).sum())
    assert float(count) == 6

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, ids: Tensor) -> Tensor:
            return F.pad(self.net(ids), (0, 3), value=-torch.inf)

    model, (ids, labels) = Masked(), batch()
    opt = optimizer(model, **OPTIONS)
    loss_of(model(ids), labels).backward()
    opt.step()
    assert opt.metrics()["trust/source"] == "measured"


# -- labels -----------------------------------------------------------------------------------------------------------


def test_labels_tell_as_the_models_loss_does() -> None:
    labels = torch.tensor([[-100, 3, 4, -100], [1, -100, 2, 5]])
    shifted = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0]]).bool()
    assert torch.equal(from_labels({"labels": labels}, True), shifted)
    assert torch.equal(from_labels({"labels": labels}, False, labels.shape), labels != -100)
    assert torch.equal(from_labels({"shift_labels": labels}, True, labels.shape), labels != -100)
    assert from_labels({"labels": labels}, True, torch.Size([2, 9])) is None
    assert torch.equal(
        from_labels({"labels": torch.tensor([1, -100])}, True, torch.Size([2])), torch.tensor([True, False])
    )


def test_which_models_shift_their_labels() -> None:
    def model(name: str, **config: Any) -> nn.Module:
        module = type(name, (nn.Module,), {})()
        module.config = SimpleNamespace(**config)
        return module

    assert shifts_labels(tiny_llama()) and shifts_labels(net())
    assert not shifts_labels(model("T5ForConditionalGeneration", is_encoder_decoder=True))
    assert shifts_labels(model("LlavaForConditionalGeneration", is_encoder_decoder=False))
    assert not shifts_labels(model("BertForMaskedLM")) and not shifts_labels(model("XForTokenClassification"))
