"""One process of the tensor-parallel tests: `parallel_worker.py RANK DIRECTORY`.

Runs DIRECTORY/cases.json, a list of {name, port, config, stop_after, kill_rank_1}, each as `pipeline train` would in
one of two processes, and writes DIRECTORY/RANK.json: name -> [kind of error or null, message]. Cases `traffic`
watch steps instead.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.config.train import TrainConfig
from pipeline.processes import processes_of
from pipeline.recipe import build_learner, order_of, step_shape
from pipeline.train import Saved, train
from pipeline.training_data import open_training_data
from stages.batches.steps import training_steps
from stages.training.optimizer import AdamWSettings, build_optimizer
from stages.training.step import optimizer_step, validate


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


def run(config: TrainConfig, stop_after: int | None) -> None:
    events = train(config)
    for event in events:
        if isinstance(event, Saved) and event.step == stop_after:
            break
    events.close()  # type: ignore[attr-defined]  # a generator


def watch(config: TrainConfig) -> None:
    """No process makes a tensor as wide as the vocabulary, and what is communicated is summed, never gathered."""
    with processes_of(config) as processes:
        data = open_training_data(config)
        learner = build_learner(config, data, processes)
        optimizer = build_optimizer(learner.student.model, AdamWSettings(lr=1e-3))
        step = next(training_steps(data.train, order_of(config, data), step_shape(config, data, torch.device("cpu"))))
        rows = len(learner.student.weight_VD)
        first = -(-rows // 2)  # DTensor gives the first process the larger half
        mine = first if processes.main else data.vocab_size - first
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


def main(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    outcome: dict[str, tuple[str | None, str]] = {}
    for case in json.loads((directory / "cases.json").read_text()):
        os.environ["MASTER_PORT"] = str(case["port"])
        content = case["config"] | case.get(f"only_rank_{rank}", {})
        outcome[case["name"]] = None, ""
        if rank == 1 and "kill_rank_1" in case:
            os.environ["TOPK_DISTILL_FAULT"] = case["kill_rank_1"]
        try:
            config = TrainConfig.model_validate(content)
            if case["name"].startswith("traffic"):
                watch(config)
            else:
                run(config, case.get("stop_after"))
        except BaseException as error:
            outcome[case["name"]] = type(error).__name__, f"{error}\n{traceback.format_exc()[-3000:]}"
        (directory / f"{rank}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
