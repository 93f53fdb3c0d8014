"""For inputs that cannot be cut and re-runs that fail, the measurement falls back and never raises an error."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support import batch, exact_kl, loss_of, net, optimizer, weights_of
from torch import Tensor, nn

from ctr_optim.runtime.displacement import Moved
from ctr_optim.trust_region import kept, probe
from ctr_optim.trust_region.rerun import sequences_in, take

OPTIONS: dict[str, Any] = dict(lr=1.0, max_kl=1e-3, calibration_interval=1)


class Images(nn.Module):
    """Model that adds images to some sequences; one tensor contains the images of all rows with ``has_image``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, ids: Tensor, has_image: Tensor, images: Tensor, sizes: list[int] | None = None) -> Tensor:
        if int(has_image.sum()) != len(images):
            raise ValueError(f"{int(has_image.sum())} image tokens, {len(images)} images")
        shift = torch.zeros(len(ids), dtype=torch.long).masked_scatter(has_image, images)
        return self.net((ids + shift[:, None]) % 11)


def kl_of(model: nn.Module, before: Tensor, inputs: dict[str, Any], labels: Tensor) -> float:
    with torch.no_grad():
        return float(exact_kl(before, model(**inputs)[labels != -100]).mean())


@pytest.mark.parametrize("kind", ["images of two rows", "as many images as rows", "a list"])
def test_inputs_that_cannot_be_cut_are_run_whole(kind: str) -> None:
    model, (ids, labels) = Images(), batch()
    has = torch.tensor([False, True, True, False] if kind == "images of two rows" else [True] * 4)
    inputs: dict[str, Any] = {"ids": ids, "has_image": has, "images": torch.arange(int(has.sum()))}
    if kind == "a list":
        inputs["sizes"] = [1, 2, 3, 4]
    opt = optimizer(model, **OPTIONS)
    with torch.no_grad():
        before = model(**inputs)[labels != -100]
    loss_of(model(**inputs), labels).backward()
    opt.step()
    assert opt.metrics()["trust/source"] == "measured"
    if kind != "as many images as rows":  # Such inputs can be cut.
        assert kl_of(model, before, inputs, labels) == pytest.approx(1e-3, rel=0.2)


