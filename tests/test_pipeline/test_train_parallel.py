"""pipeline.train with `distributed: {tp: 2}`: two gloo processes are one student, to the rounding of float32.

The processes start once for all cases, see parallel_worker.py; torchrun starts one more run, of the real command.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import parallel_worker
import pytest
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM, PhiConfig, Qwen3Config
from warm_process import WarmProcess, pipeline, wait_for_all

from pipeline.config.train import TrainConfig
from pipeline.train import train
from pipeline.training.events import Finished, Saved, Started
from stages.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
VALUES = ("loss", "kd", "ce", "grad_norm")
SHAPE = {"num_hidden_layers": 2, "initializer_range": 0.1}
ODD = {**SHAPE, "vocab_size": 515, "tie_word_embeddings": True}  # 515 rows: 258 and 257

Outcomes = list[dict[str, list[str | None]]]


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
    content: Callable[..., dict[str, Any]],
    tiny_store: Path,
    tiny_teacher_dir: Path,
    tiny_tokenizer_dir: Path,
    tmp_path_factory: Any,
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
    # Each process would get a half of a matrix that is two: the plan is wrong, and all shapes fit.
    wrong = {"base_model_tp_plan": {"layers.*.mlp.gate_up_proj": "colwise", "layers.*.mlp.down_proj": "rowwise"}}
    halves = Phi3Config(vocab_size=512, pad_token_id=2, eos_token_id=1, **SHAPE, **shape)
    shutil.copytree(tiny_tokenizer_dir, place / "phi3")
    Phi3ForCausalLM(halves).save_pretrained(place / "phi3")
    (place / "phi3" / "config.json").write_text(json.dumps(halves.to_dict() | wrong))
    phi3 = {"init": "pretrained", "path": str(place / "phi3")}
    jsd = {"divergence": "jsd(0.3)", "temperature": 2.0}
    elsewhere = [{"source": "jsonl", "path": "corpus.jsonl"}]
    pretrained = {"init": "layers_of_teacher", "path": str(tiny_teacher_dir), "layers": 2}
    chosen = {
        "tied, odd vocabulary": content(place / "tied"),
        "untied, jsd": content(place / "untied", student=untied, loss=jsd, clip_norm=0.5),
        "norms of query and key": content(place / "qwen3-run", student=qwen3, loss={"divergence": "reverse_kl"}),
        "store": content(place / "store", store=str(tiny_store), student=pretrained, **stored),
        "cross-entropy alone": content(place / "ce", kd_ratio=0.0, clip_norm=None),
        "begun alone": content(place / "begun-alone"),
        "begun together": content(place / "begun-together"),
        "a signal to one": content(place / "signal", checkpoint={"every": "10 min"}),
        "after a signal to one": content(place / "signal", checkpoint={"every": "10 min"}),
        "bfloat16": content(place / "bfloat16", dtype="bfloat16"),
        "traffic": content(place / "traffic", loss=jsd),
        "traffic, untied": content(place / "traffic", student=untied),
        "empty parts": content(place / "traffic"),
        "one part is not finite": content(place / "traffic"),
        "an error of its own": content(place / "broken"),
        "an error without the other": content(place / "broken"),
        "three heads": content(place / "three", student=three),
        "gradients of a part": content(place / "phi-run", student=phi),
        "hidden states of a part": content(place / "phi3-run", student=phi3),
        "foreign run directory": content(place / "tied", seed=5),
        "another configuration": content(place / "another"),
        "another machine": content(place / "another", dtype="auto"),
        "another machine for the teacher": content(
            place / "another", teacher_model={"path": str(tiny_teacher_dir), "dtype": "auto"}
        ),
        "another order of keys": content(place / "another"),
        "an interruption of the main process": content(place / "another"),
        "no such interface": content(place / "another"),
        "too many processes": content(place / "another", distributed={"tp": 1}),
        "another corpus": content(place / "another", corpus=elsewhere),
        "another corpus, dry run": content(place / "another", corpus=elsewhere),
    }
    return {name: {"name": name, "config": config} for name, config in chosen.items()}


def alone(config: dict[str, Any], run: Path) -> Path:
    list(train(TrainConfig.model_validate({**config, "run": run, "distributed": {"tp": 1}})))
    return run


def stop_after_checkpoint(config: dict[str, Any], step: int) -> None:
    events = train(TrainConfig.model_validate({**config, "distributed": {"tp": 1}}))
    next(event for event in events if isinstance(event, Saved) and event.step == step)
    events.close()  # type: ignore[attr-defined]  # a generator


@pytest.fixture(scope="module")
def outcomes(cases: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What each process reports, by rank."""
    directory = tmp_path_factory.mktemp("workers")
    for case, port in zip(cases.values(), free_ports(len(cases)), strict=True):
        case["port"] = port
    stop_after_checkpoint(cases["begun alone"]["config"], 4)
    cases["begun together"]["stop_after"] = 4
    cases["a signal to one"]["signal_rank_1"] = 5
    cases["empty parts"]["act"] = "gather empty parts"
    cases["one part is not finite"]["act"] = "spoil"
    cases["an error of its own"]["break_rank_1"] = 3
    cases["an error without the other"]["act"] = "fail alone"
    cases["another configuration"]["only_rank_1"] = {"seed": 5, "distributed": {"tp": 3}}
    for name in ("another machine", "another machine for the teacher"):
        cases[name]["other_machine"] = True
    backwards = dict(reversed(ODD.items()))
    student = cases["another order of keys"]["config"]["student"] | {"overrides": backwards}
    cases["another order of keys"] |= {"act": "join", "only_rank_1": {"student": student}}
    cases["an interruption of the main process"]["act"] = "interrupt main"
    cases["no such interface"] |= {"act": "join", "environment": {"GLOO_SOCKET_IFNAME": "nowhere7"}}
    cases["another corpus, dry run"]["act"] = "dry run"
    folders = [directory / "first", directory / "second"]
    for folder in folders:
        folder.mkdir()
        (folder / "corpus.jsonl").write_text(
            '{"text": "What the process of this folder reads."}\n' * (40 + len(folder.name))
        )
    for name in ("another corpus", "another corpus, dry run"):
        cases[name]["folders"] = [str(folder) for folder in folders]
    for name in ("traffic", "traffic, untied"):
        cases[name]["act"] = "watch"
    (directory / "cases.json").write_text(json.dumps(list(cases.values())))
    told = wait_for_all([WarmProcess(parallel_worker.main, rank, directory) for rank in range(2)])
    errors = [one.stderr[-3000:] for one in told]
    missing = [rank for rank in range(2) if not (directory / f"{rank}.json").exists()]
    assert not missing, f"processes {missing} left no report: {errors}"
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(2)]


