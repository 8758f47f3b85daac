"""pipeline.train with `distributed: {tp: 2}`: two gloo processes are one student, to the rounding of float32.

The processes start once for all cases, see parallel_worker.py; torchrun itself starts one more run.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PhiConfig, Qwen3Config

from pipeline.config.train import TrainConfig
from pipeline.train import Finished, Saved, Started, train
from stages.training.metrics import read_metrics
from storage.errors import UsageError

ROOT = Path(__file__).parents[2]
VALUES = ("loss", "kd", "ce", "grad_norm")
SHAPE = {"num_hidden_layers": 2, "initializer_range": 0.1}
ODD = {**SHAPE, "vocab_size": 515, "tie_word_embeddings": True}  # 515 rows: 258 and 257

Outcomes = list[dict[str, list[str | None]]]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for place in sockets:
            place.bind(("127.0.0.1", 0))
        return [place.getsockname()[1] for place in sockets]
    finally:
        for place in sockets:
            place.close()


@pytest.fixture(scope="module")
def content(tiny_teacher_dir: Path, tiny_corpus: Path) -> Callable[..., dict[str, Any]]:
    """An online configuration of ten steps, as plain values."""

    def make(run: Path, **changes: Any) -> dict[str, Any]:
        values = {
            "teacher_model": {"path": str(tiny_teacher_dir), "dtype": "float32"},
            "corpus": [{"source": "jsonl", "path": str(tiny_corpus)}],
            "rendering": {"window": 64, "overlap": 8},
            "heldout": {"fraction": 0.15},
            "run": str(run),
            "student": {"init": "from_config", "path": str(tiny_teacher_dir), "overrides": ODD},
            "steps": 10,
            "tokens_per_step": 256,
            "tokens_per_batch": 128,
            "chunk_size": 32,
            "dtype": "float32",
            "device": "cpu",
            "optimizer": {"lr": 1e-3},
            "checkpoint": {"every": 4, "keep": 9},
            "validation": {"every": 5, "sequences": 4},
            "distributed": {"tp": 2},
            **changes,
        }
        return {key: value for key, value in values.items() if value is not None}

    return make


@pytest.fixture(scope="module")
def cases(
    content: Callable[..., dict[str, Any]], tiny_store: Path, tiny_teacher_dir: Path, tmp_path_factory: Any
) -> dict[str, dict[str, Any]]:
    """Name -> what both processes run. Where a run is to equal a single process, that one comes from `alone`."""
    place = tmp_path_factory.mktemp("runs")
    stored = dict.fromkeys(("teacher_model", "corpus", "rendering", "heldout"), None)
    untied = {"init": "from_config", "path": str(tiny_teacher_dir), "overrides": SHAPE}
    three = {**untied, "overrides": {**SHAPE, "num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 48}}
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    Qwen3Config(vocab_size=512, head_dim=8, **SHAPE, **shape).save_pretrained(place / "qwen3")
    qwen3 = {"init": "from_config", "path": str(place / "qwen3" / "config.json")}
    PhiConfig(vocab_size=512, qk_layernorm=True, resid_pdrop=0.0, **SHAPE, **shape).save_pretrained(place / "phi")
    phi = {"init": "from_config", "path": str(place / "phi" / "config.json")}
    jsd = {"divergence": "jsd(0.3)", "temperature": 2.0}
    pretrained = {"init": "layers_of_teacher", "path": str(tiny_teacher_dir), "layers": 2}
    chosen = {
        "tied, odd vocabulary": content(place / "tied"),
        "untied, jsd": content(place / "untied", student=untied, loss=jsd, clip_norm=0.5),
        "norms of query and key": content(place / "qwen3-run", student=qwen3, loss={"divergence": "reverse_kl"}),
        "store": content(place / "store", store=str(tiny_store), student=pretrained, **stored),
        "cross-entropy alone": content(place / "ce", kd_ratio=0.0, clip_norm=None),
        "begun alone": content(place / "begun-alone"),
        "begun together": content(place / "begun-together"),
        "traffic": content(place / "traffic", loss=jsd),
        "traffic, untied": content(place / "traffic", student=untied),
        "three heads": content(place / "three", student=three),
        "gradients of a part": content(place / "phi-run", student=phi),
        "foreign run directory": content(place / "tied", seed=5),
        "another corpus": content(place / "another"),
        "killed": content(place / "killed"),  # the last: its second process does not live on
    }
    return {name: {"name": name, "config": config} for name, config in chosen.items()}


def alone(config: dict[str, Any], run: Path) -> Path:
    list(train(TrainConfig.model_validate({**config, "run": run, "distributed": {"tp": 1}})))
    return run


def stop_after_checkpoint(config: dict[str, Any], step: int) -> None:
    events = train(TrainConfig.model_validate({**config, "distributed": {"tp": 1}}))
    next(event for event in events if isinstance(event, Saved) and event.step == step)
    events.close()  # type: ignore[attr-defined]  # a generator


def start(directory: Path) -> list[str]:
    """Run the worker in two processes, and return what they wrote to stderr."""
    command = [sys.executable, str(Path(__file__).parent / "parallel_worker.py")]
    processes = [
        subprocess.Popen([*command, str(rank), str(directory)], env=environment(), stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        return [process.communicate(timeout=240)[1][-3000:] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()


@pytest.fixture(scope="module")
def outcomes(cases: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What each process reports, by rank."""
    directory = tmp_path_factory.mktemp("workers")
    for case, port in zip(cases.values(), free_ports(len(cases)), strict=True):
        case["port"] = port
    stop_after_checkpoint(cases["begun alone"]["config"], 4)
    cases["begun together"]["stop_after"] = 4
    (directory / "short.jsonl").write_text('{"text": "One document that the other process does not read."}\n' * 40)
    cases["another corpus"]["only_rank_1"] = {"corpus": [{"source": "jsonl", "path": str(directory / "short.jsonl")}]}
    cases["killed"]["kill_rank_1"] = "optimizer-step:7"
    (directory / "cases.json").write_text(json.dumps(list(cases.values())))
    errors = start(directory)
    missing = [rank for rank in range(2) if not (directory / f"{rank}.json").exists()]
    assert not missing, f"processes {missing} left no report: {errors}"
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(2)]


