"""Which tokens the loss looks at: the gradient at the logits tells, or else the labels."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ctr_optim.settings import IGNORED
from ctr_optim.trust_region.logits import Logits, evenly

# classes of transformers' models whose labels stand at their own token, not at the next one's
_NOT_SHIFTED = ("ForMaskedLM", "ForTokenClassification", "ForSequenceClassification", "ForPreTraining", "ForCTC")


class Watch:
    """Hooks on a forward's logits, which read the gradient there in backward.

    Attributes:
        shape: of the logits without their last dimension.
    """

    def __init__(self, logits: Logits) -> None:
        first = logits.chunks[0]
        self.shape = first.shape[:-1] if len(logits.chunks) == 1 else logits.whole().shape[:-1]
        self.named, self.classes = logits.named, first.shape[-1]
        self._masks: dict[int, Tensor] = {}
        self._sums: list[Tensor] = []
        self._missing = len(logits.chunks)
        watch = self

        def seen(index: int, grad: Tensor | None) -> None:  # a function: a graph cannot hold a bound method
            watch._seen(index, grad)

        for index, chunk in enumerate(logits.chunks):
            if chunk.requires_grad:
                chunk.register_hook(partial(seen, index))  # type: ignore[no-untyped-call]

    def _seen(self, index: int, grad: Tensor | None) -> None:
        if grad is None:  # DistributedDataParallel(find_unused_parameters=True): the loss does not use this output
            return
        self._masks[index] = (grad != 0).any(-1)
        if not self.named:
            rows = grad.reshape(-1, grad.shape[-1])
            rows = rows[evenly(len(rows))].float()
            self._sums.append(torch.stack([rows.sum(-1).abs().sum(), rows.abs().sum()]))
            self._precision = torch.finfo(grad.dtype).eps

    @property
    def mask(self) -> Tensor | None:
        """Whether the loss has a gradient at each token; None where it has none at any of the logits."""
        masks = [self._masks[index] for index in sorted(self._masks)]
        if len(masks) != self._missing:
            return None
        return masks[0] if len(masks) == 1 else torch.cat(masks, 1)

    def feeds_softmax(self) -> bool:
        """Whether the gradient sums to zero over the classes, as a softmax's does; waits for the device.

        The sum over V entries of random signs is about 1 / sqrt(V) of the sum of their sizes.
        """
        if not self._sums:
            return False
        total, size = torch.stack(self._sums).sum(0).tolist()
        return bool(total <= max(0.1 / self.classes**0.5, self._precision) * size)


def named_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """A forward's inputs by name: its keywords, or the batch that it takes whole."""
    return {**args[0], **kwargs} if args and isinstance(args[0], dict) else kwargs


def from_labels(inputs: Mapping[str, Any], shifted: bool, shape: torch.Size | None = None) -> Tensor | None:
    """Which tokens have a label; None where the labels do not fit.

    Args:
        inputs: of the forward, by name.
        shifted: whether the logits of a token are compared with the label of the next one.
        shape: of the logits without their last dimension; None where there are none, and ``(sequences, tokens)`` is
            taken from the labels.
    """
    ready, labels = inputs.get("shift_labels"), inputs.get("labels")
    if isinstance(ready, Tensor) and ready.dim() == 2 and shape in (None, ready.shape):
        return ready != IGNORED
    if shape is not None and len(shape) == 1:  # a prediction for each sequence
        return labels != IGNORED if isinstance(labels, Tensor) and labels.shape == shape else None
    if not isinstance(labels, Tensor) or labels.dim() != 2 or shape not in (None, labels.shape):
        return None
    return nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1)) if shifted else labels != IGNORED


def shifts_labels(module: nn.Module) -> bool:
    """Whether a model compares the logits of a token with the label of the next one, as causal language models do."""
    for inner in module.modules():
        config, name = getattr(inner, "config", None), type(inner).__name__
        if config is not None and ("For" in name or "LMHead" in name):
            return not getattr(config, "is_encoder_decoder", False) and not any(end in name for end in _NOT_SHIFTED)
    return True
