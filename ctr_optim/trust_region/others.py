"""The KL of a step on tokens outside the loss, such as prompts, relative to its KL on the loss tokens.

A bound on the loss tokens does not limit the change of the model on prompts. The ratio of both KLs depends on the task:
on base5m, the KL per prompt token is about 0.02 (boolq), 0.2 (gsm8k), 0.6 (hellaswag) and 1.1 (e2e) of the KL per loss
token in the first ten steps. The re-run that measures kappa also gives the logits of the prompts, so that the ratio
costs no further forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctr_optim.runtime import distributed
from ctr_optim.trust_region.measured import FALL, mixed, newest_share

LEAST_OTHERS = 32  # Smallest number of tokens outside the loss, over all processes: fewer give a noisy ratio.
MOST_OTHERS = 256  # Largest number of tokens outside the loss that are added to a sample of loss tokens.
_LEAST_RATIO = 1e-6
_GUESS = 1.0  # Ratio that sets the length of the first displacement only.


@dataclass(slots=True)
class OthersState:
    """Checkpoint numbers of the ratio.

    Attributes:
        others_ratio: average KL per token outside the loss over the KL per loss token; None until measured.
        others_measured: number of measurements so far.
    """

    others_ratio: float | None = None
    others_measured: int = 0


class Others:
    """Estimator of the ratio of a step's KL per token outside the loss to its KL per loss token.

    Attributes:
        state: checkpoint numbers.
    """

    def __init__(self) -> None:
        self.state = OthersState()
        self._found: Tensor | None = None  # () ratio along the last displacement
        self._here: float | None = None  # ratio measured along the current step

    def begin(self) -> None:
        """Forget the ratio of the previous step."""
        self._found, self._here = None, None

    def look(self, outside: tuple[Tensor, Tensor] | None, inside: Tensor) -> None:
        """Store the ratio along a displacement; the host does not wait for the device.

        Args:
            outside: ``()`` the KL summed over this process's tokens outside the loss, and ``()`` their number; None if
                this process has no such tokens.
            inside: ``()`` the KL per loss token, the same in all processes.
        """
        self._found = ratio(outside, inside)

    def settle(self) -> None:
        """Update the average with the stored ratio, unless the batch had too few tokens outside the loss."""
        found = math.nan if self._found is None else float(self._found)
        self._found = None
        if math.isfinite(found):
            self._here = max(found, _LEAST_RATIO)
            self.state.others_ratio = averaged(self.state.others_ratio, self._here, self.state.others_measured)
            self.state.others_measured += 1

    def expected(self, first: bool) -> float | None:
        """Return the ratio before the coming measurement; None if unknown.

        Args:
            first: whether nothing was measured yet. A displacement to the bound on the loss tokens alone may be many
                times longer than the step, and the KL of a long displacement is not quadratic.
        """
        return _GUESS if first and self.state.others_ratio is None else self.state.others_ratio

    def along(self) -> float | None:
        """Return the ratio of the current step; None if unknown.

        A measured step has at least the measured ratio. A measurement below the average may be chance, so that the
        average counts for half, as for kappa.
        """
        usual = self.state.others_ratio
        if usual is None or self._here is None:
            return usual
        return max(self._here, math.sqrt(usual * self._here))


def ratio(outside: tuple[Tensor, Tensor] | None, inside: Tensor) -> Tensor:
    """Return ``()`` the KL per token outside the loss over ``inside``; NaN below :data:`LEAST_OTHERS` tokens.

    Args:
        outside: ``()`` the KL summed over this process's tokens, and ``()`` their number; None if it has none.
        inside: ``()`` the KL per loss token over all processes.
    """
    total = inside.new_zeros(2) if outside is None else torch.stack(outside).to(inside)
    distributed.add_up([total])
    return torch.where(total[1] >= LEAST_OTHERS, total[0] / total[1] / inside, math.nan)


def averaged(before: float | None, new: float, count: int) -> float:
    """Return the average ratio after a measurement: a mean of square roots, because single measurements are far off.

    Args:
        before: average so far; None before the first measurement.
        new: the measured ratio.
        count: number of earlier measurements.
    """
    return new if before is None else max(mixed(before, new, newest_share(count)), before / FALL)


def outside_the_loss(inputs: Mapping[str, Any], in_loss: Tensor) -> Tensor | None:
    """Return which positions of a causal model predict a token that is neither padding nor in the loss.

    The last position of each sequence predicts no token of the batch, and is left out.

    Args:
        inputs: inputs of the forward pass, by name.
        in_loss: ``(sequences, tokens)`` whether the loss uses the logits at each position.

    Returns:
        ``(sequences, tokens)``; None if the logits have another shape than the attention mask or the token ids, for
        example one prediction per sequence or logits of the last positions only.
    """
    if in_loss.dim() != 2 or in_loss.shape[1] < 2:
        return None
    real, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    if isinstance(ids, Tensor) and ids.shape != in_loss.shape:
        return None
    if not isinstance(real, Tensor):
        real = torch.ones_like(in_loss)
    elif real.shape != in_loss.shape:
        return None
    real = real.to(in_loss.device) != 0
    follows = torch.nn.functional.pad(real[:, 1:], (0, 1))
    return real & follows & ~in_loss
