"""Find the tokens that the loss uses, from the gradient of the logits or else from the labels."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ctr_optim.settings import IGNORED
from ctr_optim.trust_region.logits import Logits, evenly, unviewed

# Classes of transformers' models that compare a token's logits with the label at the same position, not the next.
_NOT_SHIFTED = ("ForMaskedLM", "ForTokenClassification", "ForSequenceClassification", "ForPreTraining", "ForCTC")


class Watch:
    """Hooks that read the gradient of a forward pass's logits.

    Attributes:
        shape: shape of the logits without the last dimension.
        named: whether the output names them logits.
        classes: size of the last dimension.
    """

    def __init__(self, logits: Logits) -> None:
        first = logits.chunks[0]
        self.shape = first.shape[:-1] if len(logits.chunks) == 1 else logits.whole().shape[:-1]
        self.named, self.classes = logits.named, first.shape[-1]
        self._masks: dict[int, Tensor] = {}
        self._sums: list[Tensor] = []
        self._shapes = [chunk.shape[:-1] for chunk in logits.chunks]
        watch = self

        def seen(index: int, grad: Tensor | None) -> None:  # A compiled graph accepts a function, not a bound method.
            watch._seen(index, grad)

        for index, chunk in enumerate(logits.chunks):
            if chunk.requires_grad:
                unviewed(chunk).register_hook(partial(seen, index))  # type: ignore[no-untyped-call]

    def _seen(self, index: int, grad: Tensor | None) -> None:
        if grad is None:  # DistributedDataParallel(find_unused_parameters=True), and the loss does not use this output.
            return
        self._masks[index] = (grad != 0).any(-1).view(self._shapes[index])
        if not self.named:
            rows = grad.reshape(-1, grad.shape[-1])
            rows = rows[evenly(len(rows))].float()
            self._sums.append(torch.stack([rows.sum(-1).abs().sum(), rows.abs().sum()]))
            self._precision = torch.finfo(grad.dtype).eps

    @property
    def mask(self) -> Tensor | None:
        """``(*shape)`` whether the loss has a gradient at each token; None until every chunk has a gradient."""
        masks = [self._masks[index] for index in sorted(self._masks)]
        if len(masks) != len(self._shapes):
            return None
        return masks[0] if len(masks) == 1 else torch.cat(masks, 1)

    def feeds_softmax(self) -> bool:
        """Return whether the gradient sums to zero over the classes, as for a softmax; waits for the device.

        For V entries with random signs, the sum is about 1 / sqrt(V) of the sum of magnitudes.
        """
        if not self._sums:
            return False
        total, size = torch.stack(self._sums).sum(0).tolist()
        return bool(total <= max(0.1 / self.classes**0.5, self._precision) * size)


def named_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a forward pass's inputs by name: its keyword arguments, and a dict passed as the first argument."""
    return {**args[0], **kwargs} if args and isinstance(args[0], dict) else kwargs


def from_labels(inputs: Mapping[str, Any], shifted: bool, shape: torch.Size | None = None) -> Tensor | None:
    """Return which tokens have a label; None if the labels have another shape.

    Args:
        inputs: inputs of the forward pass, by name.
        shifted: whether a token's logits are compared with the label of the next token.
        shape: shape of the logits without the last dimension; None without logits: the labels' shape
            ``(sequences, tokens)``.
    """
    ready, labels = inputs.get("shift_labels"), inputs.get("labels")
    if isinstance(ready, Tensor) and ready.dim() == 2 and shape in (None, ready.shape):
        return ready != IGNORED
    if shape is not None and len(shape) == 1:  # one prediction per sequence
        return labels != IGNORED if isinstance(labels, Tensor) and labels.shape == shape else None
    if not isinstance(labels, Tensor) or labels.dim() != 2 or shape not in (None, labels.shape):
        return None
    return nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1)) if shifted else labels != IGNORED


def shifts_labels(module: nn.Module) -> bool:
    """Return whether a model compares a token's logits with the next token's label, as causal models do."""
    for inner in module.modules():
        config, name = getattr(inner, "config", None), type(inner).__name__
        if config is not None and ("For" in name or "LMHead" in name):
            return not getattr(config, "is_encoder_decoder", False) and not any(end in name for end in _NOT_SHIFTED)
    return True
