"""Files of a run that training did not write so: each is refused by name, passed over, or harmless; none is a bug.

Every value of every JSON or YAML file of a run is replaced by others, one at a time; where a checkpoint's manifest
vouches for the file, its hash is mended. The whole battery goes through the functions that read these files, and in
`make torture` through the command.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from torture_results import save

from pipeline.cli import main
from pipeline.config.train import TrainConfig
from pipeline.report.curves import read_curves
from pipeline.train import train
from stages.training.checkpoint import Checkpoints
from stages.training.metrics import MetricsLog
from stages.training.run import read_config, read_record
from storage.errors import DistillError

VALUES: tuple[Any, ...] = (None, True, -5, 7, 10**18, 10**400, 1.5, float("nan"), "x", "\ud800", [], [1], {}, {"x": 1})
WHOLE = ("", "[" * 10**5, '{"a":' * 10**5, "9" * 10**4, "\0", '"\\ud800"', "NaN", "{}", "[]", "null", "\xff" * 9)
NAMES = ("run.json", "config.yaml", "metrics.jsonl", "manifest.json", "progress.json")
REFUSED = (2, 3, 4)


@pytest.fixture(scope="module")
def stopped(tiny_store: Path, tiny_teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints after the second and the last; train.yaml beside it wants six."""
    folder = tmp_path_factory.mktemp("stopped")
    content = {
        "store": str(tiny_store),
        "run": str(folder / "run"),
        "student": {"init": "layers_of_teacher", "path": str(tiny_teacher_dir), "layers": 1},
        "steps": 4,
        "tokens_per_step": 128,
        "dtype": "float32",
        "device": "cpu",
        "schedule": {"kind": "constant"},
        "checkpoint": {"every": 2},
        "validation": {"every": 2, "sequences": 2},
    }
    list(train(TrainConfig.model_validate(content)))
    (folder / "train.yaml").write_text(yaml.safe_dump({**content, "steps": 6}))
    return folder / "run"


def path_of(run: Path, name: str) -> Path:
    return run / name if (run / name).exists() else run / "checkpoints" / "step-00000004" / name


def forged(value: Any) -> Iterator[Any]:
    """The same JSON value with one part of it replaced, or left out."""
    yield from VALUES
    if isinstance(value, dict):
        for key, item in value.items():
            yield {other: item for other, item in value.items() if other != key}
            yield from ({**value, key: changed} for changed in forged(item))
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from ([*value[:index], changed, *value[index + 1 :]] for changed in forged(item))


def texts(run: Path, name: str) -> list[str]:
    """Every content that the file may be given."""
    text = path_of(run, name).read_text()
    if name == "config.yaml":
        return [*WHOLE, *(json.dumps(value) for value in forged(yaml.safe_load(text)))]
    if name == "metrics.jsonl":
        first, second, *rest = text.splitlines(keepends=True)
        changed = [*WHOLE, *(json.dumps(value) for value in forged(json.loads(second)))]
        return [*WHOLE, *("".join([first, line + "\n", *rest]) for line in changed)]
    return [*WHOLE, *(json.dumps(value) for value in forged(json.loads(text)))]


def forge(run: Path, name: str, text: str) -> None:
    path = path_of(run, name)
    path.write_bytes(text.encode(errors="surrogatepass"))
    if name == "progress.json":
        manifest = path.with_name("manifest.json")
        content = json.loads(manifest.read_text())
        described = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        content["files"][name] = described
        manifest.write_text(json.dumps(content))


def look_into(run: Path) -> None:
    """Read all that training and its report read."""
    digest = read_record(run / "run.json")["store"]["digest"]
    read_config(run / "config.yaml")
    read_curves(run)
    Checkpoints(folder=run / "checkpoints", store_digest=digest).newest()
    with MetricsLog(run / "metrics.jsonl", last_step=4):
        pass


def test_a_run_that_nobody_forged_is_read(stopped: Path) -> None:
    look_into(stopped)