def require_equal_curves(run: Path, reference: Path, *, rel: float = 1e-5) -> None:
    ours, theirs = read_metrics(run / "metrics.jsonl"), read_metrics(reference / "metrics.jsonl")
    assert [(line["event"], line["step"]) for line in ours] == [(line["event"], line["step"]) for line in theirs]
    assert len(ours) == 12
    for found, expected in zip(ours, theirs, strict=True):
        for name in VALUES:
            if expected.get(name) is None:
                assert found.get(name) is None
                continue
            assert found.get(name) == pytest.approx(expected.get(name), rel=rel), (found["step"], name)


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


def test_a_signal_to_one_process_saves_all_of_them_at_the_next_step(
    cases: dict[str, dict[str, Any]], outcomes: Outcomes
) -> None:
    for outcome, by in zip(outcomes, ("in another process", "by SIGTERM"), strict=True):
        kind, message = outcome["a signal to one"]
        assert (kind, str(message).split(",")[0]) == ("StoppedError", f"stopped {by} after step 6"), message
        assert outcome["after a signal to one"] == [None, ""]
    run = Path(cases["a signal to one"]["config"]["run"])
    assert sorted(path.name for path in run.glob("checkpoints/step-*")) == ["step-00000006", "step-00000010"]
    undisturbed = Path(cases["tied, odd vocabulary"]["config"]["run"])
    weights = [(path / "model" / "model.safetensors").read_bytes() for path in (run, undisturbed)]
    assert weights[0] == weights[1]
    require_equal_curves(run, undisturbed, rel=0.0)


def test_a_checkpoint_of_two_processes_has_the_same_tensors_as_of_one(
    cases: dict[str, dict[str, Any]], outcomes: Outcomes
) -> None:
    for file in ("model.safetensors", "optimizer.safetensors", "random.safetensors"):
        shapes = []
        for name in ("begun alone", "begun together"):
            tensors = load_file(Path(cases[name]["config"]["run"]) / "checkpoints" / "step-00000004" / file)
            shapes.append({key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()})
        assert shapes[0] == shapes[1]


def test_bfloat16_agrees_to_its_rounding(cases: dict[str, dict[str, Any]], outcomes: Outcomes, tmp_path: Path) -> None:
    config = cases["bfloat16"]["config"]
    assert [outcome["bfloat16"] for outcome in outcomes] == [[None, ""]] * 2
    require_equal_curves(Path(config["run"]), alone(config, tmp_path / "alone"), rel=1e-2)


def test_empty_parts_are_put_together(outcomes: Outcomes) -> None:
    assert [outcome["empty parts"] for outcome in outcomes] == [[None, ""]] * 2


def test_an_error_of_one_process_ends_the_other(outcomes: Outcomes) -> None:
    first, second = (outcome["an error of its own"] for outcome in outcomes)
    assert (first[0], second[0]) == ("PeerLostError", "RuntimeError"), outcomes
    assert "another process of this run has ended or cannot be reached: " in str(first[1])
    assert "something of its own" in str(second[1])
    (kind, message), second = (outcome["an error without the other"] for outcome in outcomes)
    assert (kind, second) == ("UsageError", [None, ""]), message
    assert "what went wrong in the main process" in str(message)


def test_the_order_of_keys_is_no_difference(outcomes: Outcomes) -> None:
    assert [outcome["another order of keys"] for outcome in outcomes] == [[None, ""]] * 2


