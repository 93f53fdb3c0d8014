"""Compress a saved PEFT adapter, and write the result to another directory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ctr_optim.export.compact import export_compact
from ctr_optim.export.files import WEIGHTS, read_adapter
from ctr_optim.export.rows import batches_of, read_rows
from ctr_optim.model.registry import find_pairs
from ctr_optim.ranks.compress import Compression, compress


@dataclass(frozen=True)
class CompressedFiles:
    """Result of :func:`compress_files`.

    Attributes:
        done: result of the compression.
        bytes_before, bytes_after: sizes of both adapters' weight files, in bytes.
    """

    done: Compression
    bytes_before: int
    bytes_after: int


def compress_files(
    source: str | os.PathLike[str],
    model: str,
    data: str | os.PathLike[str],
    tolerance: float,
    directory: str | os.PathLike[str],
    *,
    uniform: bool = False,
    multiple: int = 1,
    rows: int = 256,
    batch: int = 8,
    max_length: int = 1024,
    device: str | None = None,
) -> CompressedFiles:
    """Cut the adapter in ``source`` with :func:`ctr_optim.compress`, and save the result in ``directory``.

    Args:
        source: directory of an adapter that PEFT saved.
        model: base model of the adapter, a directory or a name on the Hub.
        data: JSON Lines file with rows of the adapter's task (:mod:`ctr_optim.export.rows`).
        tolerance: largest cost, in nats per loss token.
        directory: directory to write.
        uniform, multiple: as in :func:`ctr_optim.compress`. With ``uniform``, every layer keeps a rank of at least 1.
        rows: largest number of rows to use.
        batch: rows in one forward pass.
        max_length: largest number of tokens in a row; longer rows are cut.
        device: device of the model (default: a GPU if there is one, else the CPU).

    Raises:
        FileNotFoundError: a file is missing.
        ModuleNotFoundError: transformers or peft is not installed.
        ValueError: ``directory`` is ``source``, a file is invalid, the adapter does not fit the model, or
            :func:`ctr_optim.compress` rejects an argument.
    """
    if Path(source).resolve() == Path(directory).resolve():
        raise ValueError(f"compress: {directory} is the adapter itself; write to another directory")
    read_adapter(source)
    examples = read_rows(data, rows)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "compress: transformers and peft are needed to load the model; run pip install 'ctr_optim[hf]'"
        ) from None
    home = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    base.to(home)
    adapted = load_adapter(base, source)
    tokenizer = AutoTokenizer.from_pretrained(model)
    batches = batches_of(examples, tokenizer, batch, max_length, home)
    done = compress(adapted, tolerance, batches, uniform=uniform, multiple=multiple, min_rank=int(uniform))
    export_compact(adapted, directory)
    before, after = ((Path(d) / WEIGHTS).stat().st_size for d in (source, directory))
    return CompressedFiles(done, before, after)


def load_adapter(base: Any, source: str | os.PathLike[str]) -> Any:
    """Return a ``PeftModel`` of ``base`` with the adapter in the directory ``source``.

    Raises:
        FileNotFoundError: an adapter file is missing.
        ValueError: the adapter does not fit the model, or a file is damaged.
    """
    from peft import PeftModel

    wanted = {layer.name for layer in read_adapter(source).layers}
    try:
        adapted = PeftModel.from_pretrained(base, str(source))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{source}: the adapter does not fit {type(base).__name__}: {error}") from None
    missing = sorted(wanted - {pair.name for pair in find_pairs(adapted)})
    if missing:
        raise ValueError(
            f"{source}: the adapter does not fit {type(base).__name__}, which lacks {len(missing)} of its "
            f"{len(wanted)} layers ({missing[0]}, ...); pass the base model that the adapter was trained on"
        )
    return adapted