def require_equal_curves(run: Path, reference: Path) -> None:
    ours, theirs = read_metrics(run / "metrics.jsonl"), read_metrics(reference / "metrics.jsonl")
    assert [(line["event"], line["step"]) for line in ours] == [(line["event"], line["step"]) for line in theirs]
    assert len(ours) == 12
    for found, expected in zip(ours, theirs, strict=True):
        for name in VALUES:
            if expected.get(name) is None:
                assert found.get(name) is None
                continue
            assert found.get(name) == pytest.approx(expected.get(name), rel=1e-5), (found["step"], name)


@pytest.mark.parametrize(
    "name", ["tied, odd vocabulary", "untied, jsd", "norms of query and key", "store", "cross-entropy alone"]
)
def test_two_processes_equal_one(
    name: str, cases: dict[str, dict[str, Any]], outcomes: Outcomes, tmp_path: Path
) -> None:
    assert [outcome[name] for outcome in outcomes] == [[None, ""]] * 2
    config = cases[name]["config"]
    run, reference = Path(config["run"]), alone(config, tmp_path / "alone")
    require_equal_curves(run, reference)
    for path in ("model/model.safetensors", "checkpoints/step-00000010/model.safetensors"):
        ours, theirs = load_file(run / path), load_file(reference / path)
        assert ours.keys() == theirs.keys()
        for key, weight in ours.items():
            # Of the whole: where a gradient is almost 0, Adam makes a step of its rounding.
            assert float((weight - theirs[key]).norm()) <= 1e-4 * float(theirs[key].norm()), key
    for path in ("model/config.json", "model/README.md"):
        assert (run / path).read_text() == (reference / path).read_text()
    AutoModelForCausalLM.from_pretrained(run / "model")