def test_a_cut_that_fails_gives_way_to_the_whole_batch_in_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model rejects a slice although all tensors have the same first dimension."""
    monkeypatch.setattr(kept, "LEAST_TOKENS", 1)

    class Four(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, ids: Tensor) -> Tensor:
            return self.net(ids.view(2, 2, -1)).flatten(0, 1)

    model, (ids, labels) = Four(), batch()
    opt = optimizer(model, **OPTIONS)
    with torch.no_grad():
        before = model(ids)[labels != -100]
    loss_of(model(ids), labels).backward()
    opt.step()
    assert opt.metrics()["trust/source"] == "measured"
    assert kl_of(model, before, {"ids": ids}, labels) == pytest.approx(1e-3, rel=0.2)


def test_a_slice_that_says_something_else_gives_way_to_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """If rows affect each other, a slice runs without an error but gives other logits than the batch."""
    monkeypatch.setattr(kept, "LEAST_TOKENS", 1)

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, ids: Tensor) -> Tensor:
            logits = self.net(ids)
            return 3 * (logits - logits.mean(0))  # Zero for a single row.

    model, (ids, labels) = Mixed(), batch()
    opt = optimizer(model, **OPTIONS)
    with torch.no_grad():
        before = model(ids)[labels != -100]
    loss_of(model(ids), labels).backward()
    opt.step()
    assert kl_of(model, before, {"ids": ids}, labels) == pytest.approx(1e-3, rel=0.2)


def test_what_can_be_cut() -> None:
    ids, T = torch.zeros(3, 5, dtype=torch.long), torch.zeros
    assert sequences_in((ids,), {"attention_mask": ids, "use_cache": False}) == 3
    assert sequences_in((), {"ids": ids, "rotary": (T(3, 5), T(3, 5))}) == 3
    for other in (
        {"pixel_values": T(7, 4)}, {"position_ids": T(3, 3, 5)}, {"position_ids": T(1, 5)}, {"cu_seqlens": T(4)},
        {"lengths": [5, 4, 3]}, {"images": [T(3, 2), T(3, 2)], "more": [T(3), T(3), T(3)]}, {"edge_index": T(2, 9)},
    ):  # fmt: skip
        assert sequences_in((ids,), other) is None, other


@pytest.mark.parametrize("error", [RuntimeError, IndexError, torch.OutOfMemoryError, AssertionError])
def test_no_re_run_raises_and_three_failures_end_it(error: type[Exception]) -> None:
    """The step is applied to every parameter, and one warning gives the reason of the failed measurement."""

    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.tried = net(), 0

        def forward(self, ids: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                self.tried += 1
                raise error("only in training")
            return self.net(ids)

    model = Once()
    opt = optimizer(model, **OPTIONS)
    tried = []
    for step in range(6):
        opt.zero_grad()
        loss_of(model(batch(step)[0]), batch(step)[1]).backward()
        before = weights_of(opt)
        if step == 2:
            with pytest.warns(UserWarning, match="could not run the model again"):
                opt.step()
        else:
            opt.step()
        after = weights_of(opt)
        assert all(not torch.equal(before[name][1], after[name][1]) for name in before)
        source = opt.metrics()["trust/source"]
        assert source.startswith("assumed (")
        assert ("memory" if error is torch.OutOfMemoryError else "only in training") in source
        assert opt.metrics()["trust/predicted_kl"] == pytest.approx(1e-3)
        tried.append(model.tried)
    assert tried[2] == tried[-1] and tried[0] < tried[2]


def exhausted(*_: Any) -> None:
    raise torch.OutOfMemoryError("the MEMORY is full")


@pytest.mark.parametrize("part", ["Moved", "kl_divergence"])
def test_a_measurement_without_memory_is_left_out(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running out of memory for displaced parameters or logits raises no error in the user's loop."""
    model = net()
    opt = optimizer(model, **OPTIONS)

    def step(index: int) -> dict[str, Any]:
        opt.zero_grad()
        loss_of(model(batch(index)[0]), batch(index)[1]).backward()
        before = weights_of(opt)
        opt.step()
        after = weights_of(opt)
        assert all(not torch.equal(before[name][1], after[name][1]) for name in before)
        return opt.metrics()

    working = getattr(probe, part)
    monkeypatch.setattr(probe, part, exhausted)
    assert "memory" in step(0)["trust/source"]
    monkeypatch.setattr(probe, part, working)
    known = step(1)
    assert known["trust/source"] == "measured"
    monkeypatch.setattr(probe, part, exhausted)
    step(2), step(3)
    with pytest.warns(UserWarning, match="memory"):
        step(4)
    assert step(5)["trust/predicted_kl"] == pytest.approx(1e-3)


def test_parameters_that_cannot_be_displaced_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [torch.ones(3), torch.ones(2)]
    tries = iter([None, exhausted])
    multiply = torch._foreach_mul

    def second_fails(*given: Any) -> Any:
        return (next(tries) or multiply)(*given)

    monkeypatch.setattr(torch, "_foreach_mul", second_fails)
    with pytest.raises(torch.OutOfMemoryError):
        Moved([([p], [torch.ones_like(p)]) for p in params])
    assert all(bool((p == 1).all()) for p in params)


@pytest.mark.parametrize("kind", ["numpy", "python"])
def test_both_passes_see_the_same_chance_and_leave_it_alone(kind: str) -> None:
    """SpecAugment draws its masks from NumPy's generator."""

    class Augmented(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, ids: Tensor) -> Tensor:
            column = int(np.random.randint(ids.shape[1])) if kind == "numpy" else random.randrange(ids.shape[1])
            drawn = torch.zeros(ids.shape[1], dtype=torch.bool)
            drawn[column] = True
            return self.net(torch.where(drawn, 0, ids))

    streams = []
    for interval in (1, None):
        np.random.seed(0)
        random.seed(0)
        model, (ids, labels) = Augmented(), batch(n=8)
        opt = optimizer(model, **{**OPTIONS, "calibration_interval": interval})
        for _ in range(3):
            opt.zero_grad()
            loss_of(model(ids), labels).backward()
            opt.step()
        streams.append((np.random.random(), random.random()))
        if interval:
            assert opt.metrics()["trust/source"] == "measured"
            # Two passes with different random numbers give 1e4 and more.
            assert 0.1 < opt.metrics()["trust/coupling"] < 100
    assert streams[0] == streams[1]


