"""Hugging Face Trainer and every trainer that derives from it, as all of TRL's do.

::

    trainer = DPOTrainer(..., peft_config=LoraConfig(...))
    attach(trainer, max_kl=0.05)
    trainer.train()

``Trainer(optimizer_cls_and_kwargs=(CTRFactory, {"max_kl": 0.05}), callbacks=[CTRCallback()])`` does the same where a
trainer takes that argument. ``optimizers=(CTROptimizer(...), None)`` is right only for a model that has its adapter.
"""

from __future__ import annotations

import inspect
import os
import warnings
import weakref
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from ctr_optim.integrations import accept_ranks, check_ownership, set_length, unwrap
from ctr_optim.integrations.text import HELD_OUT, held_out, retained
from ctr_optim.optimizer import CTROptimizer
from ctr_optim.report.log import EventLog, scalars

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)

# the tokenizer of each model that a trainer with a CTRCallback holds: a factory gets the model alone
_TOKENIZERS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def attach(trainer: AnyTrainer, **options: Any) -> AnyTrainer:
    """Make ``trainer`` train with a CTROptimizer; the optimizer is built when training begins.

    The call is the same for Trainer and for TRL's SFT, DPO, KTO, GRPO, RLOO and reward trainers, with and without
    ``peft_config=``. The trainer makes the schedule from ``lr_scheduler_type`` and ``warmup_steps`` as ever.

    Args:
        trainer: a trainer that was built without ``optimizers=``.
        options: arguments of :class:`~ctr_optim.CTROptimizer`. ``retain`` may be ``"self"``, the path of a text file or
            a ``datasets.Dataset``, and ``holdout`` those or ``"eval"``, the first batches of the evaluation data; the
            trainer's ``processing_class`` makes tokens of text.

    Returns:
        the trainer, so that ``attach(trainer).train()`` works.

    Raises:
        ValueError: the trainer has an optimizer already.
    """
    if trainer.optimizer is not None:
        raise ValueError(
            f"attach: the trainer has an optimizer already ({type(trainer.optimizer).__name__}); leave out optimizers= "
            "and call attach before train()"
        )
    if isinstance(options.get("holdout"), str) and options["holdout"] == "eval":
        options["holdout"] = held_out("eval", _eval_batches(trainer))
    trainer.optimizer_cls_and_kwargs = (CTRFactory, options)  # type: ignore[assignment]
    if isinstance(trainer.model, nn.Module) and trainer.processing_class is not None:
        _TOKENIZERS[trainer.model] = trainer.processing_class
    if not any(isinstance(callback, CTRCallback) for callback in trainer.callback_handler.callbacks):
        callback = CTRCallback()
        trainer.add_callback(callback)
        callback.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
    return trainer


class CTRFactory:
    """For ``optimizer_cls_and_kwargs``: builds a CTROptimizer from the model, when the Trainer wants one.

    ``retain`` and ``holdout`` may be names, as in :func:`attach`, but for ``holdout="eval"``, which needs the trainer.
    """

    def __call__(self, model: nn.Module, *_: Any, **kwargs: Any) -> CTROptimizer:
        """An optimizer of every parameter that wants a gradient; axolotl passes its arguments second."""
        for name, resolve in (("retain", retained), ("holdout", partial(held_out, eval_batches=None))):
            if name in kwargs:
                kwargs[name] = resolve(kwargs[name], tokenizer=_tokenizer_of(model))
        return CTROptimizer([p for p in model.parameters() if p.requires_grad], model=model, **kwargs)


