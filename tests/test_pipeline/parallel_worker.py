"""One process of the tensor-parallel tests: `main(rank, directory)`, which warm_process.py calls.

Runs cases.json in the directory in one of two processes, and writes RANK.json: name -> [kind of error or null,
message]. A case has `name`, `port`, `config`, and what is special about it:

    act            a name of ACTS; default: train as `pipeline train` does
    stop_after     the step whose checkpoint is the last thing done
    folders        where each process stands, for relative paths
    environment    variables of both processes
    only_rank_1    what differs in the configuration of the second process
    break_rank_1   the step after which the second process raises an error of its own
    signal_rank_1  the step after which the second process gets SIGTERM
    other_machine  the second process computes in bfloat16 if the first does not, and the other way round
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import stages.devices
from pipeline.config.train import TrainConfig
from pipeline.train import train
from pipeline.training.data import open_training_data
from pipeline.training.estimate import dry_run
from pipeline.training.events import Saved, StepDone
from pipeline.training.processes import processes_of
from pipeline.training.recipe import Recipe, build_learner
from stages.batches.steps import training_steps
from stages.parallel.processes import gather
from stages.parallel.tensors import whole
from stages.teacher.live import LiveTeacher
from stages.training.optimizer import AdamWSettings, build_optimizer
from stages.training.step import optimizer_step, require_finite_weights, validate
from storage.errors import UsageError


class Shapes(TorchDispatchMode):
    """Keeps the local shape of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.seen.add(tuple((leaf.to_local() if isinstance(leaf, DTensor) else leaf).shape))
        return result


def run(config: TrainConfig, case: Mapping[str, Any], rank: int) -> None:
    events = train(config)
    for event in events:
        if isinstance(event, Saved) and event.step == case.get("stop_after"):
            break
        if isinstance(event, StepDone) and rank == 1 and event.step == case.get("signal_rank_1"):
            signal.raise_signal(signal.SIGTERM)
        if isinstance(event, StepDone) and rank == 1 and event.step == case.get("break_rank_1"):
            events.throw(RuntimeError("something of its own"))  # type: ignore[attr-defined]  # a generator
    events.close()  # type: ignore[attr-defined]


def spoil(config: TrainConfig) -> None:
    """Only the second process holds a weight that is not finite, and only in its own part."""
    with processes_of(config) as processes:
        data = open_training_data(config)
        model = build_learner(config, data, Recipe.of(config, data), processes).student.model
        part = next(weight.to_local() for weight in model.parameters() if isinstance(weight, DTensor))
        if not processes.main:
            with torch.no_grad():
                part.view(-1)[-1] = torch.nan
        require_finite_weights(model, 3)


def gather_empty_parts(config: TrainConfig) -> None:
    """Tensors of one row: the second process has nothing of any of them, and gathers the same ones as the first."""
    with processes_of(config) as processes:
        assert processes.tp is not None
        plain = {name: torch.full((1, 2), float(number)) for number, name in enumerate("abc")}
        cut = {name: distribute_tensor(one, processes.tp, [Shard(0)]) for name, one in plain.items()}
        assert all(one.to_local().numel() == (2 if processes.main else 0) for one in cut.values())
        found = whole(cut | {"tied": cut["b"].detach()}, keep=processes.main)
        if processes.main:
            assert {name: one.tolist() for name, one in found.items() if name != "tied"} == {
                name: one.tolist() for name, one in plain.items()
            }
            assert found["tied"].data_ptr() == found["b"].data_ptr()
        assert gather(len(found)) == [4, 0]


def fail_alone(config: TrainConfig) -> None:
    """The second process is gone when something goes wrong in the main one."""
    with processes_of(config) as processes:
        if processes.main:
            with suppress(RuntimeError):
                gather("until the other is gone")
            processes.on_main(refuse)


def join(config: TrainConfig) -> None:
    """Only joining is hurried: later, a process may wait for another as long as torch allows."""
    with processes_of(config) as processes:
        assert processes.tp is not None
        assert (processes.tp.size(), processes.dp_size, processes.dp_rank) == (2, 1, 0)
        assert processes.main == (dist.get_rank() == 0)
        gloo: Any = processes.tp.get_group("tp")._get_backend(torch.device("cpu"))
        assert gloo.options._timeout == dist.default_pg_timeout


def interrupt_main(config: TrainConfig) -> None:
    """A signal reaches the main process alone, while the other one waits for what it does."""
    with processes_of(config) as processes:
        processes.on_main(lambda: signal.raise_signal(signal.SIGINT))


