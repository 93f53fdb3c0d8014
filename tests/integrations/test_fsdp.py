"""FSDP2 (``fully_shard``): each of two processes holds a part of every parameter, over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import needs_fsdp2, needs_gloo, spawn
from support import llama_batch, llama_loss, same, tiny_llama, trainable
from torch import Tensor, nn

from ctr_optim import CTROptimizer, export_compact
from ctr_optim.export.files import read_adapter
from ctr_optim.runtime import distributed

PeftModel = pytest.importorskip("peft", reason="the adapter is PEFT's").PeftModel
pytestmark = [needs_gloo, needs_fsdp2, pytest.mark.usefixtures("a_token_is_enough")]

STEPS, ROWS = 5, 8  # with eight rows, each process measures the coupling on one row
OPTIONS: dict[str, Any] = dict(
    lr=0.05, max_kl=1e-3, weight_decay=0.01, factor_interval=2, basis_interval=2, calibration_interval=2
)


def rows_of(step: int, rank: int) -> dict[str, Tensor]:
    return llama_batch(10 * step + rank, n=ROWS)


def joined(step: int) -> dict[str, Tensor]:
    """Return both processes' rows in turn, because the processes measure on the first two rows."""
    a, b = rows_of(step, 0), rows_of(step, 1)
    return {key: torch.stack([a[key], b[key]], 1).flatten(0, 1) for key in a}


def model_of(**lora: Any) -> nn.Module:
    """Return a model with LoRA of rank 3, which two processes cannot shard evenly, and a fully trained head."""
    return tiny_llama(**{"r": 3, "modules_to_save": ["lm_head"], "target_modules": ["q_proj", "down_proj"], **lora})


def shard(model: nn.Module, mesh_shape: tuple[int, ...] = (2,), units: bool = True, **options: Any) -> nn.Module:
    """Shard every decoder layer as one FSDP unit, as usual, and the rest of the model as another."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    for layer in model.base_model.model.model.layers if units else ():
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters, gathered from both processes."""
    named = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    return {k: p.full_tensor() if distributed.is_sharded(p) else p for k, p in named.items()}


def train(model: nn.Module, opt: CTROptimizer, data: Any, steps: range) -> None:
    for step in steps:
        llama_loss(model, data(step)).backward()
        opt.step()
        opt.zero_grad()