@pytest.mark.parametrize("name", NAMES)
def test_no_value_in_a_file_of_a_run_is_a_bug(name: str, stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    variants, refusals = texts(stopped, name), []
    for text in variants:
        forge(tmp_path / "run", name, text)
        try:
            look_into(tmp_path / "run")
        except DistillError as error:
            refusals.append(error)
    print(f"{name}: {len(variants)} forgeries, {len(refusals)} refused")
    assert len(variants) > 50
    assert {refusal.exit_code for refusal in refusals} <= set(REFUSED)
    assert all(str(tmp_path / "run") in str(refusal.where) for refusal in refusals)


@pytest.mark.parametrize(
    "changes",
    [
        {"cursor": -5}, {"cursor": 10**18}, {"cursor": 1.0}, {"cursor": True}, {"step": 3}, {"step": "4"},
        {"tokens": -1}, {"seconds": float("inf")}, {"seconds": None}, {"epoch": 1},
    ],
)  # fmt: skip
def test_a_checkpoint_where_no_run_can_stand_is_passed_over(
    changes: dict[str, Any], stopped: Path, tmp_path: Path
) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    progress = json.loads(path_of(stopped, "progress.json").read_text())
    forge(tmp_path / "run", "progress.json", json.dumps(progress | changes))
    digest = read_record(stopped / "run.json")["store"]["digest"]
    assert Checkpoints(folder=tmp_path / "run" / "checkpoints", store_digest=digest).newest().step == 2


def command(run: Path) -> Result:
    arguments = ["train", str(run.parent / "train.yaml"), "--set", f"run={run}"]
    return CliRunner().invoke(main, arguments, prog_name="pipeline")


@pytest.fixture(scope="module")
def weights(stopped: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Of the six steps, nothing forged."""
    run = copied(stopped, tmp_path_factory.mktemp("whole"))
    assert command(run).exit_code == 0
    return (run / "model" / "model.safetensors").read_bytes()


def copied(stopped: Path, folder: Path) -> Path:
    shutil.copytree(stopped, folder / "run")
    shutil.copy(stopped.parent / "train.yaml", folder)
    return folder / "run"


Check = Callable[[str, str, Path], int]


@pytest.fixture
def check(stopped: Path, weights: bytes) -> Check:
    """Gives a run one forged file and goes on with it: a refusal, or the weights that it would have had anyway."""

    def go_on(name: str, text: str, folder: Path) -> int:
        run = copied(stopped, folder)
        forge(run, name, text)
        told = command(run)
        assert told.exit_code in (0, *REFUSED), (name, text[:200], told.stderr)
        if told.exit_code == 0:
            assert (run / "model" / "model.safetensors").read_bytes() == weights, (name, text[:200])
        return told.exit_code

    return go_on


@pytest.mark.parametrize(
    ("name", "text", "code"),
    [
        ("run.json", "[" * 10**5, 2),
        ("config.yaml", "[" * 10**5, 2),
        ("metrics.jsonl", "[" * 10**5 + "\n", 0),
        ("manifest.json", "[" * 10**5, 0),
        ("progress.json", "[" * 10**5, 0),
        ("progress.json", '{"step": 4, "cursor": -5, "tokens": 500, "seconds": 1.0}', 0),
        ("progress.json", '{"step": 4, "cursor": 1000000000000000000, "tokens": 500, "seconds": 1.0}', 0),
        ("manifest.json", "9" * 10**4, 0),
    ],
)
def test_the_command_refuses_or_falls_back(name: str, text: str, code: int, check: Check, tmp_path: Path) -> None:
    assert check(name, text, tmp_path) == code


@pytest.mark.torture
@pytest.mark.parametrize("name", NAMES)
def test_the_command_on_every_forgery(name: str, stopped: Path, check: Check, tmp_path: Path) -> None:
    """A sample of each file's forgeries, without a cursor within its bounds: nothing but the hash knows that one."""
    started, draw = time.perf_counter(), random.Random(name)
    variants = texts(stopped, name)
    chosen = [text for text in draw.sample(variants, min(150, len(variants))) if '"cursor": 7,' not in text]
    codes = []
    for number, text in enumerate(chosen):
        codes.append(check(name, text, tmp_path / str(number)))
        shutil.rmtree(tmp_path / str(number))
    save(f"forged {name} of a run", started=started, cases=len(codes), refused=sum(code != 0 for code in codes))
