"""The command ctr-optim compress, which reads and writes files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import exact_kl, tiny_llama

from ctr_optim.cli import main
from ctr_optim.export.files import read_adapter
from ctr_optim.export.rows import batches_of, encode, read_rows
from ctr_optim.model.registry import find_pairs

peft = pytest.importorskip("peft", reason="the adapters are PEFT's")
tokenizers = pytest.importorskip("tokenizers", reason="behind the hf extra")

WORDS = [f"w{i}" for i in range(60)]


def tokenizer() -> Any:
    """Return a tokenizer of words, whose first four ids are special tokens."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    made.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base model, its tokenizer, an adapter and rows."""
    folder = tmp_path_factory.mktemp("files")
    tiny_llama(torch.float32, peft=False).save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    model = tiny_llama(torch.float32, r=8)
    with torch.no_grad():
        for pair in find_pairs(model):
            pair.B.mul_(16 * 2.0 ** -torch.arange(pair.rank, dtype=pair.B.dtype))
    model.save_pretrained(folder / "adapter")
    generator = torch.Generator().manual_seed(0)
    with open(folder / "rows.jsonl", "w") as out:
        for _ in range(24):
            words = [WORDS[i] for i in torch.randint(60, (9,), generator=generator)]
            print(json.dumps({"prompt": " ".join(words[:3]), "completion": " ".join(words[3:])}), file=out)
    return folder


def command(files: Path, out: Path, *more: str) -> list[str]:
    rows, base = str(files / "rows.jsonl"), str(files / "base")
    return ["compress", str(files / "adapter"), "--model", base, "--data", rows, "--out", str(out), *more]


@pytest.mark.parametrize("more", [[], ["--rank-uniform"], ["--multiple", "4"]], ids=str)
def test_compress(files: Path, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(command(files, out, "--tolerance", "4e-3", *more)) == 0
    said = capsys.readouterr().out
    before, after = read_adapter(files / "adapter"), read_adapter(out)
    sizes = [sum(layer.parameters for layer in saved.layers) for saved in (before, after)]
    assert f"{sizes[0]:,}" in said and f"{sizes[1]:,}" in said and sizes[1] < sizes[0]
    assert f"{(out / 'adapter_model.safetensors').stat().st_size:,}" in said
    assert "nats per token of a tolerance of 0.004" in said and f"wrote {out}" in said
    ranks = {layer.rank for layer in after.layers}
    config = json.loads((out / "adapter_config.json").read_text())
    if "--rank-uniform" in more:
        assert len(ranks) == 1 and len(after.layers) == len(before.layers)
        assert config["r"] in ranks and config["rank_pattern"] == config["alpha_pattern"] == {}
    if "--multiple" in more:
        assert ranks <= {4, 8}
    loaded = peft.PeftModel.from_pretrained(tiny_llama(torch.float32, peft=False), str(out))
    assert {pair.name: pair.rank for pair in find_pairs(loaded)} == {la.name: la.rank for la in after.layers}
    for layer, pair in zip(after.layers, find_pairs(loaded), strict=True):
        assert pair.scaling == pytest.approx(layer.scaling)


def test_the_cost_that_is_printed_is_the_cost_of_what_is_written(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(files, tmp_path / "out", "--tolerance", "4e-3")) == 0
    said = capsys.readouterr().out
    logits = []
    data = batches_of(read_rows(files / "rows.jsonl"), tokenizer(), 8, 64, torch.device("cpu"))
    for folder in (files / "adapter", tmp_path / "out"):
        model = peft.PeftModel.from_pretrained(tiny_llama(torch.float32, peft=False), str(folder)).eval()
        with torch.no_grad():
            logits.append(torch.cat([model(**b).logits[:, :-1][b["labels"][:, 1:] != -100] for b in data]))
    assert f"KL {float(exact_kl(*logits).mean()):.2g}"[:-1] in said
    assert f"on {len(logits[0]):,} tokens" in said


@pytest.mark.parametrize(
    "change, said",
    [
        (["--tolerance", "0"], "tolerance: got 0.0, expected a positive number"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--out", "{adapter}"], "is the adapter itself; write to another directory"),
        (["--model", "{other}"], "the adapter does not fit LlamaForCausalLM"),
    ],
    ids=str,
)
def test_bad_input(
    files: Path, change: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    LlamaForCausalLM(small).save_pretrained(other)
    tokenizer().save_pretrained(other)
    change = [part.format(adapter=files / "adapter", other=other) for part in change]
    assert main(command(files, tmp_path / "out", *change)) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rows() -> None:
    t = tokenizer()
    assert encode({"prompt": "w0 w1", "target": "w2"}, t, 9) == ([4, 5, 6, 2], [-100, -100, 6, 2])
    assert encode({"prompt": "w0 w1", "completion": "w2"}, t, 3) == ([5, 6, 2], [-100, 6, 2])
    assert encode({"text": "w0 w1 w2"}, t, 2) == ([4, 5], [4, 5])
    messages = [{"role": "user", "content": "w0"}, {"role": "assistant", "content": "w1"}]
    assert encode({"messages": messages}, t, 9) == ([4, 5], [-100, 5])
    with pytest.raises(ValueError, match=r"rows: got the keys \['question'\], expected"):
        encode({"question": "w0"}, t, 9)
    (batch,) = batches_of([{"text": "w0 w1"}, {"text": "w2"}], t, 4, 9, torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[6, 0], [4, 5]] and batch["labels"].tolist() == [[6, -100], [4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]


@pytest.mark.parametrize(
    "content, said", [("", "got no rows"), ("[1]\n", "line 1: got a list"), ("{\n", "line 1: not")]
)
def test_no_rows_there(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(ValueError, match=said):
        read_rows(tmp_path / "rows.jsonl")
