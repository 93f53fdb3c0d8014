"""Forward passes over retained text that do not change the user's model."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ctr_optim.model.pair import LoRAPair
from ctr_optim.runtime import distributed

Batch = dict[str, Any]

IDS = "input_ids"  # the key of token ids in a batch

_FOR_THE_LOSS = ("labels", "label", "label_ids", "shift_labels", "num_items_in_batch")


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run a block in evaluation mode, without gradients, caches and compiled code.

    Afterwards, the modules' modes, all random state and ``use_cache`` are restored. The mode is set module by module,
    because ``model.eval()`` of some libraries merges the adapter into the base model.
    """
    modes = [(module, module.training) for module in model.modules()]
    caching = [config for config in _configs(model) if getattr(config, "use_cache", None)]
    wrapped = distributed.fsdp_modules([model])
    distributed.reshard(wrapped)  # an earlier forward pass may have left outdated gathered copies
    try:
        for module, _ in modes:
            module.training = False
        for config in caching:
            config.use_cache = False
        with ExitStack() as stack:
            stack.enter_context(_random_state())
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        distributed.reshard(wrapped)
        for config in caching:
            config.use_cache = True
        for module, training in modes:
            module.training = training


@contextmanager
def adapter_off(model: nn.Module, pairs: Sequence[LoRAPair]) -> Iterator[None]:
    """Run a block with the base model: set every B to zero, and restore the exact values afterwards."""
    wrapped = distributed.fsdp_modules([model])
    distributed.reshard(wrapped)
    weights = [distributed.local(pair.B.detach()) for pair in pairs]
    saved = [weight.clone() for weight in weights]
    try:
        if weights:
            torch._foreach_zero_(weights)
        yield
    finally:
        distributed.reshard(wrapped)
        if weights:
            torch._foreach_copy_(weights, saved)


def batches_of(batches: Any, model: nn.Module, name: str) -> list[Batch | Tensor]:
    """Return retained text as batches for :func:`run`, on the model's device and without labels.

    Args:
        batches: an iterable of dicts for ``model(**batch)``, or of tensors of token ids ``(B, T)`` or ``(T,)``.
        model: the model that will read the batches.
        name: the name of the argument, for error messages.

    Raises:
        TypeError: if a batch is of another type.
        ValueError: if there are no batches, or token ids outside the model's vocabulary.
    """
    if isinstance(batches, (str, bytes, Mapping)):
        raise TypeError(
            f"{name}: got a {type(batches).__name__}; expected an iterable of batches: dicts for model(**batch), or "
            "tensors of token ids (tokenise the text with the model's tokenizer, and pass a list)"
        )
    if isinstance(batches, Tensor) and batches.dim() < 3:
        batches = [batches]
    device, vocabulary = device_of(model), vocabulary_of(model)
    found = [_batch(batch, device, f"{name}: batch {index}") for index, batch in enumerate(batches)]
    if not found:
        raise ValueError(
            f"{name}: got no batches; expected about 16000 tokens of text whose predictions should not change"
        )
    for index, batch in enumerate(found):
        ids = batch if isinstance(batch, Tensor) else batch.get(IDS)
        if isinstance(ids, Tensor) and ids.numel() == 0:
            raise ValueError(f"{name}: batch {index} is empty (shape {tuple(ids.shape)}); remove empty texts")
        if not isinstance(ids, Tensor) or vocabulary is None or ids.is_floating_point():
            continue
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"{name}: batch {index} holds token id {high if high >= vocabulary else low}, but the model's "
                f"vocabulary has ids 0 to {vocabulary - 1}; tokenise the text with this model's own tokenizer"
            )
    return found


def run(model: nn.Module, batch: Batch | Tensor) -> Any:
    """Return the model's output for one batch."""
    return model(batch) if isinstance(batch, Tensor) else model(**batch)


def mask_of(batch: Batch | Tensor) -> Tensor | None:
    """Return ``(B, T)`` whether each token is text and not padding; None if the batch has no such mask."""
    mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's inputs, that of its input embedding."""
    embedding = _embedding(model)
    weights = embedding.parameters() if embedding is not None else model.parameters()
    return next(iter(weights), torch.zeros(0)).device


def vocabulary_of(model: nn.Module) -> int | None:
    """Return the number of token ids in the model's input embedding; None if no such embedding is found."""
    size = getattr(_embedding(model), "num_embeddings", None)
    return size if isinstance(size, int) else None


def _embedding(model: nn.Module) -> nn.Module | None:
    for module in model.modules():  # wrappers of the model may not have get_input_embeddings()
        try:
            found = getattr(module, "get_input_embeddings", lambda: None)()
        except (NotImplementedError, AttributeError):
            continue
        if isinstance(found, nn.Module):
            return found
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    return tables[0] if len(tables) == 1 else None


def _configs(model: nn.Module) -> list[Any]:
    configs = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "use_cache")}
    return list(configs.values())


def _batch(batch: Any, device: torch.device, where: str) -> Batch | Tensor:
    if isinstance(batch, Tensor):
        if batch.is_floating_point() or batch.dim() not in (1, 2):
            raise TypeError(
                f"{where} is a {batch.dtype} tensor of shape {tuple(batch.shape)}; expected token ids of shape (B, T), "
                "or a dict for model(**batch)"
            )
        return (batch if batch.dim() == 2 else batch.unsqueeze(0)).to(device)
    if isinstance(batch, Mapping):
        row = _row(batch)
        return {key: _value(value, device, row) for key, value in batch.items() if key not in _FOR_THE_LOSS}
    raise TypeError(
        f"{where} is a {type(batch).__name__}; expected a dict for model(**batch), or a tensor of token ids"
    )


def _row(batch: Mapping[str, Any]) -> bool:
    """Return whether a batch is one row of a dataset, whose token ids have no batch dimension."""
    ids = batch.get(IDS)
    return ids.dim() == 1 if isinstance(ids, Tensor) else isinstance(ids, list) and all(isinstance(i, int) for i in ids)


def _value(value: Any, device: torch.device, row: bool) -> Any:
    if row and isinstance(value, list):
        value = torch.tensor(value, device="cpu")
    if not isinstance(value, Tensor):
        return value
    return (value.unsqueeze(0) if row and value.dim() else value).to(device)


@contextmanager
def _random_state() -> Iterator[None]:
    """Restore the random state of torch, Python and, if it is imported, NumPy after the block."""
    python, numpy = random.getstate(), sys.modules.get("numpy")
    state = None if numpy is None else numpy.random.get_state()
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if initialized else []):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(state)
