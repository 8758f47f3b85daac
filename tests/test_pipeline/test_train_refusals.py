"""What pipeline.train refuses before the first step, and what a damaged or prolonged run does."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from pipeline.cli import main
from pipeline.config.extract import ExtractConfig
from pipeline.config.train import TrainConfig
from pipeline.extract import extract
from pipeline.train import train
from pipeline.training.estimate import dry_run
from pipeline.training.events import Finished, Saved, Started, StepDone
from stages.training.run import RunDirectory
from storage.errors import CorruptionError, IdentityError, NumericsError, UsageError
from storage.reader import StoreReader

MakeConfig = Callable[..., TrainConfig]
SMALL = {"steps": 1, "tokens_per_step": 128, "dtype": "float32", "device": "cpu", "validation": {"sequences": 4}}


@pytest.fixture
def configure(tiny_store: Path, tiny_teacher_dir: Path, tmp_path: Path) -> MakeConfig:
    """A configuration of one layer and one small step, with changes."""

    def make(**changes: Any) -> TrainConfig:
        student = {"init": "layers_of_teacher", "path": str(tiny_teacher_dir), "layers": 1}
        return TrainConfig.model_validate(
            {"store": tiny_store, "run": tmp_path / "run", "student": student, **SMALL, **changes}
        )

    return make


@pytest.fixture(scope="module")
def exact_store(tiny_extraction: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of heads without samples."""
    path = tmp_path_factory.mktemp("exact") / "store"
    target = {"kind": "topk", "k": 8}
    list(extract(ExtractConfig.model_validate({**tiny_extraction, "target": target, "store": path})))
    return path


@pytest.mark.parametrize(
    ("loss", "where", "fix"),
    [
        ({"temperature": 2.0}, "loss.temperature", "renormalize or renormalize_both"),
        ({"temperature": 2.0, "tail": "sampled"}, "loss.temperature", "set loss.temperature: 1.0"),
        ({"temperature": 2.0, "divergence": "jsd"}, "loss.temperature", "loss.tail: renormalize_both"),
        ({"target_logits_scale": 2.0}, "loss.target_logits_scale", "set loss.target_logits_scale: 1.0"),
        ({"temperature": 2.0, "tail": "residual_to_label"}, "loss.temperature", ""),
        ({"temperature": 3.0, "target_logits_scale": 2.0}, "loss.temperature", "set loss.temperature: 2.0"),
    ],
)
@pytest.mark.filterwarnings("ignore:tail=.*biased gradient")
def test_a_temperature_that_the_store_does_not_hold_is_refused(
    loss: dict[str, Any], where: str, fix: str, configure: MakeConfig
) -> None:
    with pytest.raises(UsageError, match=r"the rows hold no|do not hold") as caught:
        list(train(configure(loss=loss)))
    assert caught.value.where == where
    assert fix in (caught.value.fix or "")


@pytest.mark.parametrize(
    "loss",
    [
        {"divergence": "jsd"},
        {"temperature": 2.0, "target_logits_scale": 2.0},
        {"temperature": 2.0, "tail": "renormalize"},
        {"temperature": 2.0, "tail": "renormalize_both", "divergence": "jsd"},
    ],
)
@pytest.mark.filterwarnings("ignore:tail=.*biased gradient")
def test_what_needs_no_stored_tail_trains(loss: dict[str, Any], configure: MakeConfig) -> None:
    assert isinstance(list(train(configure(loss=loss)))[-1], Finished)


def test_a_student_with_too_few_positions_is_refused(configure: MakeConfig, tiny_teacher_dir: Path) -> None:
    overrides = {"max_position_embeddings": 16}
    student = {"init": "from_config", "path": str(tiny_teacher_dir), "overrides": overrides}
    with pytest.raises(UsageError, match="the student knows 16 positions") as caught:
        list(train(configure(student=student)))
    assert caught.value.where == "student.path"


def test_a_student_with_another_tokenizer_is_refused(
    configure: MakeConfig, tiny_teacher_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_teacher_dir, tmp_path / "student")
    tokenizer = tmp_path / "student" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"<pad>"', '"<gap>"'))
    with pytest.raises(IdentityError, match="not the teacher's: id 2") as caught:
        list(train(configure(student={"init": "pretrained", "path": str(tmp_path / "student")})))
    assert str(caught.value.where).startswith(f"student.path: {tmp_path / 'student'}")


