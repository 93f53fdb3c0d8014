"""Retained text without data: samples from the base model itself, or random tokens."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ctr_optim.model.registry import find_pairs
from ctr_optim.retention.passes import adapter_off, device_of, untouched, vocabulary_of
from ctr_optim.retention.progress import progress
from ctr_optim.runtime import distributed

COUNT, LENGTH = 32, 160  # number of sequences, and tokens per sequence
_TOGETHER = 16  # sequences per batch


def own_samples(
    model: nn.Module, count: int = COUNT, length: int = LENGTH, temperature: float = 1.0, seed: int = 0
) -> list[Tensor]:
    """Sample text from the base model, with the adapter switched off.

    Every sequence starts with the ``bos`` token (or else ``eos``, or else id 0) and has ``length`` tokens. After an
    end-of-text token, the sequence continues with further text. The model's modes and weights and all random state are
    restored. Each of several processes draws its own share, with its own seed.

    Args:
        model: a causal language model that maps token ids to logits, with or without ``generate``.
        count: number of sequences, over all processes.
        length: number of tokens per sequence.
        temperature: sampling temperature.
        seed: seed of the random generator.

    Returns:
        batches of token ids ``(B, length)``, on the model's device.

    Raises:
        ValueError: if ``count``, ``length`` or ``temperature`` is out of range, or the model returns no logits.
    """
    if count < 1 or length < 2 or not temperature > 0:
        raise ValueError(
            f"own_samples: got count={count}, length={length}, temperature={temperature}; expected at least 1 sequence "
            "of at least 2 tokens, and a temperature above 0"
        )
    share, device = -(-count // distributed.world_size()), device_of(model)
    sizes = [min(_TOGETHER, share - done) for done in range(0, share, _TOGETHER)]
    start, generating = _start(model), _generating(model)
    batches = []
    with untouched(model), adapter_off(model, find_pairs(model)):
        torch.manual_seed(seed * distributed.world_size() + distributed.rank())
        for index in progress(len(sizes), "drawing the model's own text"):
            ids = torch.full((sizes[index], 1), start, dtype=torch.long, device=device)
            if generating is None:
                batches.append(_draw(model, ids, length, temperature))
            else:
                batches.append(_generate(generating, ids, length, temperature))
    return batches


def random_tokens(model: nn.Module, count: int = COUNT, length: int = LENGTH, seed: int = 0) -> list[Tensor]:
    """Draw token ids uniformly from the vocabulary, for models that cannot generate text; text protects better.

    Args:
        model: the model.
        count: number of sequences, in every process.
        length: number of tokens per sequence.
        seed: seed of the random generator.

    Returns:
        batches of token ids ``(B, length)``, on the model's device.

    Raises:
        ValueError: if the model has no input embedding, so the size of its vocabulary is unknown.
    """
    vocabulary = vocabulary_of(model)
    if vocabulary is None:
        raise ValueError(
            "random_tokens: the size of the vocabulary is unknown, since no input embedding was found; pass text"
        )
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (count, length), generator=generator, device="cpu")
    return list(torch.split(ids.to(device_of(model)), _TOGETHER))


def _start(model: nn.Module) -> int:
    """Return the ``bos`` token, or else the ``eos`` token, or else 0."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(config, name, None)
            token = token[0] if isinstance(token, (list, tuple)) and token else token
            if isinstance(token, int) and 0 <= token < (vocabulary_of(model) or token + 1):
                return token
    return 0


def _generating(model: nn.Module) -> Any:
    """Return the module with transformers' ``generate``; None if there is none, or under FSDP2.

    ``generate`` does not call the outermost module's forward, in which FSDP2 gathers the weights.
    """
    library = sys.modules.get("transformers")
    if library is None or distributed.fsdp_modules([model]):
        return None
    return next((module for module in model.modules() if isinstance(module, library.GenerationMixin)), None)


def _generate(model: Any, ids: Tensor, length: int, temperature: float) -> Tensor:
    """Return sequences ``(B, length)`` from the model's ``generate``, with our own generation config.

    The config has no ``eos`` token, so every sequence has the full length.
    """
    config = type(model.generation_config)(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=temperature,
        use_cache=True,
        max_new_tokens=length - ids.shape[1],
        eos_token_id=None,
        pad_token_id=int(ids[0, 0]),
    )
    before, model.generation_config = model.generation_config, config  # generate() replaces None by values from there
    try:
        drawn = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    finally:
        model.generation_config = before
    sequences: Tensor = getattr(drawn, "sequences", drawn)
    return sequences


def _draw(model: nn.Module, ids: Tensor, length: int, temperature: float) -> Tensor:
    """Return sequences ``(B, length)``; each new token takes a forward pass over the whole sequence so far."""
    while ids.shape[1] < length:
        output = model(ids)
        output = output[-1] if isinstance(output, list) else output  # torchtune splits logits into chunks of tokens
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[0] != len(ids):
            raise ValueError(
                "own_samples: the model returns no logits (B, T, V) for token ids (B, T), so it cannot generate text; "
                "pass batches of text as retain"
            )
        chances = torch.softmax(logits[:, -1].float() / temperature, -1)
        ids = torch.cat([ids, torch.multinomial(chances, 1)], 1)
    return ids