def refuse() -> None:
    raise UsageError("what went wrong in the main process")


def require_cut(teacher: LiveTeacher | None, rows: int) -> None:
    """This process holds half of each matrix in the teacher's layers, and `rows` rows of its head."""
    assert teacher is not None
    matrices = {name: weight for name, weight in teacher.body.named_parameters() if name.endswith("_proj.weight")}
    assert len(matrices) == 7 * teacher.body.config.num_hidden_layers
    for name, weight in matrices.items():
        assert isinstance(weight, DTensor), f"each process holds all of the teacher's {name}"
        assert 2 * weight.to_local().numel() == weight.numel(), name
    assert isinstance(teacher.weight_VD, DTensor)
    assert len(teacher.weight_VD.to_local()) == rows


def watch(config: TrainConfig) -> None:
    """No process makes a tensor as wide as the vocabulary, and what is communicated is summed, never gathered."""
    with processes_of(config) as processes:
        data = open_training_data(config)
        recipe = Recipe.of(config, data)
        learner = build_learner(config, data, recipe, processes)
        optimizer = build_optimizer(learner.student.model, AdamWSettings(lr=1e-3))
        step = next(training_steps(data.train, recipe.order, recipe.shape))
        rows = len(learner.student.weight_VD)
        first = -(-rows // 2)  # DTensor gives the first process the larger half
        mine = first if processes.main else data.vocab_size - first
        require_cut(learner.teacher, first if processes.main else rows - first)
        with Shapes() as shapes:
            optimizer_step(learner, optimizer, step, lr=1e-3, clip_norm=1.0, number=1)
            validate(learner, step.batches, number=1)
        whole = config.chunk_size * data.vocab_size
        wide = [shape for shape in shapes.seen if len(shape) > 1 and shape[-1] >= data.vocab_size]
        wide += [shape for shape in shapes.seen if len(shape) == 1 and shape[0] >= whole]  # a chunk's flat memory
        assert not wide, f"tensors as wide as the vocabulary of {data.vocab_size} ({rows} rows): {wide}"
        assert any(len(shape) == 2 and shape[1] == mine for shape in shapes.seen), "no chunk of local logits was seen"
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer_step(learner, optimizer, step, lr=1e-3, clip_norm=1.0, number=2)
            validate(learner, step.batches, number=2)
        copies = [weight for weight in learner.student.model.parameters() if not isinstance(weight, DTensor)]
        assert copies, "every weight is cut"
        content = b"".join(weight.detach().numpy().tobytes() for weight in copies)
        processes.require_same(hashlib.sha256(content).hexdigest(), "the weights that each holds whole")
        kinds = {event.key for event in profile.key_averages() if "c10d" in event.key or "gloo" in event.key}
        assert {"c10d::allreduce_", "_c10d_functional::all_reduce"} & kinds, f"no sum in {kinds}"
        assert not any("gather" in kind or "scatter" in kind or "all_to_all" in kind for kind in kinds), kinds


ACTS = {
    "dry run": dry_run,
    "fail alone": fail_alone,
    "gather empty parts": gather_empty_parts,
    "interrupt main": interrupt_main,
    "join": join,
    "spoil": spoil,
    "watch": watch,
}


def do(case: Mapping[str, Any], rank: int) -> None:
    os.environ["MASTER_PORT"] = str(case["port"])
    if "folders" in case:
        os.chdir(case["folders"][rank])
    config = TrainConfig.model_validate(case["config"] | (case.get("only_rank_1", {}) if rank == 1 else {}))
    os.environ |= case.get("environment", {})
    native = stages.devices.has_native_bfloat16
    if rank == 1 and case.get("other_machine"):
        stages.devices.has_native_bfloat16 = lambda device: not native(device)
    try:
        if "act" in case:
            ACTS[case["act"]](config)
        else:
            run(config, case, rank)
    finally:
        stages.devices.has_native_bfloat16 = native
        for name in case.get("environment", {}):
            del os.environ[name]


def main(rank: int, directory: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    outcome: dict[str, tuple[str | None, str]] = {}
    for case in json.loads((directory / "cases.json").read_text()):
        outcome[case["name"]] = None, ""
        try:
            do(case, rank)
        except BaseException as error:
            outcome[case["name"]] = type(error).__name__, f"{error}\n{traceback.format_exc()[-3000:]}"
        (directory / f"{rank}.json").write_text(json.dumps(outcome))
