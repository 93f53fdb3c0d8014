"""GRPO (Shao et al. 2024) in a small loop: sample, reward, normalise within groups, step.

Without passes over old samples, the policy that samples is the policy that trains, the ratio is 1 and the gradient is
REINFORCE's with normalised advantages. With several passes, PPO's clipped ratio is the objective. The loss is a mean
over all completion tokens of a batch, as TRL's default is.
"""

from __future__ import annotations

import time
from copy import deepcopy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from benchmarks.real import data, measure
from benchmarks.real.train import numbers, schedule
from benchmarks.rl import arithmetic, policy
from benchmarks.rl.specs import Spec, complete
from ctr_optim import CTROptimizer

CLIP_NORM = 1.0  # of AdamW's gradients
METHODS = ("ctr", "adamw")


def advantages(rewards: Tensor, group: int) -> Tensor:
    """``(R,)`` rewards less their group's mean, over its standard deviation; 0 where a group agrees.

    Args:
        rewards: ``(R,)``, the samples of one prompt side by side.
    """
    groups = rewards.view(-1, group)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1)


def policy_loss(new: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, clip: float) -> Tensor:
    """``()`` PPO's clipped objective, negative, a mean over the tokens of ``mask``.

    Args:
        new, old: ``(R, T)`` log-probabilities of the drawn tokens, now and when they were drawn.
        advantage: ``(R,)``.
        mask: ``(R, T)`` tokens of the completions.
    """
    ratio = (new - old).exp()
    gain = torch.minimum(ratio * advantage[:, None], ratio.clamp(1 - clip, 1 + clip) * advantage[:, None])
    return -(gain * mask).sum() / mask.sum()


def kl_term(new: Tensor, base: Tensor, mask: Tensor) -> Tensor:
    """``()`` Schulman's estimate of ``KL(policy || base)`` from the drawn tokens' log-probabilities ``(R, T)``."""
    return (((base - new).exp() - (base - new) - 1) * mask).sum() / mask.sum()


def prompts(sums: list[Any], size: int, updates: int, seed: int) -> list[list[Any]]:
    """Return the prompts of every update: shuffled epochs, the same for every method."""
    generator = torch.Generator().manual_seed(1000 + seed)
    order: list[int] = []
    batches = []
    for _ in range(updates):
        while len(order) < size:
            order += torch.randperm(len(sums), generator=generator).tolist()
        chosen, order = order[:size], order[size:]
        batches.append([sums[i] for i in chosen])
    return batches


