"""Configuration files: every way to write a wrong one, and what the error says about it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config import hints
from pipeline.config.base import section
from pipeline.config.extract import ExtractConfig, SourceConfig
from pipeline.config.loading import load_extract, load_train
from pipeline.config.loss import SET_ELSEWHERE
from pipeline.config.train import TrainConfig
from stages.yaml_text import MAX_BYTES, MAX_DEPTH, parse
from storage.errors import StorageUnavailableError, UsageError

EXTRACT = "store: s\nteacher:\n  path: x\ncorpus:\n  - source: topics\n"
TRAIN = "store: s\nrun: r\nstudent:\n  init: pretrained\n  path: x\nsteps: 10\n"


@pytest.mark.parametrize(
    ("named", "where"),
    [
        (None, "corpus"),
        ("path", "corpus.path"),
        ("path, relative to /x", "corpus.path, relative to /x"),
        ("split: train", "corpus.split: train"),
        ("/x/path", "/x/path"),
        ("path.jsonl, line 3", "path.jsonl, line 3"),
        ("device", "device"),
    ],
)
def test_a_section_completes_the_key_that_a_stage_names(named: str | None, where: str) -> None:
    with pytest.raises(UsageError) as caught, section("corpus", SourceConfig):
        raise UsageError("what", where=named)
    assert caught.value.where == where


@pytest.mark.parametrize(
    ("advice", "full"),
    [
        ("set field to the column that holds the text", "set corpus.field to the column that holds the text"),
        ("try split: train; if it persists, report it", "try corpus.split: train; if it persists, report it"),
        ("check the field, and set nothing else", "check the field, and set nothing else"),
    ],
)
def test_a_section_completes_the_keys_of_advice(advice: str, full: str) -> None:
    with pytest.raises(UsageError) as caught, section("corpus", SourceConfig):
        raise UsageError("unfit", fix=advice)
    assert caught.value.fix == full


def error_of(tmp_path: Path, text: str, *overrides: str, phase: str = "extract") -> UsageError:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        (load_extract if phase == "extract" else load_train)(path, overrides)
    return caught.value


@pytest.mark.parametrize(
    ("text", "line", "what", "fix"),
    [
        (EXTRACT + "target:\n  k: many\n", 7, "target.k: expected a whole number, found 'many'", "Default: 32"),
        (EXTRACT + "target:\n  k: true\n", 7, "target.k: expected a whole number, found true", ""),
        (EXTRACT + "target:\n  k: 1.5\n", 7, "target.k: expected a whole number, found 1.5", ""),
        (EXTRACT + "target:\n  k: 0\n", 7, "target.k: expected a number above 0, found 0", ""),
        (EXTRACT + "target:\n  seed: false\n", 7, "target.seed: expected a whole number, found false", ""),
        (EXTRACT + "target:\n  seed: -1\n", 7, "target.seed: expected a number of at least 0, found -1", "2**64 - 1"),
        (EXTRACT + f"target:\n  seed: {2**64}\n", 7, "target.seed: expected a number below 1.8", "2**64 - 1"),
        (EXTRACT + "heldout:\n  seed: -1\n", 7, "heldout.seed: expected a number of at least 0, found -1", "2**64 - 1"),
        (EXTRACT + f"heldout:\n  seed: {2**64}\n", 7, "heldout.seed: expected a number below 1.8", "2**64 - 1"),
        (EXTRACT + "target:\n  draws: 65536\n", 7, "target.draws: expected a number of at most 65535", "at most 65535"),
        (EXTRACT + "target:\n", 6, "target: expected a section of keys, found nothing", ""),
        (EXTRACT + "target: 3\n", 6, "target: expected a section of keys, found 3", ""),
        (EXTRACT + "target:\n  kk: 3\n", 7, "unknown key 'kk' in target", "did you mean 'k'?"),
        (EXTRACT + "target:\n  kind: top-k\n", 7, "target.kind: expected hybrid, sampled, topk or topp", "exact"),
        (EXTRACT + "target:\n  kind: topk\n  draws: 3\n", 6, "target: kind topk draws no samples", ""),
        (EXTRACT + "target: {kind: hybrid, draws: 0}", 6, "target: kind hybrid needs draws from 1", ""),
        (EXTRACT + "target: {kind: sampled, k: 8}", 6, "target: kind sampled has no exact head, found k: 8", ""),
        (EXTRACT + "target: {kind: topp}", 6, "target: kind topp needs p, the mass", ""),
        (EXTRACT + "target: {kind: topp, p: 1.5}", 6, "target: p must be above 0 and at most 1, found p: 1.5", ""),
        (EXTRACT + "target: {kind: topp, p: 0.9, draws: 2}", 6, "target: kind topp draws no samples", ""),
        (EXTRACT + "target: {p: 0.9}", 6, "target: p belongs to kind topp, found p: 0.9 with kind hybrid", ""),
        (EXTRACT + "target: {temperatures: [1.0]}", 6, "target: temperatures must lie from 0.01 to 100 and be", ""),
        (EXTRACT + "target: {temperatures: [-2]}", 6, "be other than 1 (always stored), found [-2.0]", ""),
        (EXTRACT + "target: {temperatures: [0.009]}", 6, "target: temperatures must lie from 0.01 to 100", ""),
        (EXTRACT + "target: {temperatures: [101]}", 6, "target: temperatures must lie from 0.01 to 100", ""),
        (EXTRACT + "target: {temperatures: [2, true]}", 6, "target.temperatures.1: expected a number, found true", ""),
        (EXTRACT + "target: {kind: topp, p: true}", 6, "target.p: expected a number, found true", ""),
        (EXTRACT + "heldout: {fraction: '0.1'}", 6, "heldout.fraction: expected a number, found '0.1'", ""),
        (EXTRACT + "target: {temperatures: [2, 2]}", 6, "target: temperatures must rise, found [2.0, 2.0]", ""),
        (EXTRACT + "target: {temperatures: [2, 1.5]}", 6, "target: temperatures must rise, found [2.0, 1.5]", ""),
        (EXTRACT + "target: {kind: sampled, temperatures: [2]}", 6, "kind sampled has no head", ""),
        (EXTRACT + "rendering: {overlap: 2000}", 6, "overlap 2000 must be smaller than window 1024", ""),
        (EXTRACT + "rendering: {window: 8, overlap: 8}", 6, "overlap 8 must be smaller than window 8", ""),
        (EXTRACT + "heldout: {fraction: 2}", 6, "heldout.fraction: expected a number below 1, found 2", ""),
        (EXTRACT + "heldout: {fraction: 1.0}", 6, "heldout.fraction: expected a number below 1, found 1.0", ""),
        (EXTRACT + "heldout: {fraction: .nan}", 6, "heldout.fraction: expected", ""),
        (EXTRACT + "documents_per_shard: x", 6, "expected a whole number or auto, found 'x'", "auto: about"),
        (EXTRACT + "batch_size: 0", 6, "expected a number above 0 or auto, found 0", ""),
        (EXTRACT + "heldot: {}", 6, "unknown key 'heldot'", "did you mean 'heldout'?"),
        (EXTRACT + "window: 3", 6, "unknown key 'window'", "'window' belongs at rendering.window"),
        (EXTRACT + "zzz: 3", 6, "unknown key 'zzz'", "keys here: store, teacher, corpus"),
        (EXTRACT + "store2: 3\nbatch_sise: 1", 6, "unknown key 'store2'", "\n     then 1 more: batch_sise"),
        (EXTRACT + "rendering: {eos: 3}", 6, "rendering.eos: expected true or false, found 3", "(default true)"),
        (EXTRACT.replace("  path: x", "  dtype: float64\n  path: x"), 3, "teacher.dtype: expected auto, float32", ""),
        (EXTRACT.replace("  path: x", "  revision: a"), 2, "teacher.path is missing", "Directory or hub name"),
        (EXTRACT.replace("topics", "text"), 5, "corpus.0: source 'text' needs a path", ""),
        (EXTRACT.replace("  - source: topics", "  source: topics"), 4, "corpus: expected a list", ""),
        (EXTRACT.replace("\n  - source: topics", " []"), 4, "corpus: expected at least 1 item", ""),
        (EXTRACT.replace("store: s", "store: 3"), 1, "store: expected a path, found 3", ""),
        (EXTRACT.replace("store: s", "store: s3://b/c"), 1, "store: a store is a directory so far", "a directory of"),
    ],
)
def test_extract_problems_name_line_key_and_remedy(text: str, line: int, what: str, fix: str, tmp_path: Path) -> None:
    error = error_of(tmp_path, text)
    assert what in error.what
    assert error.where == f"{tmp_path / 'c.yaml'}:{line}"
    assert fix in (error.fix or "")


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        (TRAIN + "epochs: 3", "give exactly one of steps and epochs", ""),
        (TRAIN + "expected_digest: abc", "expected_digest: expected 64 hexadecimal digits", "pipeline status"),
        (
            TRAIN + "checkpoint: {every: soon}",
            "or a time such as 90 s, 10 min or 2 h, found 'soon'",
            "(default 10 min)",
        ),
        (TRAIN + "optimizer: {betas: 3}", "optimizer.betas: expected a list", "(default [0.9, 0.95])"),
        (TRAIN + "lr: 3", "unknown key 'lr'", "optimizer.lr"),
        (TRAIN + "optimizer: {lr: fast}", "optimizer.lr: expected a number, found 'fast'", "Peak learning rate"),
        (TRAIN + "optimizer: {lr: .inf}", "optimizer.lr: expected a finite number", ""),
        (TRAIN + "optimizer: {betas: [0.9]}", "optimizer.betas.1 is missing", ""),
        (TRAIN + "loss: KDLoss", "loss: expected a section of keys, found 'KDLoss'", "name: KDLoss"),
        (TRAIN + "clip_norm: -1", "clip_norm: expected a number above 0, found -1", "null: no clipping"),
        (TRAIN + "optimizer: {betas: [0.9, 1]}", "optimizer.betas.1: expected a number below 1, found 1", ""),
        (TRAIN + "optimizer: {betas: [-0.1, 0.9]}", "optimizer.betas.0: expected a number of at least 0", ""),
        (TRAIN + "seed: -1", "seed: expected a number of at least 0, found -1", "2**63 - 1"),
        (TRAIN + f"seed: {2**63}", "seed: expected a number below", "2**63 - 1"),
        (TRAIN + "schedule: {warmup_steps: 11}", "schedule.warmup_steps 11 must not exceed steps 10", ""),
        (TRAIN + "distributed: {dp_replicate: 2}", "distributed.dp_replicate is 2, but data par", "distributed.tp is"),
        (TRAIN + "distributed: {dp_shard: 4}", "distributed.dp_shard is 4, but data parallelism", "distributed.tp is"),
        (TRAIN + "distributed: {dp_shard: all}", "dp_shard: expected a whole number or auto or none, found 'all'", ""),
        (TRAIN + "kd_ratio: 1.5", "kd_ratio: expected a number of at most 1, found 1.5", ""),
        (TRAIN.replace("store: s", "store: gs://b/c"), "store: a store is a directory so far", "a directory of"),
        (TRAIN.replace("pretrained", "layers_of_teacher"), "layers belongs to init: layers_of_teacher", ""),
    ],
)
def test_train_problems(text: str, what: str, fix: str, tmp_path: Path) -> None:
    error = error_of(tmp_path, text, phase="train")
    assert what in error.what
    assert fix in (error.fix or "")


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("", ":1", "found nothing"),
        ("- 1", ":1", "found a list"),
        ("3", ":1", "found 3"),
        ("a: 1\nb: 2\na: 3", ":3", "key 'a' is given twice, first on line 1"),
        ("a:\n  b: 1\n  b: 2", ":3", "key 'b' is given twice, first on line 2"),
        ("a: [1", ":1, column 6", "not valid YAML: while parsing a flow sequence"),
        ("a:\n\tb: 1", ":2, column 1", r"found character '\t'"),
        ("a: b: c", ":1, column 5", "mapping values are not allowed here"),
        ("a: 1\n---\nb: 2", ":2, column 1", "another document"),
        ("a: &x [1]\nb: *x", ":1", "anchors and aliases are not supported, found 'x'"),
        ("a: !!python/object/apply:os.system [ls]", ":1", "tags are not supported"),
        ("!!python/object:os.system {}", ":1", "tags are not supported"),
        ("1: a", ":1", "keys must be text, found 1"),
        ("? [a]\n: 1", ":1", "keys must be text"),
        ("a: " + "[" * (MAX_DEPTH + 1), ":1", "nested deeper than"),
        ("[" * 100_000, ":1", "nested deeper than"),
        ("a: " + "9" * 5000, ":1", "not a number"),
        ("a: '" + "x" * MAX_BYTES + "'", "", "too long for a configuration"),
        ("a: '\x00'", "", "unacceptable character"),
    ],
)
def test_text_that_is_not_a_configuration(text: str, where: str, what: str, tmp_path: Path) -> None:
    error = error_of(tmp_path, text)
    assert what in error.what
    assert error.where == f"{tmp_path / 'c.yaml'}{where}"


def test_a_hundred_levels_of_aliases_are_refused_at_once() -> None:
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{'*a' + str(n - 1) + ','} *a{n - 1}]\n" for n in range(1, 100))
    with pytest.raises(UsageError, match="anchors and aliases"):
        parse(bomb, name="bomb")


def test_scalars_follow_yaml_1_2() -> None:
    text = "a: 3e-4\nb: 1_000\nc: no\nd: 2024-01-01\ne: 010\nf: 0x1f\ng: 12:30:00\nh:\ni: True\nj: '5'\nk: -.5\n"
    values = parse(text, name="t").values
    assert values == {
        "a": 3e-4, "b": 1000, "c": "no", "d": "2024-01-01", "e": "010", "f": 31, "g": "12:30:00", "h": None,
        "i": True, "j": "5", "k": -0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("override", "what", "fix"),
    [
        ("target.k=x", "target.k: expected a whole number, found 'x'", ""),
        ("tget.k=3", "unknown key 'tget'", "did you mean 'target'?"),
        ("target.kk=3", "unknown key 'kk' in target", "did you mean 'k'?"),
        ("corpus.1.path=x", "corpus is a list of 1, found index '1'", "from 0 to 0"),
        ("corpus.first.path=x", "corpus is a list of 1, found index 'first'", ""),
        ("corpus.0=topics", "corpus.0: expected a section of keys, found 'topics'", ""),
        ("store.x=1", "store is a plain value ('s'), so it has no 'x'", ""),
        ("target.k", "expected section.key=value", "for example"),
        ("=3", "expected section.key=value", ""),
        ("a..b=3", "expected section.key=value", ""),
        ("teacher=", "teacher: expected a section of keys, found nothing", ""),
    ],
)
def test_override_problems_name_the_argument(override: str, what: str, fix: str, tmp_path: Path) -> None:
    error = error_of(tmp_path, EXTRACT, override)
    assert what in error.what
    assert error.where == f"--set {override}"
    assert fix in (error.fix or "")


def test_an_override_of_a_section_answers_for_all_of_it(tmp_path: Path) -> None:
    error = error_of(tmp_path, EXTRACT + "target:\n  k: 3\n", "target={k: many}")
    assert error.where == "--set target={k: many}"


def test_override_that_is_not_yaml(tmp_path: Path) -> None:
    error = error_of(tmp_path, EXTRACT, "target.k=[1")
    assert error.where is not None
    assert error.where.startswith("--set target.k=[1")


def test_overrides_are_typed_and_the_last_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(EXTRACT)
    config = load_extract(
        path,
        ["target.k=7", "corpus.0.source=text", "corpus.0.path=a=b.txt", "rendering.window=12", "target={k: 9}"],
    )
    assert (config.target.k, config.rendering.window) == (9, 12)
    assert (config.corpus[0].source, config.corpus[0].path) == ("text", "a=b.txt")


def test_the_greatest_seed_and_the_most_draws(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(EXTRACT)
    config = load_extract(path, [f"target.seed={2**64 - 1}", f"heldout.seed={2**64 - 1}", "target.draws=65535"])
    assert (config.target.seed, config.heldout.seed, config.target.draws) == (2**64 - 1, 2**64 - 1, 65535)


def test_number_forms_that_yaml_1_1_takes_for_text(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(TRAIN + "optimizer: {lr: 3e-4}\nloss: {name: KDLoss, temperature: 1e0}\nclip_norm: null\n")
    config = load_train(path)
    assert config.optimizer.lr == 3e-4
    assert config.loss["temperature"] == 1.0
    assert config.clip_norm is None


@pytest.mark.parametrize(
    ("loss", "what", "where"),
    [
        ("name: KDLos", "loss.name: expected KDLoss, found 'KDLos'", 8),
        ("name: MaskedCrossEntropy", "loss.name: expected KDLoss", 8),
        ("name: FusedLinearKDLoss", "loss.name: expected KDLoss", 8),
        ("temperatur: 2", "unknown key 'temperatur' in loss", 8),
        ("divergence: kl", "divergence 'kl' is unknown; known are forward_kl", 8),
        ("divergence: jsd(2)", "beta is 2.0, allowed is 0 < beta < 1", 8),
        ("name: KDLoss\n  temperature: -1", "temperature is -1, expected a finite number above 0", 9),
        ("temperature: hot", "loss.temperature: expected a number, found 'hot'", 8),
        ("logits_scale: 1\n  target_logits_scale: hot", "loss.target_logits_scale: expected a number, found 'hot'", 9),
        ("check: 1", "loss.check: expected true or false, found 1", 8),
        ("tail: [bucket]", "loss.tail: expected text, found ['bucket']", 8),
        (f"temperature: 1{'0' * 400}", "expected a finite number above 0", 8),
        ("tail: fluffy", "tail", 8),
        ("divergence: reverse_kl\n  tail: sampled", "tail", 9),
        ("chunk_size: 3", "loss.chunk_size is not set here: it comes from the key chunk_size", 8),
    ],
)
def test_loss_problems(loss: str, what: str, where: int, tmp_path: Path) -> None:
    text = f"{TRAIN}loss:\n  {loss}\n"
    error = error_of(tmp_path, text, phase="train")
    assert what in error.what
    assert error.where == f"{tmp_path / 'c.yaml'}:{where}"
    assert error.fix
    with pytest.raises(ValidationError) as caught:  # built in Python, a configuration says the same
        TrainConfig.model_validate(yaml.safe_load(text))
    assert f"{error.what}; {error.fix}" in str(caught.value)


def test_a_divergence_that_is_nearly_right_is_named_alone(tmp_path: Path) -> None:
    error = error_of(tmp_path, TRAIN + "loss: {divergence: reverse-kl}\n", phase="train")
    assert "did you mean 'reverse_kl'?" in error.what
    assert error.fix is None


def test_only_fields_that_are_set_there_are_named(tmp_path: Path) -> None:
    error = error_of(tmp_path, TRAIN + "loss: {warmth: 2}\n", phase="train")
    assert error.fix is not None
    assert error.fix.startswith("keys here: name, temperature, divergence, tail, ")
    assert not [key for key in SET_ELSEWHERE if key in error.fix]


@pytest.mark.parametrize(
    "loss",
    [
        "{}",
        "{divergence: jsd(0.3), temperature: 1}",
        "{name: KDLoss, logits_scale: 0.5}",
        "{divergence: backward_kl, tail: renormalize_both, logits_scale: 0.5, target_logits_scale: 2.0}",
    ],
)
def test_good_losses(loss: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"{TRAIN}loss: {loss}\n")
    load_train(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such configuration file"):
        load_extract(tmp_path / "none.yaml")


def test_directory_instead_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="this is a directory"):
        load_extract(tmp_path)


def test_binary_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"store: \xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8 text") as caught:
        load_extract(path)
    assert caught.value.where == f"{path}, byte 7"


def test_file_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageUnavailableError, match="cannot read the configuration"):
        load_extract(tmp_path / "file" / "c.yaml")


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        (
            "step_scheduler: {max_steps: 9}",
            "set steps or epochs, tokens_per_step, checkpoint.every and validation.every",
        ),
        ("rng: {seed: 1}", "set seed"),
        ("optimizer: {kind: adamw}", "leave it out: AdamW is the only optimizer"),
        ("optimizer: {_target_: torch.optim.AdamW}", "leave it out: AdamW is the only optimizer"),
        ("per-device-train-batch-size: 8", "set tokens_per_batch"),
        ("lora: {r: 8}", "adapters such as LoRA are not in this version: leave 'lora' out"),
        ("student: {init: pretrained, path: x, lora_r: 8}", "adapters such as LoRA are not in this version"),
        ("load_in_4bit: true", "quantised weights are not in this version: leave 'load_in_4bit' out"),
        ("resume_from_checkpoint: true", "leave it out: the same command again goes on where it stopped"),
        ("wandb: {project: x}", "experiment trackers are not in this version"),
        ("template: chatml", "chat templates and lists of messages are not in this version"),
    ],
)
def test_keys_of_other_systems_are_told_as_what_they_are(text: str, fix: str, tmp_path: Path) -> None:
    plain = TRAIN if not text.startswith("student") else TRAIN.replace("student:\n  init: pretrained\n  path: x\n", "")
    error = error_of(tmp_path, plain + text + "\n", phase="train")
    assert error.what.startswith("unknown key")
    assert fix in str(error.fix)


@pytest.mark.parametrize(
    ("model", "table"), [(TrainConfig, hints.TRAIN), (ExtractConfig, hints.EXTRACT)], ids=["train", "extract"]
)
def test_what_hints_name_exists(model: type[BaseModel], table: dict[str, str]) -> None:
    known = set(re.findall(r'"([a-z_]+)":', json.dumps(model.model_json_schema()))) | {"temperature"}  # of the loss
    words = {"or", "and", "for", "a", "live", "teacher", "the", "memory", "share", "of", "beside", "leave", "it", "out"}
    for key, sentence in table.items():
        assert key not in model.model_fields
        instruction = re.split("[:;]| where ", sentence)[0].removeprefix("set ")
        assert set(re.findall(r"[a-z_]+", instruction)) <= known | words, key


@pytest.mark.parametrize("text", ['store: "\\ud800"\n', '"\\ud800": 1\n'])
def test_half_a_character_is_refused(text: str, tmp_path: Path) -> None:
    assert error_of(tmp_path, text).what == "half of a surrogate pair is not a character"