@pytest.mark.parametrize(
    ("student", "where"),
    [
        ({"init": "from_config", "overrides": {"width": 16}}, "student.overrides"),
        ({"init": "from_config", "overrides": {"vocab_size": 16}}, "student"),
        ({"init": "layers_of_teacher", "layers": 99}, "student.layers"),
        ({"init": "pretrained", "path": "/no/such/model"}, "student.path: /no/such/model"),
    ],
)
def test_a_student_that_cannot_be_is_told_with_its_key(
    student: dict[str, Any], where: str, configure: MakeConfig, tiny_teacher_dir: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        list(train(configure(student={"path": str(tiny_teacher_dir), **student})))
    assert caught.value.where == where


@pytest.mark.parametrize("learn", [lambda config: next(train(config)), dry_run], ids=["train", "dry run"])
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"model_type": "mixtral", "num_local_experts": 4, "router_aux_loss_coef": 0.02},
            "(router_aux_loss_coef 0.02)",
        ),
        ({"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}, "4 experts"),
        ({"model_type": "llama"}, None),
    ],
)
def test_experts_that_nothing_balances_are_told(
    learn: Callable[[TrainConfig], object],
    fields: dict[str, Any],
    words: str | None,
    configure: MakeConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(sizes | heads | fields))
    learn(configure(student={"init": "from_config", "path": str(tmp_path / "config.json")}))
    if words is None:
        assert not caplog.text
    else:
        assert "whose balancing loss" in caplog.text
        assert words in caplog.text


def test_samples_that_the_store_does_not_hold_are_refused(exact_store: Path, configure: MakeConfig) -> None:
    with pytest.raises(UsageError, match="no tail samples") as caught:
        list(train(configure(store=exact_store, loss={"tail": "sampled"})))
    assert caught.value.where == "loss.tail"
    list(train(configure(store=exact_store)))


def test_the_loss_of_the_teacher_is_not_judged_where_it_takes_no_part(configure: MakeConfig) -> None:
    list(train(configure(loss={"temperature": 2.0}, kd_ratio=0.0)))


@pytest.mark.parametrize("heldout", [True, False])
def test_weights_out_of_range_are_never_saved(heldout: bool, configure: MakeConfig, tmp_path: Path) -> None:
    every = {"every": 1 if heldout else 100, "sequences": 4}
    optimizer = {"lr": 1e38, "weight_decay": 1.0}
    config = configure(optimizer=optimizer, steps=2, checkpoint={"every": 1}, validation=every)
    with pytest.raises(NumericsError, match="held-out loss is" if heldout else "has a weight that is") as caught:
        list(train(config))
    assert caught.value.exit_code == 7
    assert not (tmp_path / "run" / "model").exists()
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def stop_at(config: TrainConfig, step: int) -> int:
    """Train until the checkpoint of a step is saved; the step at which this began."""
    events = train(config)
    started = next(events)
    list(takewhile(lambda event: not isinstance(event, Saved) or event.step < step, events))
    events.close()  # type: ignore[attr-defined]  # a generator
    assert isinstance(started, Started)
    return started.step


def test_prolonging_is_judged_by_what_was_run_last(configure: MakeConfig) -> None:
    common = {"schedule": {"kind": "wsd", "decay_steps": 2}, "checkpoint": {"every": 2}}
    short, long = configure(steps=6, **common), configure(steps=12, **common)
    assert stop_at(short, 2) == 0
    assert stop_at(long, 6) == 2
    assert stop_at(long, 8) == 6
    with pytest.raises(IdentityError, match="6 steps are fewer than the 8 steps done"):
        list(train(short))


def test_a_decay_that_was_run_is_not_forgotten(configure: MakeConfig) -> None:
    common = {"schedule": {"kind": "wsd", "decay_steps": 3}, "checkpoint": {"every": 2}}
    long, short = configure(steps=12, **common), configure(steps=6, **common)
    assert stop_at(long, 2) == 0
    assert stop_at(short, 6) == 2
    with pytest.raises(IdentityError, match="learning rates of the 6 steps done: step 5 had"):
        list(train(long))


CONSTANT = {"schedule": {"kind": "constant"}, "steps": 4, "checkpoint": {"every": 3}}


def lose(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)


def damage(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"")