def test_a_run_goes_on_with_another_number_of_processes(
    cases: dict[str, dict[str, Any]], outcomes: Outcomes, tmp_path: Path
) -> None:
    reference = alone(cases["tied, odd vocabulary"]["config"], tmp_path / "alone")
    for name in ("begun alone", "begun together"):
        assert [outcome[name] for outcome in outcomes] == [[None, ""]] * 2
    together = TrainConfig.model_validate({**cases["begun together"]["config"], "distributed": {"tp": 1}})
    started, *_, finished = train(together)
    assert isinstance(started, Started)
    assert isinstance(finished, Finished)
    assert started.step == 4
    for name in ("begun alone", "begun together"):
        require_equal_curves(Path(cases[name]["config"]["run"]), reference)


def test_a_checkpoint_of_two_processes_has_the_same_tensors_as_of_one(
    cases: dict[str, dict[str, Any]], outcomes: Outcomes
) -> None:
    for file in ("model.safetensors", "optimizer.safetensors", "random.safetensors"):
        shapes = []
        for name in ("begun alone", "begun together"):
            tensors = load_file(Path(cases[name]["config"]["run"]) / "checkpoints" / "step-00000004" / file)
            shapes.append({key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()})
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", ["traffic", "traffic, untied"])
def test_the_vocabulary_is_never_whole_and_copies_stay_equal(name: str, outcomes: Outcomes) -> None:
    assert [outcome[name] for outcome in outcomes] == [[None, ""]] * 2


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("three heads", "UsageError", "has 3 attention heads, which 2 processes cannot share evenly"),
        ("gradients of a part", "UsageError", "PhiForCausalLM computes something else when it is cut (the gradient of"),
        ("foreign run directory", "IdentityError", "seed: 0 -> 5"),
        ("another corpus", "IdentityError", "the processes differ in what they learn from"),
    ],
)
def test_refusals_reach_every_process(name: str, kind: str, words: str, outcomes: Outcomes) -> None:
    for outcome in outcomes:
        found, message = outcome[name]
        assert found == kind, message
        assert words in str(message)


def test_the_number_of_processes_must_be_right(
    content: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"distributed\.tp is 2, but there is 1 process") as caught:
        list(train(TrainConfig.model_validate(content(tmp_path / "run"))))
    assert "torchrun --nproc-per-node 2 -m pipeline train" in str(caught.value.fix)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match=r"distributed\.tp is 1, but there are 3 processes") as caught:
        list(train(TrainConfig.model_validate(content(tmp_path / "run", distributed={"tp": 1}))))
    assert "distributed: {tp: 3}" in str(caught.value.fix)
    assert not (tmp_path / "run").exists()


def test_torchrun_and_the_command_line(
    content: Callable[..., dict[str, Any]], cases: dict[str, dict[str, Any]], outcomes: Outcomes, tmp_path: Path
) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(content(tmp_path / "run")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pipeline"]
    done = subprocess.run(
        [*command, "train", str(config)], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("10 steps, ") == 1
    assert done.stderr.count("report ") == 1
    require_equal_curves(tmp_path / "run", Path(cases["tied, odd vocabulary"]["config"]["run"]))


def test_when_one_process_dies_the_other_ends_and_the_run_goes_on(
    cases: dict[str, dict[str, Any]], outcomes: Outcomes
) -> None:
    config = cases["killed"]["config"]
    assert "killed" not in outcomes[1]
    kind, message = outcomes[0]["killed"]
    assert kind == "KeyboardInterrupt", message
    assert "another process of this run has ended" in str(message)
    started, *_ = train(TrainConfig.model_validate({**config, "distributed": {"tp": 1}}))
    assert isinstance(started, Started)
    assert started.step == 4
    require_equal_curves(Path(config["run"]), Path(cases["tied, odd vocabulary"]["config"]["run"]))


def test_a_finished_run_says_so_whatever_the_number_of_processes(
    cases: dict[str, dict[str, Any]], outcomes: Outcomes, tmp_path: Path
) -> None:
    config = cases["tied, odd vocabulary"]["config"]
    shutil.copytree(config["run"], tmp_path / "run")
    (event,) = train(TrainConfig.model_validate({**config, "run": tmp_path / "run", "distributed": {"tp": 1}}))
    assert isinstance(event, Finished)
    assert event.already
