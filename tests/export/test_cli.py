"""The command line, on small real files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import llama_batch, tiny_llama

from ctr_optim.cli import main
from ctr_optim.report import read_run
from ctr_optim.report.log import read_events


@pytest.mark.parametrize("file", ["", "events.jsonl"])
def test_report(run: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run / file)]) == 0
    out = capsys.readouterr().out
    events = read_events(run)
    first, last = events[0]["ranks"], [e for e in events if e["event"] == "log"][-1]
    changes = [e["name"] for e in events if e["event"] == "rank"]
    assert changes
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    for name in first:
        share = f"{last['kl_from_base/layer'][name]:.3g}"
        expected = [name, str(first[name]), "->", str(last["ranks"][name]), str(changes.count(name)), share]
        assert lines[name] == expected
    assert lines["steps"] == ["steps", "12"]
    assert f"{last['kl_from_base']:.4g} nats" in out and "of 4 logged steps" in out


@pytest.mark.parametrize("option, name", [("--png", "ranks.png"), ("--html", "run.html")])
def test_pictures(run: Path, option: str, name: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="behind the plot extra")
    assert main(["report", str(run), option, str(run / name)]) == 0
    assert (run / name).is_file() and name in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["report", str(run), option, str(run / "not there")]) == 1
    assert "ctr_optim[plot]" in capsys.readouterr().err and not (run / "not there").exists()


def test_two_runs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="behind the plot extra")
    assert main(["report", str(run), str(run), "--html", str(run / "both.html")]) == 0
    assert capsys.readouterr().out.count("The bound acted in") == 2 and (run / "both.html").is_file()
    assert main(["report", str(run), str(run), str(run)]) == 1
    assert "got 3 runs" in capsys.readouterr().err
    assert main(["report", str(run), str(run), "--follow"]) == 1
    assert "--follow shows one run" in capsys.readouterr().err


def test_follow_shows_lines_until_interrupted(run: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        assert seconds == 0.5
        raise KeyboardInterrupt

    monkeypatch.setattr("ctr_optim.cli.time.sleep", interrupt)
    assert main(["report", str(run), "--follow", "--interval", "0.5"]) == 0
    out = capsys.readouterr().out
    assert out.count("loss 1.0000") == 4 and "The bound acted in" in out


def test_a_run_that_resumed_reads_as_one(tmp_path: Path) -> None:
    def line(event: str, step: int, **values: Any) -> str:
        return json.dumps({"event": event, "step": step, **values})

    rank = dict(name="a", old_rank=4, kept=3, utility=0.0, reason="shrink")
    lines = [
        line("start", 0, ranks={"a": 2}), line("log", 5),  # the next start at step 0 replaces this line
        line("start", 0, ranks={"a": 4}), line("log", 10), line("rank", 20, new_rank=3, **rank), line("log", 20),
        line("start", 10, ranks={"a": 4}), line("rank", 30, new_rank=2, **rank),
    ]  # fmt: skip
    (tmp_path / "events.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert read_run(tmp_path).history == {"a": [(0, 4), (30, 2)]}
    assert [e["step"] for e in read_events(tmp_path)] == [0, 10, 10, 30]


@pytest.mark.parametrize("content", [None, "", "not json\n", "{}\n", '{"event": "log", "step": 1}\n'])
def test_no_run_there(tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "events.jsonl").write_text(content, encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 1
    assert str(tmp_path / "events.jsonl") in capsys.readouterr().err


# -- adapters ---------------------------------------------------------------------------------------------------------


def adapter(folder: Path, **lora: Any) -> Any:
    """Save an adapter with several ranks and scalings, and return its model."""
    pytest.importorskip("peft", reason="the adapters are PEFT's")
    options = dict(rank_pattern={"q_proj": 2, "down_proj": 6}, alpha_pattern={"v_proj": 5})
    model = tiny_llama(dtype=torch.float32, **{**options, **lora})
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("lora", [dict(), dict(use_rslora=True)], ids=str)
def test_inspect(tmp_path: Path, lora: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    model = adapter(tmp_path, **lora)
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    for name, layer in layers.items():
        a, b, s = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        expected = [str(a.shape[0]), f"{s:.4g}", f"{float((s * b @ a).norm()):.4g}", f"{a.numel() + b.numel():,}"]
        assert lines[name.removeprefix("base_model.model.")] == expected
    assert f"{len(layers)} layers, ranks 2 to 6" in out


@pytest.mark.parametrize("lora", [dict(), dict(use_rslora=True), dict(use_dora=True)], ids=str)
def test_export_uniform(tmp_path: Path, lora: dict[str, Any]) -> None:
    from peft import PeftModel

    model = adapter(tmp_path / "in", **lora)
    assert main(["export-uniform", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 6 and not config["rank_pattern"] and not config["alpha_pattern"]
    loaded = PeftModel.from_pretrained(tiny_llama(dtype=torch.float32, peft=False), str(tmp_path / "out")).eval()
    assert {m.lora_A["default"].weight.shape[0] for m in loaded.modules() if hasattr(m, "lora_A")} == {6}
    ids = llama_batch()["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("command", [["inspect"], ["export-uniform", "{out}"]], ids=lambda c: c[0])
def test_no_adapter_there(tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    name, *rest = [part.format(out=tmp_path / "out") for part in command]
    assert main([name, str(tmp_path), *rest]) == 1
    assert "adapter_config.json" in capsys.readouterr().err
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert main([name, str(tmp_path), *rest]) == 1
    assert "'IA3', expected 'LORA'" in capsys.readouterr().err


def test_an_adapter_without_safetensors(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)  # makes the import fail
    monkeypatch.delitem(sys.modules, "safetensors.torch", raising=False)
    assert main(["inspect", str(tmp_path)]) == 1
    assert "ctr_optim[hf]" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_adapter(tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    adapter(tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:50])
    assert main(["inspect", str(tmp_path)]) == 1
    assert f"{tmp_path}: damaged" in capsys.readouterr().err


def test_an_adapter_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter(tmp_path)
    assert main(["export-uniform", str(tmp_path), str(tmp_path)]) == 1
    assert "another directory" in capsys.readouterr().err


def test_the_command_itself() -> None:
    done = subprocess.run([sys.executable, "-m", "ctr_optim.cli", "--help"], capture_output=True, text=True, check=True)
    assert "export-uniform" in done.stdout and "inspect" in done.stdout and "report" in done.stdout
