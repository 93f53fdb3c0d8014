"""Weights other than the training's: the average, and the best on held-out rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ctr_optim.attached import Attached
from ctr_optim.direction.average import Average
from ctr_optim.runtime import distributed


class Weights(Attached):
    """Optimizer whose parameters can hold other weights than the training's."""

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the parameters hold the average of the weights inside the context; then restore the training weights.

        Evaluate and save the model inside. ``state_dict()`` inside also contains the training weights, so that a model
        and an optimizer that were saved together resume exactly.

        Raises:
            ValueError: if the optimizer was built without ``average=True``.
        """
        average = self._averages("averaged")
        inner = average.in_use
        with torch.no_grad():
            distributed.reshard(self._trained.fsdp)
            average.enter(self._held, self.state)
        try:
            yield
        finally:
            if not inner:
                self._use_training()

    @torch.no_grad()
    def use_average(self, keep: bool = False) -> None:
        """Replace the training weights by their average, at the end of a training.

        Args:
            keep: keep the parameters as they are, for example after other weights were loaded into the model, and drop
                the training weights that a surrounding :meth:`averaged` would restore.

        Raises:
            ValueError: if the optimizer was built without ``average=True``.
        """
        average = self._averages("use_average")
        if not keep:
            distributed.reshard(self._trained.fsdp)
            average.enter(self._held, self.state)
        average.keep(self._held, self.state)

    def use_training(self) -> None:
        """Let the parameters hold the training weights, after a checkpoint from inside :meth:`averaged` was loaded.

        The next training forward pass calls this method, but not in a compiled or sharded model. Call it there after
        the model and the optimizer are loaded.

        Raises:
            ValueError: if the optimizer was built without ``average=True``.
        """
        self._averages("use_training")
        self._use_training()

    @property
    def averages(self) -> bool:
        """Whether the optimizer keeps an average of the weights."""
        return self._average is not None

    def _averages(self, name: str) -> Average:
        if self._average is None:
            raise ValueError(f"{name}: this optimizer has no average; pass average=True to CTROptimizer")
        return self._average

    def _check_training_weights(self, name: str) -> None:
        """Check that the parameters hold the training weights, which a method needs.

        Args:
            name: the method.

        Raises:
            RuntimeError: if they hold the average.
        """
        if self._average is not None and self._average.in_use:
            raise RuntimeError(
                f"CTROptimizer.{name}: the parameters hold the average of the weights, so that their gradients are not "
                "the training's; train outside of averaged(). After a checkpoint was loaded, call use_training() "
                "before the forward pass, or use_average() to go on from the average"
            )

    def restore_best(self) -> float:
        """Restore the weights with the lowest held-out loss, and return that loss in nats per token.

        Raises:
            ValueError: if the optimizer has no hold-out.
        """
        if self._judge is None:
            raise ValueError("restore_best: this optimizer has no hold-out; pass holdout=batches to CTROptimizer")
        self._check_training_weights("restore_best")
        distributed.reshard(self._trained.fsdp)
        return self._judge.restore_best(self._counters.steps, self._held, self.state)
