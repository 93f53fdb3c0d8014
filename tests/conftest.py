"""Settings and fixtures of the whole test suite."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from support import net, optimizer, train

from ctr_optim import RankScheduler
from ctr_optim.report.log import EventLog
from ctr_optim.trust_region import kept

settings.register_profile(
    "suite", deadline=None, derandomize=True, max_examples=25, suppress_health_check=list(HealthCheck)
)
settings.load_profile("suite")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seed torch, so that every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def a_token_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a slice with a single loss token be measured without enlarging it, because tiny batches hold few tokens."""
    monkeypatch.setattr(kept, "LEAST_TOKENS", 1)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return the directory of a run of twelve steps with rank events, logged every third step."""
    model = net()
    scheduler = RankScheduler(interval=4, hysteresis=0.0, absent="sketch", window=2, sketch_rank=3)
    opt = optimizer(model, lr=0.05, max_kl=1e-3, rank_scheduler=scheduler, calibration_interval=4)
    log = EventLog(opt, tmp_path / "run")
    for step in range(12):
        train(model, opt, 1, step)
        if step % 3 == 2:
            log.log(loss=1.0)
    return tmp_path / "run"
