"""The run directory: what belongs to a run, whose run it is, and whether it is finished.

RUN/config.yaml     the configuration, as it was when the run began, with the dtype that auto meant
RUN/run.json        the store, or corpus and live teacher, that it learns from; once finished, its totals
RUN/metrics.jsonl   RUN/checkpoints/   RUN/model/   RUN/report.html

run.json is written first. A directory without it is not a run's: nothing in there is removed or replaced.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from stages.durable import remove_leftovers, replace_file
from stages.training.metrics import read_metrics
from stages.training.schedule import Schedule
from stages.yaml_text import parse, write_yaml
from storage.commit.records import PLAN
from storage.errors import IdentityError, UsageError, storage_errors
from storage.files.regular import not_a, read_regular
from storage.values import is_amount, is_whole, json_differences, parse_json, short

# What may change between two commands of one run: where things lie, how the work is cut and saved, on which machine it
# is done. None of it changes which sequences a step holds or what it computes (beyond rounding). `steps` and `epochs`
# may change as long as the learning rates of the steps already done stay the same; the caller checks that. What a live
# teacher reads is compared by its content, not by where it lies.
FREE_FIELDS = frozenset(
    {
        "allow_partial",
        "attention",
        "checkpoint",
        "chunk_size",
        "corpus",
        "device",
        "distributed",
        "epochs",
        "expected_digest",
        "heldout",
        "rendering",
        "run",
        "steps",
        "store",
        "teacher_model",
        "tokens_per_batch",
        "validation",
    }
)

LARGEST_RECORD = 1 << 26  # bytes of run.json or config.yaml: a corpus may have many files
_RECORD = "run.json"
_LOCK = ".lock"
_RESTORE = "restore it, or choose another run directory"
# What a run writes beside it, and what makes a directory a store or a model.
_WRITTEN = ("config.yaml", "metrics.jsonl", "checkpoints", "model", "report.html")
_DIRECTORIES = ("checkpoints", "model")
_OF_OTHERS = (PLAN, "config.json")


@dataclass(frozen=True, kw_only=True)
class Finish:
    """Totals of a finished run.

    Attributes:
        step: optimizer steps.
        tokens: trained on.
        seconds: spent in steps.
        cursor: position of the order at the end; None: version 0.1 did not write it.
    """

    step: int
    tokens: int
    seconds: float
    cursor: int | None = None


@dataclass(frozen=True, kw_only=True)
class RunDirectory:
    """The directory of a training run, RUN in messages and documents: its record, curve, checkpoints and model."""

    path: Path

    @property
    def metrics(self) -> Path:
        """The training curve."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The finished student."""
        return self.path / "model"

    def require_own(self) -> None:
        """Check that nothing here is another's: training replaces files. Nothing is created.

        A run writes run.json and config.yaml before the others.

        Raises:
            UsageError: the path is a file, or holds something else than a run, or the run's record is damaged.
            CorruptionError: as `require_plain`.
            StorageUnavailableError: it cannot be read.
        """
        with storage_errors(self.path):
            paths = (self.path, *self.path.absolute().parents)
            if not next(path for path in paths if path.exists()).is_dir():
                raise UsageError(
                    "the run directory is a file, or is inside one", where=str(self.path), fix="name a directory"
                )
            if (self.path / _RECORD).exists():
                self._record()
            # In this order: another process may begin here right now, and writes run.json and config.yaml first.
            found = [name for name in (*_WRITTEN, *_OF_OTHERS) if (self.path / name).exists()]
            missing = [name for name in (_RECORD, "config.yaml") if not (self.path / name).exists()]
            if missing and found:
                raise UsageError(
                    f"not a run directory: it has {', '.join(found)}, but no {' and no '.join(missing)}",
                    where=str(self.path),
                    fix="name a directory of its own for the run",
                )
            self.require_plain()

    def require_plain(self) -> None:
        """Check that what a run has is files and directories of its own: nothing is read or written through a link.

        Raises:
            CorruptionError: something in the run is a link, or of another kind.
        """
        for name in (_RECORD, _LOCK, *_WRITTEN):
            place = self.path / name
            wanted, is_that = ("a directory", stat.S_ISDIR) if name in _DIRECTORIES else ("a file", stat.S_ISREG)
            if os.path.lexists(place) and not is_that(mode := place.lstat().st_mode):
                raise not_a(wanted, mode, where=str(place), name=name)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from training in this directory; the lock ends with the process, however it ends.

        Raises:
            UsageError: another process trains here, or the path is a file, or holds something else than a run.
        """
        self.require_own()
        with self._lock_file() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UsageError(
                    "another process is training in this run directory",
                    where=str(self.path),
                    fix="wait for it, or choose another run directory",
                ) from error
            if (self.path / _RECORD).exists():
                remove_leftovers(self.path, _RECORD, *_WRITTEN)
                remove_leftovers(self.checkpoints, "step-*")
            yield

    def begin(
        self,
        config: Mapping[str, Any],
        store: Mapping[str, Any],
        *,
        spelled_out: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    ) -> None:
        """Make this directory that run's, or check that it is.

        A directory belongs to a run from its first checkpoint on: before that nothing would be lost, so that a
        configuration which failed at once can be mended and tried again.

        Args:
            config: of the command, as plain values.
            store: `digest`, `id` and whatever else is worth recording about what it learns from; `digest` is
                compared, `id` tells another store from the same one with more shards, and `identity`, where there is
                one, is what was hashed and names the difference.
            spelled_out: gives a configuration, which an earlier version may have stored, with all its defaults: two
                that mean the same are equal then.

        Raises:
            IdentityError: the directory belongs to another configuration, store, corpus or teacher; every differing
                field is named.
            UsageError: a file of the run is damaged.
        """
        stored = self._stored_config()
        if stored is None or not (any(self.checkpoints.glob("step-*")) or self.model.exists() or self.finished()):
            replace_file(self.path / _RECORD, _json({"store": dict(store), "finished": None}))
            replace_file(self.path / "config.yaml", write_yaml(dict(config)))
            return
        lines = json_differences(_semantic(spelled_out(stored)), _semantic(spelled_out(config)))
        began = self._record()["store"]
        if began["digest"] != store["digest"] and began.get("id") == store.get("id") is not None:
            raise IdentityError(
                "the store has grown since this run began: another set of sequences comes in another order",
                where=str(self.path),
                fix="use a new run directory; a run on a sealed store can always be resumed",
            )
        if began["digest"] != store["digest"]:
            lines += _what_changed(began, store)
        if lines:
            raise IdentityError(
                f"the run directory belongs to another run: {'; '.join(lines)}",
                where=str(self.path),
                fix=_back_to(began, store),
            )

    def finish(self, totals: Finish) -> None:
        """Record that the run is finished: RUN/model is the student after `totals.step` steps."""
        record = {**self._record(), "finished": vars(totals)}
        replace_file(self.path / _RECORD, _json(record))

    def finished(self) -> Finish | None:
        """Return the totals of a run that was finished, whether or not RUN/model is still there; else None."""
        totals = self._record()["finished"]
        return None if totals is None else Finish(**totals)

    def check_learning_rates(self, schedule: Schedule, *, peak: float, done: int) -> None:
        """Check that a run which is prolonged would have had the same learning rates in the steps already done.

        Args:
            schedule: of the command. The curve tells what each step had, whatever the configurations were until now.
            peak: learning rate that the schedule scales.
            done: steps done.

        Raises:
            IdentityError: it would have had others.
            UsageError: the curve is damaged.
        """
        fix = "choose another run directory; with schedule constant, or wsd before its decay, a run can be prolonged"
        where = f"{self.path}, schedule: {schedule.kind}"
        if done > schedule.steps:
            raise IdentityError(f"{schedule.steps} steps are fewer than the {done} steps done", where=where, fix=fix)
        for line in read_metrics(self.metrics):
            step, had = line["step"], line.get("lr")
            if line.get("event") != "step" or not isinstance(step, int) or not 0 < step <= done:
                continue
            wanted = peak * schedule.factor(step - 1)
            if had != wanted:
                raise IdentityError(
                    f"{schedule.steps} steps would change the learning rates of the {done} steps done: "
                    f"step {step} had {had}, would have {wanted}",
                    where=where,
                    fix=fix,
                )

    def has_model(self) -> bool:
        """Tell whether RUN/model holds a configuration and weights, without a gap."""
        weights = [file.stem for file in self.model.glob("*.safetensors")]
        of = {int(stem.rpartition("-of-")[2]) if "-of-" in stem else 1 for stem in weights}
        names = ["config.json", *(["model.safetensors.index.json"] if len(weights) > 1 else [])]
        return of == {len(weights)} and all((self.model / name).is_file() for name in names)

    def _stored_config(self) -> dict[str, Any] | None:
        return read_config(self.path / "config.yaml")

    def _record(self) -> dict[str, Any]:
        return read_record(self.path / _RECORD)

    def _lock_file(self) -> TextIO:
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            return open(self.path / _LOCK, "a")


def read_record(path: Path) -> dict[str, Any]:
    """Return run.json of a run: `store` with at least its `digest`, and `finished`.

    Raises:
        UsageError: it is missing, or not such a record.
        CorruptionError: it is not a file, or too large for one.
    """
    data = read_regular(path, most=LARGEST_RECORD)
    try:
        if data is None:
            raise ValueError("it is missing")
        record: dict[str, Any] = parse_json(data)
        _check_record(record)
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"the run's record cannot be read: {error!r}", where=str(path), fix=_RESTORE) from error
    return record


def _check_record(record: Mapping[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError unless each field of it that is read holds what a run writes there."""
    store, finished = record["store"], record["finished"]
    if not isinstance(store["digest"], str):
        raise ValueError("the store's digest is not text")
    for name, kind in (("teacher", dict), ("identity", dict), ("path", str), ("id", str)):
        if not isinstance(store.get(name, kind()), kind):
            raise ValueError(f"store.{name} is {short(store[name])}")
    if not isinstance(store.get("identity", {}).get("teacher", {}), dict):
        raise ValueError("store.identity.teacher is not a section of keys")
    if finished is not None:
        totals = Finish(**finished)
        counts = (totals.step, totals.tokens, *(() if totals.cursor is None else (totals.cursor,)))
        if not (all(map(is_whole, counts)) and is_amount(totals.seconds)):
            raise ValueError(f"finished is {short(finished)}")