@pytest.mark.parametrize("fault", [lose, damage])
@pytest.mark.parametrize("steps", [2, 6])
def test_a_finished_run_without_a_checkpoint_is_not_trained_anew(
    fault: Callable[[Path], None], steps: int, configure: MakeConfig
) -> None:
    config = configure(**CONSTANT)
    list(train(config))
    files = [config.run / "metrics.jsonl", config.run / "model" / "model.safetensors"]
    before = [file.read_bytes() for file in files]
    for checkpoint in config.run.glob("checkpoints/*"):
        fault(checkpoint)
    with pytest.raises(IdentityError, match="the run finished at step 4, but no whole checkpoint is left") as caught:
        list(train(configure(**CONSTANT | {"steps": steps})))
    assert caught.value.where == str(config.run / "checkpoints")
    assert [file.read_bytes() for file in files] == before
    (again,) = train(config)
    assert isinstance(again, Finished)
    shutil.rmtree(config.run / "model")
    with pytest.raises(IdentityError, match="no whole checkpoint is left"):
        list(train(config))
    assert files[0].read_bytes() == before[0]


def test_a_finished_run_goes_on_from_an_older_checkpoint_but_never_back(configure: MakeConfig) -> None:
    list(train(configure(**CONSTANT)))
    lose(configure().run / "checkpoints" / "step-00000004")
    with pytest.raises(IdentityError, match="3 steps are fewer than the 4 steps done"):
        list(train(configure(**CONSTANT | {"steps": 3})))
    started, *_, ended = train(configure(**CONSTANT | {"steps": 5}))
    assert isinstance(started, Started)
    assert isinstance(ended, Finished)
    assert (started.step, ended.step) == (3, 5)


def test_a_finished_run_whose_weights_are_gone_saves_them_again(configure: MakeConfig) -> None:
    config = configure(**CONSTANT)
    list(train(config))
    weights = config.run / "model" / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    assert [type(event) for event in train(config)] == [Started, Finished]
    assert weights.read_bytes() == content


def test_a_loss_is_compared_by_what_it_computes(configure: MakeConfig) -> None:
    list(train(configure()))
    for same in ({"divergence": "forward_kl"}, {"name": "KDLoss", "temperature": 1, "check": True}):
        (event,) = train(configure(loss=same))
        assert isinstance(event, Finished)
    with pytest.raises(IdentityError, match=r"loss\.divergence: 'forward_kl' -> 'jsd\(0\.5\)'") as caught:
        list(train(configure(loss={"divergence": "jsd"})))
    assert "loss.name" not in caught.value.what
    list(train(configure(loss={"divergence": "jsd"}, run=configure().run / "jsd")))
    (event,) = train(configure(loss={"divergence": "jsd(0.50)"}, run=configure().run / "jsd"))
    assert isinstance(event, Finished)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("online", [True, False])