class CTRCallback(TrainerCallback):
    """Logs what the optimizer does, and brings Trainer and rank scheduler together.

    - Every log entry with a loss gets ``ctr/mean_rank``, ``ctr/kl_from_base``, ``ctr/trust/scale`` and the like, for
      every logger that the Trainer reports to.
    - An event log with all layers goes to ``events.jsonl``; ``ctr-optim report`` reads it.
    - ``RankScheduler.total_steps``, where it is None, becomes the Trainer's number of steps.
    - ``resume_from_checkpoint`` works after ranks have moved, also where the optimizer is built after the loading.

    Args:
        events: file or directory of the event log; None for the Trainer's ``output_dir``.
    """

    def __init__(self, events: str | os.PathLike[str] | None = None) -> None:
        self.events = events
        self._log: EventLog | None = None
        self._hooks: list[Any] = []

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let the model load other ranks before there is an optimizer that sees to it; remember the tokenizer."""
        if kwargs.get("model") is not None and kwargs.get("processing_class") is not None:
            _TOKENIZERS[kwargs["model"]] = kwargs["processing_class"]
        if kwargs.get("optimizer") is None and kwargs.get("model") is not None:
            self._hooks = accept_ranks(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Model, optimizer and checkpoint are in place."""
        if args.n_gpu > 1:
            raise ValueError(
                f"CTROptimizer: the Trainer would spread this process over {args.n_gpu} GPUs with nn.DataParallel, "
                "whose replicas hide the layers; launch with torchrun, or set CUDA_VISIBLE_DEVICES to one GPU"
            )
        for hook in self._hooks:
            hook.remove()
        _move_to_front(self)
        optimizer = unwrap(kwargs["optimizer"])
        if kwargs.get("model") is not None:
            check_ownership(optimizer, kwargs["model"])
        _warn_of_ignored_rate(args, optimizer)
        set_length(optimizer, state.max_steps)
        if self._log is None or self._log.optimizer is not optimizer:  # train() may be called again
            self._log = EventLog(optimizer, self.events or args.output_dir or ".")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add our numbers to an entry of the training log."""
        if self._log is None or logs is None:
            return
        numbers = {k: v for k, v in logs.items() if isinstance(v, (int, float))}
        if "loss" not in logs:
            if any(name.startswith("eval_") for name in numbers):
                self._log.evaluated(**numbers)
            return
        ours = scalars(self._log.log(**numbers))
        logs.update(ours)
        if state.log_history:
            state.log_history[-1].update(ours)


def _tokenizer_of(model: nn.Module) -> Any:
    """The tokenizer of a model that a trainer may have wrapped since."""
    found = [_TOKENIZERS[module] for module in model.modules() if module in _TOKENIZERS]
    return found[0] if found else None


def _eval_batches(trainer: Trainer) -> list[Any] | None:
    """The first batches of the evaluation data; the random state stays as it is."""
    if trainer.eval_dataset is None:
        return None
    with torch.random.fork_rng(devices=[]):
        return [batch for batch, _ in zip(trainer.get_eval_dataloader(), range(HELD_OUT), strict=False)]


def _warn_of_ignored_rate(args: TrainingArguments, optimizer: CTROptimizer) -> None:
    """Warn where the user chose ``TrainingArguments.learning_rate``, which an optimizer of one's own does not get."""
    rate = max(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)
    default = type(args).__dataclass_fields__["learning_rate"].default
    if args.learning_rate not in (default, rate):
        warnings.warn(
            f"CTROptimizer ignores TrainingArguments.learning_rate={args.learning_rate:g}: its lr is {rate:g}, and "
            "max_kl limits each step. Leave out learning_rate; warm-up and schedule of TrainingArguments apply",
            stacklevel=2,
        )


def _move_to_front(callback: TrainerCallback) -> None:
    """Move this callback before the loggers in the calling handler, because loggers read ``logs`` when they are called.

    The Trainer calls user callbacks last and does not pass its handler, which is two frames up the stack.
    """
    frame = inspect.currentframe()
    caller = frame.f_back.f_back if frame is not None and frame.f_back is not None else None
    handler = caller.f_locals.get("self") if caller is not None else None
    if isinstance(handler, CallbackHandler):  # a new list: the handler is walking through the old one
        handler.callbacks = [callback, *(c for c in handler.callbacks if c is not callback)]