def test_an_interruption_of_the_main_process_is_no_bug_in_the_other(outcomes: Outcomes) -> None:
    first, second = (outcome["an interruption of the main process"] for outcome in outcomes)
    assert (first[0], second[0]) == ("KeyboardInterrupt", "PeerLostError"), outcomes
    assert "rank 0 was interrupted" in str(second[1])


@pytest.mark.parametrize("name", ["traffic", "traffic, untied"])
def test_the_vocabulary_is_never_whole_and_copies_stay_equal(name: str, outcomes: Outcomes) -> None:
    assert [outcome[name] for outcome in outcomes] == [[None, ""]] * 2


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("three heads", "UsageError", "has 3 attention heads, which 2 processes cannot share evenly"),
        ("hidden states of a part", "UsageError", "something else when it is cut (hidden states change by"),
        ("one part is not finite", "NumericsError", "has a weight that is NaN or infinite after step 3"),
        (
            "another configuration",
            "UsageError",
            'seed is 0 on rank 0, 5 on rank 1; distributed is {"dp_replicate": 1, "dp_shard": "auto", "tp": 2} on rank '
            '0, {"dp_replicate": 1, "dp_shard": "auto", "tp": 3} on rank 1',
        ),
        ("another machine", "UsageError", "auto is not the same everywhere: dtype is"),
        ("another machine for the teacher", "UsageError", "auto is not the same everywhere: teacher_model.dtype is"),
        ("no such interface", "UsageError", "this process cannot join the others: ifa != nullptr. Unable to find"),
        ("too many processes", "UsageError", "distributed.tp is 1, but there are 2 processes"),
        ("another corpus, dry run", "IdentityError", "the processes differ in what they learn from"),
        ("gradients of a part", "UsageError", "PhiForCausalLM computes something else when it is cut (the gradient of"),
        ("foreign run directory", "IdentityError", "seed: 0 -> 5"),
        ("another corpus", "IdentityError", "the processes differ in what they learn from"),
    ],
)
def test_errors_reach_every_process(name: str, kind: str, words: str, outcomes: Outcomes) -> None:
    for outcome in outcomes:
        found, message = outcome[name]
        assert found == kind, message
        assert words in str(message)


def test_torchrun_and_the_command_line(
    content: Callable[..., dict[str, Any]], cases: dict[str, dict[str, Any]], outcomes: Outcomes, tmp_path: Path
) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(content(tmp_path / "run")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pipeline"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, "train", str(config)], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("10 steps, ") == 1
    assert done.stderr.count("report ") == 1
    require_equal_curves(tmp_path / "run", Path(cases["tied, odd vocabulary"]["config"]["run"]))


def test_torchrun_ends_with_the_error_of_a_process(tmp_path: Path) -> None:
    """What it adds of its own stands before it: a traceback of the launcher, which no process of it can prevent."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "pipeline"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, "train", str(tmp_path / "absent.yaml")],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 1
    report = done.stderr.partition("Root Cause")[2]
    for line in (
        "error: there is no such configuration file",
        f"where: {tmp_path / 'absent.yaml'}",
        "fix: pipeline init",
    ):
        assert line in report
    assert "traceback : To enable" not in done.stderr


@pytest.mark.parametrize(("rank", "point"), [(1, "optimizer-step:7"), (0, "checkpoint-write:2")])
def test_when_one_process_is_killed_the_other_ends_and_the_run_goes_on(
    rank: int,
    point: str,
    content: Callable[..., dict[str, Any]],
    cases: dict[str, dict[str, Any]],
    outcomes: Outcomes,
    tmp_path: Path,
) -> None:
    config = content(tmp_path / "run")
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    own = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    ranks = [own | {"RANK": str(number), "LOCAL_RANK": str(number)} for number in range(2)]
    ranks[rank]["TOPK_DISTILL_FAULT"] = point
    told = wait_for_all([WarmProcess(pipeline, "train", tmp_path / "train.yaml", environment=one) for one in ranks])
    assert told[rank].returncode == -signal.SIGKILL
    survivor = told[1 - rank]
    assert survivor.returncode == 75, survivor.stderr
    what, where, fix = survivor.stderr.splitlines()[-3:]
    assert what.startswith("error: another process of this run has ended or cannot be reached: ")
    assert where == "where: pipeline train"
    assert "the same command goes on from the newest checkpoint" in fix
    started, *_ = train(TrainConfig.model_validate({**config, "distributed": {"tp": 1}}))
    assert isinstance(started, Started)
    assert started.step == 4
    require_equal_curves(tmp_path / "run", Path(cases["tied, odd vocabulary"]["config"]["run"]))


def test_a_finished_run_says_so_whatever_the_number_of_processes(
    cases: dict[str, dict[str, Any]], outcomes: Outcomes, tmp_path: Path
) -> None:
    config = cases["tied, odd vocabulary"]["config"]
    shutil.copytree(config["run"], tmp_path / "run")
    (event,) = train(TrainConfig.model_validate({**config, "run": tmp_path / "run", "distributed": {"tp": 1}}))
    assert isinstance(event, Finished)
    assert event.already