def test_a_loss_that_is_no_number_is_told(
    check: bool, online: bool, configure: MakeConfig, tiny_teacher_dir: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    broken = copied(tiny_teacher_dir, tmp_path / "broken")
    model = AutoModelForCausalLM.from_pretrained(broken)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.model.embed_tokens.weight[100:] = torch.inf  # beyond the few tokens that are tried before training
    model.save_pretrained(broken)
    live = {
        "store": None,
        "teacher_model": {"path": str(tiny_teacher_dir), "dtype": "float32"},
        "corpus": [{"source": "jsonl", "path": str(tiny_corpus)}],
        "rendering": {"window": 64},
    }
    changes = {"student": {"init": "pretrained", "path": str(broken)}, "loss": {"check": check}}
    with pytest.raises(NumericsError, match="loss of a row is not finite: row" if check else "loss is") as caught:
        list(train(configure(**changes, **(live if online else {}))))
    assert caught.value.where == ("loss" if check else "step 1")


def test_a_micro_batch_too_small_is_refused_before_the_first_step(tiny_store: Path, configure: MakeConfig) -> None:
    longest = int(StoreReader(tiny_store).lengths().max())
    with pytest.raises(UsageError, match=f"longest sequence has {longest} tokens"):
        next(train(configure(tokens_per_batch=longest - 1)))
    list(train(configure(tokens_per_batch=longest)))


@pytest.mark.parametrize("tokens_per_step", [64, 100, 150])
def test_an_epoch_is_exactly_one_pass(
    tokens_per_step: int, tiny_extraction: dict[str, Any], configure: MakeConfig, tmp_path: Path
) -> None:
    corpus = tmp_path / "long.txt"
    corpus.write_text("The class statement defines a class object. " * 200)
    even = {
        "corpus": [{"source": "text", "path": str(corpus)}],
        "rendering": {"window": 64},
        "heldout": {"fraction": 0},
    }
    list(extract(ExtractConfig.model_validate({**tiny_extraction, **even, "store": tmp_path / "even"})))
    reader = StoreReader(tmp_path / "even")
    assert float((reader.lengths() == 64).mean()) > 0.9
    config = configure(store=tmp_path / "even", steps=None, epochs=1.0, tokens_per_step=tokens_per_step)
    trained = sum(event.tokens for event in train(config) if isinstance(event, StepDone))
    assert trained == reader.tokens


@pytest.mark.parametrize("epochs", [1.0, 2.0, 0.5])
def test_passes_are_exact_where_a_step_is_a_large_part_of_the_corpus(
    epochs: float, tiny_store: Path, configure: MakeConfig
) -> None:
    reader = StoreReader(tiny_store)
    step = int(reader.tokens / 2.6)
    config = configure(steps=None, epochs=epochs, tokens_per_step=step, tokens_per_batch=128)
    *_, saved, finished = train(config)
    assert isinstance(saved, Saved)
    assert isinstance(finished, Finished)
    progress = json.loads((Path(saved.path) / "progress.json").read_text())
    assert progress["cursor"] == math.ceil(epochs * len(reader))
    if epochs.is_integer():
        assert finished.tokens == epochs * reader.tokens


def test_a_pass_more_sees_every_sequence_once_more(tiny_store: Path, configure: MakeConfig) -> None:
    """A run that was finished is prolonged: the short step that it ended with stays, and the next pass is whole."""
    reader = StoreReader(tiny_store)
    common = {"steps": None, "schedule": {"kind": "constant"}, "tokens_per_step": int(reader.tokens / 2.6)}
    *_, first = train(configure(epochs=1.0, **common))
    started, *_, second = train(configure(epochs=2.0, **common))
    assert isinstance(started, Started)
    assert isinstance(first, Finished)
    assert isinstance(second, Finished)
    assert (started.step, second.step, started.steps) == (first.step, 2 * first.step, 2 * first.step)
    assert second.tokens == 2 * reader.tokens
    (again,) = train(configure(epochs=2.0, **common))
    assert isinstance(again, Finished)
    assert again.already
    shutil.copytree(configure().run, kept := configure().run.with_name("kept"))
    shutil.rmtree(kept / "checkpoints")
    (again,) = train(configure(epochs=2.0, run=kept, **common))
    assert isinstance(again, Finished)
    assert again.already, "a run from nothing would have fewer steps, and ends at the same sequence"
    with pytest.raises(IdentityError, match=f"{first.step} steps are fewer than the {second.step} steps done"):
        list(train(configure(epochs=1.0, **common)))


def copied(store: Path, target: Path) -> Path:
    shutil.copytree(store, target)
    return target


def test_cross_entropy_alone_reads_no_teacher_rows(tiny_store: Path, configure: MakeConfig, tmp_path: Path) -> None:
    store = copied(tiny_store, tmp_path / "store")
    for name in ("head_ids", "logprob", "tail_ids", "entropy"):
        chunks = [path for path in store.glob(f"shards/*/{name}/c/**/*") if path.is_file()]
        assert chunks
        for path in chunks:
            path.write_bytes(b"")
    plain = configure(kd_ratio=0.0, steps=3)
    damaged = plain.model_copy(update={"store": store, "run": tmp_path / "damaged"})
    tokens = [[e.loss for e in train(config) if isinstance(e, StepDone)] for config in (plain, damaged)]
    assert tokens[0] == tokens[1]
    with pytest.raises(CorruptionError):
        list(train(configure(store=store, run=tmp_path / "kd")))


def test_a_run_on_a_store_that_has_grown_is_refused(tiny_store: Path, configure: MakeConfig, tmp_path: Path) -> None:
    store = copied(tiny_store, tmp_path / "store")
    (store / "sealed.json").unlink()
    records = {path: path.read_bytes() for path in (store / "commits").iterdir()}
    held_back = sorted(records)[0]
    held_back.unlink()
    with pytest.raises(UsageError, match="the store is not finished") as caught:
        list(train(configure(store=store)))
    assert "set allow_partial: true" in str(caught.value.fix)
    config = configure(store=store, allow_partial=True, steps=4, checkpoint={"every": 2})
    assert stop_at(config, 2) == 0
    assert stop_at(config, 2) == 2
    held_back.write_bytes(records[held_back])
    with pytest.raises(IdentityError, match="the store has grown since this run began"):
        list(train(config))


def test_a_store_must_have_the_digest_that_is_expected(tiny_store: Path, configure: MakeConfig, tmp_path: Path) -> None:
    digest, other = StoreReader(tiny_store).digest, "0" * 64
    with pytest.raises(IdentityError, match=f"the store has the digest {digest}, expected is {other}") as caught:
        list(train(configure(expected_digest=other)))
    assert caught.value.exit_code == 3
    assert not (tmp_path / "run").exists()
    assert stop_at(configure(expected_digest=digest, steps=2, checkpoint={"every": 1}), 1) == 0
    assert isinstance(list(train(configure(steps=2, checkpoint={"every": 1})))[-1], Finished), (
        "it may be left out later"
    )


def test_an_expected_digest_is_one_of_a_store(configure: MakeConfig) -> None:
    for wrong in ("0" * 63, "X" * 64):
        with pytest.raises(ValidationError, match="expected_digest"):
            configure(expected_digest=wrong)
    with pytest.raises(ValidationError, match="expected_digest belongs to store"):
        configure(store=None, teacher_model={"path": "x"}, corpus=[{"source": "topics"}], expected_digest="0" * 64)


@pytest.fixture(scope="module")
def finished(tiny_store: Path, tiny_teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, and beside it its configuration file."""
    run = tmp_path_factory.mktemp("finished") / "run"
    student = {"init": "layers_of_teacher", "path": str(tiny_teacher_dir), "layers": 1}
    content = {"store": str(tiny_store), "run": str(run), "student": student, **SMALL}
    list(train(TrainConfig.model_validate(content)))
    (run.parent / "train.yaml").write_text(yaml.safe_dump(content))
    return run


def pipeline(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="pipeline")


COMMANDS: dict[str, Callable[[Path], Result]] = {
    "train": lambda run: pipeline("train", run.parent / "train.yaml", "--set", f"run={run}"),
    "prolong": lambda run: pipeline("train", run.parent / "train.yaml", "--set", f"run={run}", "--set", "steps=2"),
    "eval": lambda run: pipeline("eval", run),
    "generate": lambda run: pipeline("generate", run, "The class"),
    "teacher": lambda run: pipeline("generate", run, "The class", "--teacher"),
}
TRUNCATED = "half"


@pytest.mark.parametrize(
    ("name", "content", "command"),
    [
        *[("run.json", text, command) for text in ("", "{}", "[1]") for command in ("train", "eval", "teacher")],
        *[("config.yaml", text, "train") for text in ("", "- 1")],
        ("metrics.jsonl", '{"event": "step"}\n', "prolong"),
        *[("model/model.safetensors", text, "generate") for text in ("", "x" * 100, TRUNCATED)],
    ],
)
def test_damaged_files_of_a_run_are_the_users_to_mend(
    name: str, content: str, command: str, finished: Path, tmp_path: Path
) -> None:
    run = copied(finished, tmp_path / "run")
    shutil.copy(finished.parent / "train.yaml", tmp_path)
    file = run / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if content == TRUNCATED else content.encode())
    told = COMMANDS[command](run)
    assert told.exit_code == 2, told.stderr
    assert str(file if "model" not in name else file.parent) in told.stderr


# What may change between two commands of one run: none of it changes what is computed. The lengths of a run are held
# against the learning rates of its steps, a corpus and a live teacher against their contents.
FREE = {
    *("allow_partial", "attention", "checkpoint", "chunk_size", "corpus", "device", "distributed", "epochs"),
    *("expected_digest", "heldout", "rendering", "run", "steps", "store", "teacher_model", "tokens_per_batch"),
    "validation",
}


@pytest.mark.parametrize("key", TrainConfig.model_fields)
def test_what_changes_a_result_may_not_change_within_a_run(key: str, configure: MakeConfig, tmp_path: Path) -> None:
    run, config = RunDirectory(path=tmp_path / "run"), configure().model_dump(mode="json")
    with run.held():
        run.begin(config, {"digest": "d"})
        (run.checkpoints / "step-00000001").mkdir(parents=True)
        with nullcontext() if key in FREE else pytest.raises(IdentityError, match=f"another run: {key}"):
            run.begin({**config, key: "another"}, {"digest": "d"})
