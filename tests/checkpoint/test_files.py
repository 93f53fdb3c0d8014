"""Checkpoint files: written completely or not at all if interrupted, and read without running their code."""

from __future__ import annotations

import os
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    Net,
    net,
    optimizer,
    same,
    snapshot,
    train,
)

from ctr_optim import CTROptimizer, load_checkpoint, save_checkpoint

RANKS: dict[str, Any] = dict(interval=4, window=2, hysteresis=0.0, absent="sketch")


def run_and_save(path: Path, steps: int) -> tuple[Net, CTROptimizer]:
    model = net()
    opt = optimizer(model, rank_scheduler=RANKS, max_kl=1e-3)
    train(model, opt, steps)
    save_checkpoint(path, {"model": model.state_dict(), "optimizer": opt.state_dict(), "step": steps})
    return model, opt


def resumed(path: Path) -> tuple[Net, CTROptimizer, int]:
    saved = load_checkpoint(path)
    model = net(seed=9)
    opt = optimizer(model, rank_scheduler=RANKS, max_kl=1e-3)
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["optimizer"])
    return model, opt, saved["step"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process: needs os.fork")
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_kill_9_in_the_middle_of_a_write(tmp_path: Path, share: float) -> None:
    """If a process is killed after it wrote ``share`` of a new file, training resumes from the complete old file."""
    path = tmp_path / "last.pt"
    model, opt = run_and_save(path, 5)
    train(model, opt, 2, start=5)
    pid = os.fork()
    if pid == 0:  # in the child process
        try:
            write = torch.save

            def dying(value: Any, file: Any) -> None:
                write(value, file)
                file.truncate(int(file.tell() * share))
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)

            torch.save = dying
            save_checkpoint(path, {"model": model.state_dict(), "optimizer": opt.state_dict(), "step": 7})
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # the checkpoint and the killed process's temporary file
    again, other, step = resumed(path)
    assert step == 5
    train(again, other, 7, start=5)
    train(model, opt, 5, start=7)
    assert same(snapshot(again), snapshot(model))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process: needs os.fork")
def test_kill_9_at_any_moment(tmp_path: Path) -> None:
    """If a process that saves in a loop is killed, the file is always one of its complete checkpoints."""
    path = tmp_path / "last.pt"
    for attempt in range(8):
        save_checkpoint(path, {"count": 0, "weight": torch.zeros(20_000)})
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                for count in range(1, 100_000):
                    os.write(writer, b".")
                    save_checkpoint(path, {"count": count, "weight": torch.full((20_000,), float(count))})
            finally:
                os._exit(1)
        os.close(writer)
        for _ in range(1 + attempt):
            assert os.read(reader, 1) == b"."
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        found = load_checkpoint(path)
        assert found["count"] >= attempt and (found["weight"] == found["count"]).all()


def test_a_save_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    run_and_save(path, 1)
    with pytest.raises((pickle.PicklingError, AttributeError)):  # the type depends on the Python version
        save_checkpoint(path, {"model": (lambda: None)})
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"] and resumed(path)[2] == 1
    with pytest.raises(FileNotFoundError):
        save_checkpoint(tmp_path / "nowhere" / "last.pt", {})


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "last.pt"
    run_and_save(path, 2)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"last\.pt: cannot be loaded"):
        load_checkpoint(path)


def test_a_corrupted_file_is_refused(tmp_path: Path) -> None:
    """The file's checksums reveal one changed bit in a tensor."""
    path = tmp_path / "last.pt"
    marker = torch.arange(1000.0)
    save_checkpoint(path, {"weight": marker})
    content = bytearray(path.read_bytes())
    at = content.find(marker.numpy().tobytes())
    content[at + 2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_checkpoint(path)


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "last.pt")


class Hostile:
    """An object whose unpickling would create a directory."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_a_hostile_file_runs_nothing(tmp_path: Path) -> None:
    path, trace = tmp_path / "last.pt", tmp_path / "trace"
    torch.save({"optimizer": Hostile(trace)}, path)
    with pytest.raises(ValueError, match="tensors and plain values"):
        load_checkpoint(path)
    assert not trace.exists()
