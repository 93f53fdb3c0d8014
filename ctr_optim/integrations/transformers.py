"""Integration with the Hugging Face Trainer and its subclasses, such as TRL's trainers.

::

    trainer = DPOTrainer(..., peft_config=LoraConfig(...))
    attach(trainer, max_kl=0.05)
    trainer.train()

``Trainer(optimizer_cls_and_kwargs=(CTRFactory, {"max_kl": 0.05}), callbacks=[CTRCallback()])`` does the same if the
trainer accepts this argument. Use ``optimizers=(CTROptimizer(...), None)`` only for a model that already has its
adapter.
"""

from __future__ import annotations

import inspect
import os
import warnings
import weakref
from contextlib import ExitStack
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

# Tokenizer of each model whose trainer has a CTRCallback. CTRFactory needs it, and gets only the model.
_TOKENIZERS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def attach(trainer: AnyTrainer, **options: Any) -> AnyTrainer:
    """Make ``trainer`` train with a CTROptimizer. The optimizer is built when training starts.

    The call is the same for Trainer and for TRL's SFT, DPO, KTO, GRPO, RLOO and reward trainers, with and without
    ``peft_config=``. The trainer builds the schedule from ``lr_scheduler_type`` and ``warmup_steps`` as usual.

    Args:
        trainer: a trainer that was built without ``optimizers=``.
        options: arguments of :class:`~ctr_optim.CTROptimizer`. ``retain`` may also be the path of a text file or a
            ``datasets.Dataset``. ``holdout`` may also be one of these, or ``"eval"`` for the first batches of the
            evaluation data. The trainer's ``processing_class`` tokenizes text.

    Returns:
        The trainer, so that ``attach(trainer).train()`` works.

    Raises:
        ValueError: the trainer has an optimizer already, or ``holdout="eval"`` finds no usable evaluation data.
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
    """Factory for ``optimizer_cls_and_kwargs``: builds a CTROptimizer from the model when the Trainer requests it.

    ``retain`` and ``holdout`` may be files or datasets, as in :func:`attach`. ``holdout="eval"`` works only with
    :func:`attach`, because it needs the trainer.
    """

    def __call__(self, model: nn.Module, *_: Any, **kwargs: Any) -> CTROptimizer:
        """Return an optimizer of all parameters that require a gradient.

        Args:
            model: the model to train.
            _: ignored; axolotl passes the training arguments here.
            kwargs: arguments of CTROptimizer.
        """
        for name, resolve in (("retain", retained), ("holdout", partial(held_out, eval_batches=None))):
            if name in kwargs:
                kwargs[name] = resolve(kwargs[name], tokenizer=_tokenizer_of(model))
        return CTROptimizer([p for p in model.parameters() if p.requires_grad], model=model, **kwargs)


class CTRCallback(TrainerCallback):
    """Log the optimizer's metrics, and connect the Trainer with the rank scheduler.

    - Every log entry with a loss gets ``ctr/mean_rank``, ``ctr/kl_from_base``, ``ctr/trust/scale`` and other metrics.
      Every logger of the Trainer receives them.
    - ``events.jsonl`` gets an event log with all layers, for ``ctr-optim report``.
    - If ``RankScheduler.total_steps`` is None, it becomes the Trainer's number of steps.
    - ``resume_from_checkpoint`` works after ranks have moved, even if the optimizer is built after the checkpoint is
      loaded.
    - With ``average=True``, the Trainer evaluates and saves the average of the weights, and the model holds it after
      the training.

    Args:
        events: file or directory of the event log; None for the Trainer's ``output_dir``.
    """

    def __init__(self, events: str | os.PathLike[str] | None = None) -> None:
        self.events = events
        self._log: EventLog | None = None
        self._hooks: list[Any] = []
        self._averages: _Averages | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Store the tokenizer; if there is no optimizer yet, let the model load weights of any rank."""
        if kwargs.get("model") is not None and kwargs.get("processing_class") is not None:
            _TOKENIZERS[kwargs["model"]] = kwargs["processing_class"]
        if kwargs.get("optimizer") is None and kwargs.get("model") is not None:
            self._hooks = accept_ranks(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the optimizer, set the scheduler's length, and open the event log. The checkpoint is loaded already.

        Raises:
            ValueError: the Trainer would use nn.DataParallel, or the optimizer owns no trainable parameter.
            TypeError: the Trainer's optimizer is not a CTROptimizer.
        """
        if args.n_gpu > 1:
            raise ValueError(
                f"CTROptimizer: the Trainer would run {args.n_gpu} GPUs in one process with nn.DataParallel, expected "
                "one GPU in each process; launch with torchrun, or set CUDA_VISIBLE_DEVICES to one GPU"
            )
        for hook in self._hooks:
            hook.remove()
        self._averages = self._averages or _Averages()
        _place(self, self._averages)
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
        """Add the optimizer's metrics to a log entry with a loss; write evaluation results to the event log."""
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
    """Return the tokenizer of a model or of a module inside it, because a trainer may have wrapped the model."""
    found = [_TOKENIZERS[module] for module in model.modules() if module in _TOKENIZERS]
    return found[0] if found else None


def _eval_batches(trainer: Trainer) -> list[Any] | None:
    """Return the first batches of the evaluation data, without a change of the random state; None without data."""
    if trainer.eval_dataset is None:
        return None
    with torch.random.fork_rng(devices=[]):
        return [batch for batch, _ in zip(trainer.get_eval_dataloader(), range(HELD_OUT), strict=False)]


def _warn_of_ignored_rate(args: TrainingArguments, optimizer: CTROptimizer) -> None:
    """Warn if the user set ``TrainingArguments.learning_rate``, because the Trainer does not pass it on."""
    rate = max(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)
    default = type(args).__dataclass_fields__["learning_rate"].default
    if args.learning_rate not in (default, rate):
        warnings.warn(
            f"CTROptimizer ignores TrainingArguments.learning_rate={args.learning_rate:g}. The optimizer's lr is "
            f"{rate:g}, and max_kl limits each step. Leave out learning_rate; the warm-up and schedule of "
            "TrainingArguments still apply",
            stacklevel=2,
        )


class _Averages(TrainerCallback):
    """Let the model hold the average of the weights while the Trainer evaluates or saves, and after the training.

    It runs after all other callbacks, because they decide whether the Trainer evaluates or saves after a step.
    """

    def __init__(self) -> None:
        self._context = ExitStack()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let the model hold the average if the Trainer evaluates or saves now."""
        optimizer = unwrap(kwargs["optimizer"])
        if optimizer.averages and (control.should_evaluate or control.should_save):
            self._context.enter_context(optimizer.averaged())

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the training weights."""
        self._context.close()
        optimizer = unwrap(kwargs["optimizer"])
        if optimizer.averages:  # A resumed checkpoint may be from inside averaged().
            optimizer.use_training()

    # The Trainer may evaluate and save after an epoch, and an epoch may begin without a step.
    on_epoch_end, on_epoch_begin = on_step_end, on_step_begin

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the average, or the best checkpoint's weights if the Trainer has loaded them."""
        optimizer = unwrap(kwargs["optimizer"])
        if optimizer.averages:
            best = args.load_best_model_at_end and state.best_model_checkpoint is not None
            optimizer.use_average(keep=best)
            self._context.pop_all()


def _place(first: TrainerCallback, last: TrainerCallback) -> None:
    """Place a callback before the loggers in the calling handler, and another after all callbacks.

    Loggers read ``logs`` when they are called, and the Trainer calls user callbacks last. The Trainer does not pass its
    callback handler, so this function takes the handler from two frames up the stack.
    """
    frame = inspect.currentframe()
    caller = frame.f_back.f_back if frame is not None and frame.f_back is not None else None
    handler = caller.f_locals.get("self") if caller is not None else None
    if isinstance(handler, CallbackHandler):  # assign a new list, because the handler iterates over the old one
        handler.callbacks = [first, *(c for c in handler.callbacks if c not in (first, last)), last]