def alone(**lora: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return weights and numbers of the same training in one process."""
    model = model_of(**lora)
    opt = CTROptimizer(trainable(model), **OPTIONS, model=model)
    train(model, opt, joined, range(STEPS))
    return whole(model), opt.metrics()


def assert_one(first: Any, second: Any, expected: Any) -> None:
    """Assert that both processes agree bit for bit, and agree with one process to rounding."""
    (weights, numbers), (others, other_numbers), (right, right_numbers) = first, second, expected
    assert weights.keys() == right.keys() and numbers == other_numbers
    for name, value in right.items():
        assert torch.equal(weights[name], others[name]), name
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-7)
    for name in ("trust/predicted_kl", "trust/scale", "trust/coupling"):
        assert numbers[name] == pytest.approx(right_numbers[name], rel=1e-4), name  # computed from float32 logits
    # Differences of float32 logits have errors of a few 1e-5 nats.
    assert numbers["kl_from_base"] == pytest.approx(right_numbers["kl_from_base"], rel=2e-3)


def _train(rank: int, folder: Path, mesh: tuple[int, ...], lora: dict[str, Any]) -> Any:
    model = shard(model_of(**lora), mesh)
    opt = CTROptimizer(model.parameters(), **OPTIONS)
    train(model, opt, lambda step: rows_of(step, rank), range(STEPS))
    return whole(model), opt.metrics()


@pytest.mark.parametrize(
    "mesh, lora", [((2,), {}), ((2,), dict(r=1)), ((2, 1), {})], ids=["uneven", "empty-part", "hsdp"]
)
def test_two_processes_are_one(tmp_path: Path, mesh: tuple[int, ...], lora: dict[str, Any]) -> None:
    assert_one(*spawn(_train, tmp_path, mesh, lora), alone(**lora))


MOVING: dict[str, Any] = OPTIONS | dict(
    rank_scheduler=dict(budget=4, interval=2, window=2, sketch_rank=2, hysteresis=0.0, max_change=3, max_rank=6),
)


def _move(rank: int, folder: Path) -> Any:
    model = shard(model_of(r=6))
    opt = CTROptimizer(model.parameters(), **MOVING)
    heard: list[Any] = []
    opt.on_rank_event(heard.append)
    train(model, opt, lambda step: rows_of(step, rank), range(STEPS))
    export_compact(model, folder / "adapter")
    return whole(model), opt.metrics(), [(e.step, e.name, e.old_rank, e.new_rank, e.kept, e.reason) for e in heard]


def test_ranks_move_alike(tmp_path: Path) -> None:
    """Masked ranks give the same events in both processes, and the weights of training in one process."""
    (weights, numbers, events), (others, other_numbers, other_events) = spawn(_move, tmp_path)
    model = model_of(r=6)
    opt = CTROptimizer(trainable(model), **MOVING, resize="masked", model=model)
    heard: list[Any] = []
    opt.on_rank_event(heard.append)
    train(model, opt, joined, range(STEPS))
    assert_one((weights, numbers), (others, other_numbers), (whole(model), opt.metrics()))
    assert events and events == other_events
    assert events == [(e.step, e.name, e.old_rank, e.new_rank, e.kept, e.reason) for e in heard]
    assert numbers["ranks"] == other_numbers["ranks"] == opt.metrics()["ranks"]
    assert len(set(numbers["ranks"].values())) > 1
    for pair in opt.pairs:
        b = next(w for name, w in weights.items() if f"{pair.name}.lora_B" in name)
        assert int((b != 0).any(0).sum()) == numbers["ranks"][pair.name]

    saved = {layer.name: layer.rank for layer in read_adapter(tmp_path / "adapter").layers}
    assert saved == {name: rank for name, rank in numbers["ranks"].items() if rank > 0}
    again = PeftModel.from_pretrained(tiny_llama(peft=False), str(tmp_path / "adapter"), autocast_adapter_dtype=False)
    data = {k: v for k, v in llama_batch(99).items() if k != "labels"}
    torch.testing.assert_close(again(**data).logits, model.eval()(**data).logits, rtol=1e-5, atol=1e-7)


def _resume(rank: int, folder: Path, lora: dict[str, Any], options: dict[str, Any]) -> Any:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def data(step: int) -> dict[str, Tensor]:
        return rows_of(step, rank)

    def fresh() -> tuple[nn.Module, CTROptimizer]:
        model = shard(model_of(**lora))
        return model, CTROptimizer(model.parameters(), **OPTIONS, **options)

    model, opt = fresh()
    opt.param_groups[0]["lr"] = 0.1  # the peak lr, which only the checkpoint stores
    train(model, opt, data, range(2))
    opt.param_groups[0]["lr"] = 0.05
    train(model, opt, data, range(2, 3))
    weights, state = get_state_dict(model, opt)
    dcp.save({"model": weights, "optim": state}, checkpoint_id=folder / "checkpoint")
    train(model, opt, data, range(3, STEPS))

    again, resumed = fresh()
    train(again, resumed, data, range(1))  # moves the weights away from the checkpoint
    weights, state = get_state_dict(again, resumed)
    dcp.load({"model": weights, "optim": state}, checkpoint_id=folder / "checkpoint")
    set_state_dict(again, resumed, model_state_dict=weights, optim_state_dict=state)
    train(again, resumed, data, range(3, STEPS))
    return [(whole(model), opt.metrics()), (whole(again), resumed.metrics())]


def _average(rank: int, folder: Path) -> Any:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def data(step: int) -> dict[str, Tensor]:
        return rows_of(step, rank)

    def fresh() -> tuple[nn.Module, CTROptimizer]:
        model = shard(model_of())
        return model, CTROptimizer(model.parameters(), **OPTIONS, average=True)

    model, opt = fresh()
    train(model, opt, data, range(7))
    before = whole(model)
    with opt.averaged(), torch.no_grad():
        llama_loss(model, data(0))  # FSDP2 keeps the outermost module's gathered copy
        weights, state = get_state_dict(model, opt)
        dcp.save({"model": weights, "optim": state}, checkpoint_id=folder / "checkpoint")
    assert same(whole(model), before)
    train(model, opt, data, range(7, 9))

    again, resumed = fresh()
    weights, state = get_state_dict(again, resumed)
    dcp.load({"model": weights, "optim": state}, checkpoint_id=folder / "checkpoint")
    set_state_dict(again, resumed, model_state_dict=weights, optim_state_dict=state)
    resumed.use_training()
    train(again, resumed, data, range(7, 9))
    found = []
    for each, optimizer in ((model, opt), (again, resumed)):
        last = whole(each)
        optimizer.use_average()
        found.append((last, whole(each)))
    return found


def test_the_average_is_sharded_and_resumes_exactly(tmp_path: Path) -> None:
    (run, resumed), (other, _) = spawn(_average, tmp_path)
    assert same(run[0], resumed[0]) and same(run[1], resumed[1]) and same(run[1], other[1])
    model = model_of()
    opt = CTROptimizer(trainable(model), **OPTIONS, model=model, average=True)
    train(model, opt, joined, range(9))
    opt.use_average()
    for name, value in whole(model).items():
        torch.testing.assert_close(run[1][name], value, rtol=1e-5, atol=1e-7)


EVENT = {**MOVING["rank_scheduler"], "interval": 3, "window": 1}  # an event at step 3, where the checkpoint is written


@pytest.mark.parametrize(
    "lora, options", [({}, {}), (dict(r=6), dict(rank_scheduler=EVENT))], ids=["ranks-stay", "after-an-event"]
)
def test_a_sharded_checkpoint_resumes_exactly_and_loads_in_one_process(
    tmp_path: Path, lora: dict[str, Any], options: dict[str, Any]
) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    for (weights, numbers), (others, other_numbers) in spawn(_resume, tmp_path, lora, options):
        assert same(weights, others)
        for told in (numbers, other_numbers):
            told.pop("utility")  # the second run resumes after the event, so it has no utility
        assert numbers == other_numbers

    model = model_of(**lora)
    opt = CTROptimizer(model.parameters(), **OPTIONS, **options, resize="masked")
    loaded, state = get_state_dict(model, opt)
    dcp.load({"model": loaded, "optim": state}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    set_state_dict(model, opt, model_state_dict=loaded, optim_state_dict=state)
    assert opt.steps == 3
    train(model, opt, joined, range(3, STEPS))
    for name, value in whole(model).items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-7)


def _parts(rank: int, folder: Path) -> dict[str, tuple[bool, int]]:
    model = shard(model_of())
    opt = CTROptimizer(model.parameters(), **OPTIONS)
    train(model, opt, lambda step: rows_of(step, rank), range(1))
    moments = {name: opt.state[p]["exp_avg"] for name, p in model.named_parameters() if p.requires_grad}
    return {n: (distributed.is_sharded(m), distributed.local(m).numel()) for n, m in moments.items()}


def test_state_of_lora_is_whole_and_that_of_other_parameters_in_parts(tmp_path: Path) -> None:
    first, _ = spawn(_parts, tmp_path)
    sizes = {name: p.numel() for name, p in model_of().named_parameters() if p.requires_grad}
    assert sum("lora" not in name for name in sizes) == 1
    for name, size in sizes.items():
        assert first[name] == ((False, size) if "lora" in name else (True, size // 2)), name


def _accumulate(rank: int, folder: Path) -> Any:
    model = shard(model_of())
    opt = CTROptimizer(model.parameters(), **{**OPTIONS, "calibration_interval": None})
    for step in range(STEPS):
        data = rows_of(step, rank)
        for micro in range(ROWS):
            model.set_requires_gradient_sync(micro == ROWS - 1)
            (llama_loss(model, {k: v[micro : micro + 1] for k, v in data.items()}) / ROWS).backward()
        opt.step()
        opt.zero_grad()
    return whole(model), opt.metrics()


def test_accumulation_without_synchronising(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIONS, "calibration_interval", None)
    assert_one(*spawn(_accumulate, tmp_path), alone())


def _half(rank: int, folder: Path) -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(model_of(dtype=torch.float32), mp_policy=policy)
    opt = CTROptimizer(model.parameters(), **{**OPTIONS, "max_kl": None})
    model.gradient_checkpointing_enable()
    train(model, opt, lambda step: rows_of(step, rank), range(STEPS))
    return whole(model), opt.metrics()


def test_mixed_precision_and_checkpointed_activations(tmp_path: Path) -> None:
    (first, numbers), (second, others) = spawn(_half, tmp_path)
    assert same(first, second) and numbers == others
    assert numbers["trust/source"] == "measured" and numbers["kl_from_base"] > 0
    expected, _ = alone_in_full_precision()
    moved = torch.cat([(first[k] - v).flatten() for k, v in expected.items()]).norm()
    start = whole(model_of(dtype=torch.float32))
    assert moved < 0.2 * torch.cat([(start[k] - v).flatten() for k, v in expected.items()]).norm()


def alone_in_full_precision() -> tuple[dict[str, Tensor], dict[str, Any]]:
    model = model_of(dtype=torch.float32)
    opt = CTROptimizer(trainable(model), **{**OPTIONS, "max_kl": None}, model=model)
    train(model, opt, joined, range(STEPS))
    return whole(model), opt.metrics()


def _evaluate_between(rank: int, folder: Path, evaluate: bool) -> Any:
    model = shard(model_of(), units=False)  # the root unit keeps its gathered parameters after a forward
    opt = CTROptimizer(model.parameters(), **OPTIONS)
    for step in range(STEPS):
        train(model, opt, lambda step: rows_of(step, rank), range(step, step + 1))
        if evaluate:
            with torch.no_grad():
                llama_loss(model, rows_of(99, rank))
            opt.load_state_dict(opt.state_dict())  # restacks while gathered copies replace the parameters
            opt.metrics()
    return whole(model), opt.metrics()


def test_an_evaluation_leaves_no_trace(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (plain, _), (evaluated, _) = (spawn(_evaluate_between, tmp_path / n, e)[0] for n, e in (("a", False), ("b", True)))
    assert same(plain, evaluated)


def _overflow(rank: int, folder: Path) -> tuple[bool, int]:
    model = shard(model_of())
    opt = CTROptimizer(model.parameters(), **OPTIONS)
    before = whole(model)
    llama_loss(model, rows_of(0, rank)).backward()
    if rank == 1:
        next(p for p in model.parameters() if p.grad is not None).grad.to_local().fill_(torch.inf)
    with pytest.warns(UserWarning, match="skipped a step"):
        opt.step()
    return same(before, whole(model)), opt.metrics()["skipped_steps"]


def test_a_gradient_that_is_not_finite_in_one_part_skips_the_step_everywhere(tmp_path: Path) -> None:
    assert spawn(_overflow, tmp_path) == [(True, 1), (True, 1)]


def _refused(rank: int, folder: Path) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    errors = []
    sharded = shard(model_of())
    copied = model_of()
    mesh = init_device_mesh("cpu", (2,))
    for layer in copied.base_model.model.model.layers:
        weight = layer.self_attn.q_proj.lora_A["default"].weight
        layer.self_attn.q_proj.lora_A["default"].weight = nn.Parameter(distribute_tensor(weight.detach(), mesh))
    for model, options in ((sharded, dict(curvature="hutchinson")), (copied, {})):
        try:
            CTROptimizer(trainable(model), **options)
        except ValueError as error:
            errors.append(str(error))
    return errors


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    for hutchinson, parallel in spawn(_refused, tmp_path):
        assert "'hutchinson'" in hutchinson and "expected 'kfac'" in hutchinson
        assert "Replicate" in parallel and "fully_shard" in parallel