class Trial:
    """One run of GRPO."""

    def __init__(self, spec: Spec, base: Any, store: data.Store, device: torch.device) -> None:
        spec = self.spec = complete(spec)
        if spec["method"] not in METHODS:
            raise ValueError(f"method: got {spec['method']!r}, expected one of {METHODS}")
        self.store, self.device = store, device
        self.train_sums, self.test_sums = arithmetic.split(store.data, spec["evaluate"], spec["rows"], spec["seed"])
        self.sampler = policy.Sampler(store.tokenizer, spec["new_tokens"])
        torch.manual_seed(spec["seed"])
        config = LoraConfig(r=spec["rank"], lora_alpha=spec["alpha"], target_modules="all-linear")
        self.model = get_peft_model(deepcopy(base), config).to(device).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = self._optimizer()
        factor = schedule(spec["schedule"], spec["updates"] * spec["passes"])
        self.scheduler = None if factor is None else torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.measured: list[dict[str, Any]] = []

    def _optimizer(self) -> Any:
        spec = self.spec
        rate = {} if spec["lr"] is None else {"lr": spec["lr"]}
        if spec["method"] == "ctr":
            return CTROptimizer(self.model.parameters(), model=self.model, **rate, **spec["options"])
        return torch.optim.AdamW(self.trained, **rate, **{"weight_decay": 0.0, **spec["options"]})

    # -- one update ---------------------------------------------------------------------------------------------------

    def update(self, number: int, sums: list[arithmetic.Sum]) -> dict[str, float]:
        """Sample a batch, take ``passes`` steps on it; return its figures."""
        spec, began, looked = self.spec, time.time(), 0.0
        samples = self.sampler(self.model, sums, spec["group"], spec["temperature"])
        advantage = advantages(samples.rewards, spec["group"])
        base = self._base_log_probabilities(samples) if spec["beta"] else None
        old: Tensor | None = None
        for index in range(spec["passes"]):
            log_p = policy.log_probabilities(self.model, samples, spec["temperature"])
            new = policy.of_tokens(log_p, samples)
            old = new.detach() if old is None else old
            loss = policy_loss(new, old, advantage, samples.mask, spec["clip"])
            if base is not None:
                loss = loss + spec["beta"] * kl_term(new, base, samples.mask)
            loss.backward()
            if spec["method"] == "adamw":
                torch.nn.utils.clip_grad_norm_(self.trained, CLIP_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.scheduler is not None:
                self.scheduler.step()
            if spec["measure_every"] and number % spec["measure_every"] == 0:
                pause = time.time()
                self._measure(number, index, samples, log_p.detach(), advantage)
                looked += time.time() - pause
        taught = (advantage != 0).view(-1, spec["group"])[:, 0]
        return {
            "reward": float(samples.rewards.mean()),
            "taught": float(taught.double().mean()),  # share of the groups that disagree
            "tokens": int((samples.mask * (advantage != 0)[:, None]).sum()),
            "seconds": time.time() - began - looked,
        }

    @torch.no_grad()
    def _base_log_probabilities(self, samples: policy.Samples) -> Tensor:
        with measure.evaluating(self.model), self.model.disable_adapter():
            return policy.of_tokens(policy.log_probabilities(self.model, samples), samples)

    @torch.no_grad()
    def _measure(self, number: int, index: int, samples: policy.Samples, before: Tensor, advantage: Tensor) -> None:
        """Record KL(before || after) of the step that was just taken, on the samples that it was made from."""
        after = policy.log_probabilities(self.model, samples, self.spec["temperature"])
        here = samples.mask & (advantage != 0)[:, None]  # the tokens that the loss has a gradient at
        found: dict[str, Any] = {"update": number, "pass": index, "tokens": int(here.sum())}
        found["kl"] = policy.divergence(before, after, here)
        found["kl_all"] = policy.divergence(before, after, samples.mask)
        if hasattr(self.optimizer, "metrics"):
            said = self.optimizer.metrics()
            found["bound"], found["scale"] = said["trust/max_kl"], said["trust/scale"]
            found["predicted"], found["coupling"] = said["trust/predicted_kl"], said["trust/coupling"]
            found |= {key.rpartition("/")[2]: v for key, v in said.items() if key.startswith("trust/factor/")}
        self.measured.append(found)

    # -- the run ------------------------------------------------------------------------------------------------------

    def text_loss(self) -> float | None:
        """Return the loss on plain text, nats per token."""
        source = self.spec["text"]
        return measure.loss_per_token(self.model, self.store.text(source), self.device) if source else None

    def run(self) -> dict[str, Any]:
        """Train and measure; return the record of the results file without the specification."""
        spec, began = self.spec, time.time()
        looks = lambda: policy.accuracy(self.model, self.sampler, self.test_sums)  # noqa: E731
        curve, updates, before = [(0, looks())], [], self.text_loss()
        every = spec["evaluate_every"]
        for number, sums in enumerate(prompts(self.train_sums, spec["prompts"], spec["updates"], spec["seed"])):
            updates.append(self.update(number, sums))
            if number + 1 == spec["updates"] or (every and (number + 1) % every == 0):
                curve.append((number + 1, looks()))
        said = numbers(self.optimizer.metrics()) if hasattr(self.optimizer, "metrics") else {}
        seconds = sorted(each["seconds"] for each in updates)
        record = {
            "accuracy": curve[-1][1],
            "curve": curve,
            "rewards": [round(each["reward"], 4) for each in updates],
            "taught": [round(each["taught"], 4) for each in updates],
            "tokens": [each["tokens"] for each in updates],
            "measured": self.measured,
            "kl_from_base": policy.kl_from_base(self.model, self.sampler, self.test_sums, spec["temperature"]),
            "text_before": before,
            "text": self.text_loss(),
            "metrics": said,
            "seconds_per_update": seconds[len(seconds) // 2] if seconds else None,
            "seconds": round(sum(seconds), 2),
            "total_seconds": round(time.time() - began, 2),
        }
        if hasattr(self.optimizer, "close"):
            self.optimizer.close()
        return record


def train(spec: Spec, base: Any, store: data.Store, device: torch.device) -> dict[str, Any]:
    """Return the record of a run, without its specification."""
    return Trial(spec, base, store, device).run()