def read_config(path: Path) -> dict[str, Any] | None:
    """Return config.yaml of a run as plain values; None if there is none.

    Raises:
        UsageError: it is not a section of keys, or nothing that a run writes.
        CorruptionError: it is not a file, or too large for one.
    """
    data = read_regular(path, most=LARGEST_RECORD)
    if data is None:
        return None
    try:
        stored = parse(data.decode(), name=str(path)).values
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8 text: {error.reason}", where=str(path), fix=_RESTORE) from error
    except UsageError as error:
        error.fix = _RESTORE
        raise
    if not isinstance(stored, dict):
        found = "nothing" if stored is None else type(stored).__name__
        raise UsageError(f"expected a section of keys, found {found}", where=str(path), fix=_RESTORE)
    return stored


def _semantic(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that may not change within a run, as plain JSON values."""
    return {key: json.loads(json.dumps(value, default=str)) for key, value in config.items() if key not in FREE_FIELDS}


def _what_changed(began: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Say how two things to learn from differ: of corpora and teachers every field, of stores the digest."""
    if "identity" in began and "identity" in wanted:
        return json_differences(began["identity"], json.loads(json.dumps(wanted["identity"])))
    return [f"store digest: {began['digest']} -> {wanted['digest']}"]


def _back_to(began: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Say what to do about a difference. What `dtype: auto` meant where the run began stands in its record alone."""
    had, has = (record.get("identity", {}).get("teacher", {}).get("dtype") for record in (began, wanted))
    dtype = f"set the teacher's dtype to {had}; otherwise " if had and has and had != has else ""
    return f"{dtype}choose another run directory, or go back to the configuration in its config.yaml"


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"