def test_nothing_is_kept_after_a_measurement() -> None:
    model = net()
    opt = optimizer(model, **{**OPTIONS, "calibration_interval": 50})
    probe = opt._trust.coupling.prober
    for step in range(4):
        opt.zero_grad()
        loss_of(model(batch(step)[0]), batch(step)[1]).backward()
        assert (probe._call is not None) == opt._trust.coupling.due
        opt.step()
        assert probe._call is None


def test_a_few_loss_tokens_ask_for_more_of_the_batch() -> None:
    """Each row has one loss token, so a quarter of the batch has only four."""
    model, (ids, labels) = net(), batch(n=16, length=6, ignored=5)
    opt = optimizer(model, **OPTIONS)
    probe = opt._trust.coupling.prober
    loss_of(model(ids), labels).backward()
    assert probe.ready and int(probe.loss_tokens(ids).sum()) == 16
    opt.step()
    assert opt.metrics()["trust/source"] == "measured"


def test_a_batch_changed_in_place_is_not_enlarged() -> None:
    model, (ids, labels) = net(), batch(n=16, ignored=5)
    opt = optimizer(model, **OPTIONS)
    probe = opt._trust.coupling.prober
    loss_of(model(ids), labels).backward()
    ids.zero_()
    assert probe.ready and int(probe.loss_tokens(ids).sum()) == 4
    opt.step()
    assert opt.metrics()["trust/source"] == "measured"


def test_of_few_loss_tokens_among_many_none_is_missed() -> None:
    """Evenly spaced tokens would miss a single target at the end of long rows."""
    model, (ids, labels) = net(), batch(n=2, length=1500, ignored=1499)
    opt = optimizer(model, **OPTIONS, max_tokens=None)
    loss_of(model(ids), labels).backward()
    opt.step()
    assert opt.metrics()["trust/source"] == "measured"


class Bounds(NamedTuple):
    """Of packed sequences, as torchtitan passes them."""

    starts: Tensor
    longest: int


def test_masks_of_flexattention_and_named_tuples_can_be_run_twice() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    ids = torch.zeros(3, 8, dtype=torch.long)
    mask = create_block_mask(lambda b, h, q, k: q >= k, 3, None, 8, 8, device="cpu")
    assert sequences_in((ids,), {"attention_masks": mask}) is None  # a cut would leave the mask as it is
    assert take(mask, None) is mask
    bounds = Bounds(torch.tensor([0, 4, 24]), 20)
    assert sequences_in((ids,), {"bounds": bounds}) is None
    copied = take(bounds, None)
    assert type(copied) is Bounds and copied.starts is not bounds.starts
    assert torch.equal(copied.starts, bounds.starts) and copied.longest == 20


class Headless(nn.Module):
    """torchtitan's decoder: a loss in chunks takes the last layer out of the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.lm_head, self._skip_lm_head = net(), nn.Linear(11, 23, bias=False).double(), False
        self.lm_head.weight.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.net(ids)
        return hidden if self._skip_lm_head else self.lm_head(hidden)


def test_a_forward_that_leaves_out_the_last_layer_is_run_again_with_it() -> None:
    losses, kls = [], []
    for chunks in (1, 4):
        torch.manual_seed(0)
        model = Headless()
        opt = optimizer(model, **OPTIONS)
        ids, labels = batch(0, n=8, length=16)
        model._skip_lm_head = chunks > 1
        found = model(ids)
        if chunks > 1:  # ChunkedLossWrapper: each chunk's backward ends at the forward's output
            leaf = found.detach().requires_grad_()
            for part, wanted in zip(leaf.chunk(chunks, 1), labels.chunk(chunks, 1), strict=True):
                nn.functional.cross_entropy(model.lm_head(part).mT, wanted, reduction="sum").div(128).backward()
            found.backward(leaf.grad)
        else:
            nn.functional.cross_entropy(found.mT, labels, reduction="sum").div(128).backward()
        opt.step()
        said = opt.metrics()
        assert said["trust/source"] == "measured" and said["trust/unbounded"] == 0
        assert model._skip_lm_head is (chunks > 1)
        losses.append(said["trust/coupling"])
        kls.append(said["trust/predicted_kl"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and kls[0] == pytest.approx(kls[1], rel=1e-4)
