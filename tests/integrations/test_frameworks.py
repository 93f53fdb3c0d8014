"""axolotl, LLaMA-Factory, ms-swift, torchtitan, NeMo, kohya and DeepSpeed, through the calls that they make.

If a framework is not installed, a stand-in makes the same calls as the framework's own code (axolotl 0.19,
LLaMA-Factory 0.9.5, ms-swift 4.6, torchtitan 0.3, NeMo Automodel 0.7).
"""

from __future__ import annotations

import importlib
import sys
import types
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from support import backward, batch, net, tiny_llama, train, trainable
from torch import nn

from ctr_optim import CTROptimizer

pytest.importorskip("transformers", reason="most of these build on its Trainer")
pytest.importorskip("peft", reason="the adapters are PEFT's")

from integrations.test_transformers import trainer_of

from ctr_optim.integrations.transformers import CTRCallback

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Callable[..., types.ModuleType]:
    """Return a function that puts a stand-in into ``sys.modules``; its ``ours`` imports an integration again."""

    def add(name: str, **attributes: Any) -> types.ModuleType:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            if path not in sys.modules:
                module = types.ModuleType(path)
                module.__path__ = []  # type: ignore[attr-defined]
                monkeypatch.setitem(sys.modules, path, module)
        for key, value in attributes.items():
            setattr(sys.modules[name], key, value)
        return sys.modules[name]

    def ours(name: str) -> types.ModuleType:
        monkeypatch.delitem(sys.modules, f"ctr_optim.integrations.{name}", raising=False)
        module = importlib.import_module(f"ctr_optim.integrations.{name}")
        monkeypatch.delitem(sys.modules, f"ctr_optim.integrations.{name}")
        return module

    add.ours = ours  # type: ignore[attr-defined]
    return add


def bare_trainer(folder: Path, **extra: Any) -> Any:
    """Return a Trainer with its default optimizer."""
    from integrations.test_transformers import data
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    cls = extra.pop("cls", Trainer)
    return cls(model=tiny_llama(dtype=torch.float32), args=args, train_dataset=data(), **extra)


def trained_with_ours(trainer: Any, max_kl: float) -> None:
    """Train, and check that the optimizer is a CTROptimizer with the config's ``max_kl``, and bounds its steps."""
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    said = optimizer.metrics()
    assert isinstance(optimizer, CTROptimizer) and optimizer.steps == 4 and said["trust/source"] == "measured"
    assert said["trust/max_kl"] <= max_kl and said["trust/predicted_kl"] <= max_kl * (1 + 1e-4)
    assert len(optimizer.pairs) == 14


@pytest.mark.parametrize("own_create", [False, True], ids=["inherited", "axolotls"])
def test_axolotl(own_create: bool, modules: Any, tmp_path: Path) -> None:
    from transformers import Trainer

    class AxolotlTrainer(Trainer):
        """A trainer like axolotl's mixin, which calls the factory itself, with the training arguments."""

        def create_optimizer(self, model: Any = None) -> Any:
            if not own_create:
                return super().create_optimizer(model)
            factory, options = self.optimizer_cls_and_kwargs
            self.optimizer = factory()(self.model if model is None else model, self.args, **options)
            return self.optimizer

    modules("axolotl.integrations.base", BasePlugin=object)
    ours = modules.ours("axolotl")
    plugin = ours.CTRPlugin()
    assert plugin.get_input_args() == "ctr_optim.integrations.axolotl.CTRArgs"
    assert ours.CTRArgs(ctr={"max_kl": 0.02}).ctr == {"max_kl": 0.02}
    trainer = bare_trainer(tmp_path, cls=AxolotlTrainer)
    plugin.post_trainer_create({"ctr": {"max_kl": 0.02}}, trainer)
    trained_with_ours(trainer, 0.02)


def test_llamafactory_version_1(modules: Any) -> None:
    registry: dict[str, Any] = {}

    class OptimizerPlugin:
        def __init__(self, name: str) -> None:
            self.name = name

        def register(self) -> Any:
            return lambda function: registry.setdefault(self.name, function)

    modules("llamafactory.v1.plugins.trainer_plugins.optimizer", OptimizerPlugin=OptimizerPlugin)
    modules.ours("llamafactory")
    model = net(dtype=torch.float32)
    optimizer = registry["ctr"](model, {"name": "ctr", "max_kl": 0.02})  # the call in base_trainer.py
    train(model, optimizer, 2)
    assert optimizer.metrics()["trust/max_kl"] <= 0.02 and len(optimizer.pairs) == 2


def test_llamafactory_version_0(modules: Any, tmp_path: Path) -> None:
    from transformers import Trainer

    module = modules("llamafactory.train.sft.trainer", create_custom_optimizer=lambda *_: None)

    class CustomSeq2SeqTrainer(Trainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            if self.optimizer is None:
                self.optimizer = module.create_custom_optimizer(self.model, self.args, None)
            return super().create_optimizer(*args, **kwargs)

    ours = modules.ours("llamafactory")
    assert ours.install(max_kl=0.02) == ["llamafactory.train.sft.trainer"]
    trained_with_ours(bare_trainer(tmp_path, cls=CustomSeq2SeqTrainer, callbacks=[CTRCallback()]), 0.02)
    del module.create_custom_optimizer
    with pytest.raises(RuntimeError, match="no create_custom_optimizer"):
        ours.install()


def test_swift(modules: Any, tmp_path: Path) -> None:
    from transformers import Trainer

    class OptimizerCallback:
        def __init__(self, args: Any, trainer: Any) -> None:
            self.args, self.trainer = args, trainer

    optimizers_map: dict[str, Any] = {}

    class SwiftTrainer(Trainer):
        def create_optimizer(self, model: Any = None) -> Any:
            self.optimizer = optimizers_map["ctr"](self.args, self).create_optimizer(model=model)
            self.optimizer.param_groups = [group for group in self.optimizer.param_groups if group["params"]]
            return self.optimizer

    modules("swift.optimizers", OptimizerCallback=OptimizerCallback, optimizers_map=optimizers_map)
    modules.ours("swift").register(max_kl=0.02)
    trained_with_ours(bare_trainer(tmp_path, cls=SwiftTrainer), 0.02)
    assert (tmp_path / "events.jsonl").exists()  # the plugin also added the callback


@dataclass
class Group:
    """Stand-in for torchtitan's ParamGroupConfig."""

    pattern: str = ".*"
    optimizer_name: str = "CTR"
    optimizer_kwargs: dict[str, Any] = field(default_factory=dict)


class Container(torch.optim.Optimizer):
    """Stand-in for torchtitan's OptimizersContainer, which builds optimizers and steps; Config builds its owner."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        _owner: ClassVar[Any] = None
        param_groups: list[Group] = field(default_factory=list)
        implementation: str = "fused"

        def build(self, **kwargs: Any) -> Any:
            return self._owner(config=replace(self), **kwargs)

    def __init_subclass__(cls) -> None:
        if "Config" in cls.__dict__:
            cls.__dict__["Config"]._owner = cls

    def __init__(self, config: Any, *, model_parts: list[nn.Module]) -> None:
        import re

        options, self.optimizers = self._build_impl_kwargs(config), []
        for model in model_parts:
            groups, claimed = defaultdict(list), set()
            for group in config.param_groups:
                named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and n not in claimed]
                named = [(n, p) for n, p in named if re.search(group.pattern, n)]
                claimed |= {name for name, _ in named}
                params = {"params": [p for _, p in named], "param_names": [name for name, _ in named]}
                groups[group.optimizer_name].append({**params, **options, **group.optimizer_kwargs})
            self.optimizers += [self._resolve_optimizer_factory(n)(g) for n, g in groups.items()]
        torch.optim.Optimizer.__init__(self, [p for m in model_parts for p in trainable(m)], {})

    def step(self, closure: None = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)


def config_of(*groups: Group) -> Any:
    return types.SimpleNamespace(param_groups=list(groups), implementation="fused")


def test_torchtitan_trains_and_resumes_through_distributed_checkpoints(modules: Any, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    modules("torchtitan.components.optimizer", OptimizersContainer=Container)
    ours = modules.ours("torchtitan").CTROptimizersContainer
    options = {"max_kl": 0.02}
    config = ours.Config(param_groups=[Group("lora_A", optimizer_kwargs=options), Group(optimizer_kwargs=options)])

    def build() -> tuple[nn.Module, Any]:
        model = net(dtype=torch.float32)
        return model, config.build(model_parts=[model])

    model, container = build()
    train(model, container, 3)
    [optimizer] = container.optimizers
    assert len(optimizer.param_groups) == 2 and len(optimizer.pairs) == 2
    assert optimizer.metrics()["trust/max_kl"] <= 0.02
    dcp.save({"optimizer": container.state_dict(), "model": model.state_dict()}, checkpoint_id=tmp_path / "c")
    again, other = build()
    state = {"optimizer": other.state_dict(), "model": again.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "c")
    again.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    for m, c in ((model, container), (again, other)):
        train(m, c, 3, start=3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    "groups, parts, message",
    [
        ([Group("lora_A"), Group(optimizer_name="AdamW")], 1, r"got optimizers \['AdamW', 'CTR'\]"),
        ([Group("lora_A", optimizer_kwargs={"max_kl": 0.1}), Group()], 1, "the same in every group"),
        ([Group()], 2, "pipeline parallelism"),
    ],
)
def test_torchtitan_refuses_half_a_trust_region(groups: Any, parts: int, message: str, modules: Any) -> None:
    modules("torchtitan.components.optimizer", OptimizersContainer=Container)
    with pytest.raises(ValueError, match=message):
        modules.ours("torchtitan").CTROptimizersContainer(config_of(*groups), model_parts=[net() for _ in range(parts)])


def resolved(path: str) -> Any:
    """Import a dotted name, as for NeMo's ``_target_`` and kohya's ``--optimizer_type``."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


class LinearLoRA(nn.Linear):
    """Stand-in for NeMo Automodel's layer: an nn.Linear that multiplies by ``scale`` between A and B."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out, bias=False)
        self.weight.requires_grad_(False)
        self.scale = 4.0
        self.lora_A, self.lora_B = nn.Linear(d_in, 3, bias=False), nn.Linear(3, d_out, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.lora_B(self.lora_A(x) * self.scale)


def test_nemo() -> None:
    model = net(dtype=torch.float32)
    model.up, model.down = LinearLoRA(8, 10), LinearLoRA(10, 7)
    optimizer = resolved("ctr_optim.CTROptimizer")([p for p in model.parameters() if p.requires_grad], max_kl=0.02)
    assert len(optimizer.pairs) == 2
    ids, _ = data = batch(0, n=64, length=16)
    for _ in range(3):
        optimizer.zero_grad()
        backward(model, data)
        with torch.no_grad():
            before = model(ids).log_softmax(-1)
        optimizer.step()
        with torch.no_grad():
            after = model(ids).log_softmax(-1)
        measured = float((before.exp() * (before - after)).sum(-1)[:, 2:].mean())
        said = optimizer.metrics()
        assert said["trust/source"] == "measured" and measured < 2 * said["trust/max_kl"]


def test_kohya() -> None:
    """kohya calls ``optimizer_class(trainable_params, lr=lr, **optimizer_args)``; each group has its own rate."""
    model = net(dtype=torch.float32)
    groups = [{"params": trainable(model)[:2], "lr": 5e-2}, {"params": trainable(model)[2:], "lr": 1e-1}]
    optimizer = resolved("ctr_optim.CTROptimizer")(groups, lr=8e-2, max_kl=0.02)
    train(model, optimizer, 3)
    assert optimizer.metrics()["trust/max_kl"] <= 0.02 and len(optimizer.pairs) == 2


def test_deepspeed_zero_is_refused_at_every_stage(tmp_path: Path) -> None:
    """Stages 1 and 2 put flat partitions into the groups; stage 3 empties the weights. All raise an error."""
    model = tiny_llama(dtype=torch.float32)
    trainer = trainer_of(tmp_path, "optimizers", None, model=model)
    optimizer = trainer.optimizer
    for group in optimizer.param_groups:
        flat = nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))
        flat.grad = torch.ones_like(flat)
        group["params"] = [flat]
    with pytest.raises(ValueError, match="owns none of the 28 parameters"):
        CTRCallback().on_train_begin(trainer.args, trainer.state, trainer.control, optimizer=optimizer, model=model)
    with pytest.raises(RuntimeError, match="DeepSpeed ZeRO"):
        optimizer.step()
    shell = nn.Parameter(torch.zeros(0))
    shell.ds_id = 1  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="DeepSpeed ZeRO"):
        CTROptimizer([shell])


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "whole model"])
@pytest.mark.parametrize("steps", [0, 2])
def test_deepspeeds_float32_copies_are_refused(steps: int, adapter: bool) -> None:
    """Without ZeRO, an fp16 or bf16 engine trains copies and writes them back over the model's parameters."""
    from support import llama_batch, llama_loss

    model = tiny_llama(dtype=torch.float32, peft=adapter)
    optimizer = CTROptimizer(trainable(model), model=model)
    for step in range(steps):
        llama_loss(model, llama_batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    [group] = optimizer.param_groups  # as FP16_UnfusedOptimizer does, in its __init__ and in its step
    halves = group["params"]
    group["params"] = [p.detach().clone().requires_grad_() for p in halves]
    llama_loss(model, llama_batch(steps)).backward()
    for copy, half in zip(group["params"], halves, strict=True):
        copy.grad = torch.zeros_like(copy) if half.grad is None else half.grad.clone()
    with pytest.raises(RuntimeError, match=r"are not the parameters that the optimizer was built with.*DeepSpeed"):
        optimizer.step()
