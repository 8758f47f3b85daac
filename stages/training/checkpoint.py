"""Checkpoints: everything from which the next step follows, verified before it is believed.

Data path: model, optimizer, random numbers, step, cursor -> **checkpoint directory** -> the same, after a stop.

    checkpoints/step-00000200/
        model.safetensors       parameters and buffers by name, tied weights once
        optimizer.safetensors   `<parameter>/<state>`, such as `model.norm.weight/exp_avg`
        random.safetensors      generator states
        progress.json           step, cursor, totals
        manifest.json           size and sha256 of each of these, and the digest of the store

Nothing in here is a pickle. A checkpoint exists if its manifest verifies; the newest one that does is taken. Tensors
are whole, however many processes shared the model: a run may go on with another number of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.durable import durable_directory, remove
from stages.parallel.processes import ALONE, Processes
from stages.parallel.tensors import like, whole
from storage.errors import CorruptionError, IdentityError, storage_errors
from storage.files.regular import kind_of, open_regular, read_regular
from storage.values import is_amount, parse_json, require_fields, require_section, require_whole, short

logger = logging.getLogger("topk_distill.checkpoint")

_FILES = ("model.safetensors", "optimizer.safetensors", "random.safetensors", "progress.json")
_PROGRESS = _FILES[-1]
_MANIFEST = "manifest.json"
_LARGEST_JSON = 64 * 1024  # bytes of progress.json and of manifest.json
_LARGEST_COUNT = 1 << 53
_PREFIX = "step-"
_UNUSABLE = "unusable-"


@dataclass(frozen=True, kw_only=True)
class TrainingProgress:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        cursor: position in the store's order of the first sequence not yet trained on.
        tokens: tokens trained on.
        seconds: time spent in steps, over all processes that worked on the run.
    """

    step: int = 0
    cursor: int = 0
    tokens: int = 0
    seconds: float = 0.0


FRESH = TrainingProgress()  # of a run that begins


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        folder: RUN/checkpoints.
        store_digest: of the store that the run reads; recorded in each manifest.
        keep: newest checkpoints kept.
        processes: that share the model. All of them save and resume together; the main one writes.
    """

    folder: Path
    store_digest: str
    keep: int = 2
    processes: Processes = ALONE

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: TrainingProgress) -> Path:
        """Write a checkpoint whole and durably, then remove the oldest beyond `keep`.

        Raises:
            OutOfSpaceError, StorageUnavailableError: it cannot be written; older ones are untouched.
        """
        main = self.processes.main
        weights = whole(_model_tensors(model), keep=main)
        moments = whole(_optimizer_tensors(model, optimizer), keep=main)
        return self.processes.on_main(lambda: self._write(weights, moments, progress))

    def _write(self, weights: dict[str, Tensor], moments: dict[str, Tensor], progress: TrainingProgress) -> Path:
        target = self.folder / f"{_PREFIX}{progress.step:08d}"
        with durable_directory(target, point="checkpoint") as directory:
            _save_tensors(weights, directory / "model.safetensors")
            _save_tensors(moments, directory / "optimizer.safetensors")
            _save_tensors(_random_states(), directory / "random.safetensors")
            (directory / "progress.json").write_text(json.dumps(asdict(progress)))
            manifest = {"store_digest": self.store_digest, "files": _describe(directory)}
            (directory / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        older = [directory for directory in self._newest_first() if _step_of(directory) < progress.step]
        for old in older[self.keep - 1 :]:
            remove(old)
        return target

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingProgress:
        """Load the newest checkpoint that verifies. None left: `FRESH`.

        Each newer one that does not verify is told in a warning and set aside as `unusable-step-...`, so that it never
        passes for a checkpoint of the steps that come now.
        """
        newest = self.processes.on_main(self._newest_whole)
        return FRESH if newest is None else _load(newest, model, optimizer)

    def _newest_whole(self) -> Path | None:
        for directory in self._newest_first():
            problem = self._problem(directory)
            if problem is None:
                return directory
            aside = directory.with_name(_UNUSABLE + directory.name)
            logger.warning(
                "checkpoint %s is damaged (%s): falling back to the one before it; this one is set aside as %s",
                directory,
                problem,
                aside.name,
            )
            with storage_errors(directory):
                remove(aside)
                os.rename(directory, aside)
        return None

    def newest(self) -> TrainingProgress:
        """Return where the newest checkpoint that verifies stands; `FRESH` if there is none."""
        valid = (directory for directory in self._newest_first() if self._problem(directory) is None)
        newest = next(valid, None)
        return FRESH if newest is None else _read_progress(newest)

    def _newest_first(self) -> list[Path]:
        return sorted(self.folder.glob(f"{_PREFIX}{'[0-9]' * 8}"), key=_step_of, reverse=True)

    def _problem(self, directory: Path) -> str | None:
        """Say what is wrong with a checkpoint; None if its manifest verifies and its progress can be."""
        if directory.is_symlink() or not directory.is_dir():
            return f"it is {kind_of(directory.lstat().st_mode)}, not a directory"
        try:
            manifest = _read_json(directory / _MANIFEST)
            stated, digest = manifest["files"], manifest["store_digest"]
            require_section("files", stated)
            found = _describe(directory, {name: item["bytes"] for name, item in stated.items()})
        except CorruptionError as error:
            return f"{error.where}: {error.what}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"{_MANIFEST}: {error!r}"
        if digest != self.store_digest:
            return f"made from store {short(digest)}"
        for name in sorted(stated.keys() | found.keys() | set(_FILES)):
            if name not in found or stated.get(name) != found[name]:
                return f"{name}: {found.get(name, 'missing')}, the manifest says {short(stated.get(name, 'nothing'))}"
        try:
            _read_progress(directory)
        except (CorruptionError, OSError, ValueError) as error:
            return f"{_PROGRESS}: {error}"
        return None


def _step_of(directory: Path) -> int:
    return int(directory.name.removeprefix(_PREFIX))


def _read_json(path: Path) -> Any:
    return parse_json(read_regular(path, most=_LARGEST_JSON) or b"")


def _read_progress(directory: Path) -> TrainingProgress:
    """Read progress.json of a checkpoint.

    Raises:
        ValueError: it holds what no run can have written there: a sequence, for one, has at least a token.
    """
    content = _read_json(directory / _PROGRESS)
    require_fields(_PROGRESS, content, TrainingProgress)
    for name in ("step", "cursor", "tokens"):
        require_whole(name, content[name], least=0, most=_LARGEST_COUNT)
    if content["step"] != _step_of(directory) or content["cursor"] > content["tokens"]:
        raise ValueError(f"no run stands there after step {_step_of(directory)}: {short(content)}")
    if not is_amount(content["seconds"]) or content["seconds"] < 0:
        raise ValueError(f"seconds: {short(content['seconds'])}")
    return TrainingProgress(**content)


def _load(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingProgress:
    """Load a checkpoint that verifies.

    Raises:
        IdentityError: it is of another model, as another version of transformers may build, or another optimizer.
    """
    wanted = _model_tensors(model)
    weights, moments, states = (load_file(directory / name) for name in _FILES[:3])
    _require_like("model", weights, {name: tensor.shape for name, tensor in wanted.items()}, directory)
    own = dict(model.named_parameters())
    shapes = {key: own[key.rpartition("/")[0]].shape for key in moments if key.rpartition("/")[0] in own}
    counters = {key: value.shape for key, value in moments.items() if key.endswith("/step") and value.dim() == 0}
    _require_like("optimizer", moments, shapes | counters, directory)
    _require_like("random numbers", states, {"cpu": torch.get_rng_state().shape}, directory, others=True)
    for name, tensor in wanted.items():
        tensor.copy_(like(weights[name], tensor))
    _restore_optimizer(model, optimizer, moments)
    _restore_random(states)
    return _read_progress(directory)


def _require_like(
    what: str, found: Mapping[str, Tensor], wanted: Mapping[str, torch.Size], directory: Path, *, others: bool = False
) -> None:
    """Raise IdentityError unless there are the wanted tensors, in their shapes, and without `others` none besides."""
    for name in sorted(wanted.keys() | (set() if others else found.keys())):
        has = tuple(found[name].shape) if name in found else None
        needs = tuple(wanted[name]) if name in wanted else None
        if has != needs:
            raise IdentityError(
                f"it is of another {what}: {name} is {has or 'missing'} there and {needs or 'missing'} here",
                where=str(directory),
                fix="use the versions of topk-distill and transformers that made it, or another run directory",
            )


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name. `named_parameters` gives tied weights once."""
    persistent = model.state_dict().keys()
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach() for name, tensor in named if name in persistent}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.detach()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, value in tensors.items():
        name, state = key.rsplit("/", 1)
        parameter = parameters[name]
        # Fused AdamW wants its step counter beside the parameter; safetensors gives every tensor on the CPU.
        optimizer.state[parameter][state] = like(value, parameter).clone()


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _restore_random(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda:{index}" in states:
            torch.cuda.set_rng_state(states[f"cuda:{index}"], index)


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _describe(directory: Path, sizes: Mapping[str, object] | None = None) -> dict[str, dict[str, object]]:
    """Return size and sha256 of each file but the manifest; with `sizes`, no hash of one that has another size.

    Raises:
        CorruptionError: one is not a file.
    """
    described: dict[str, dict[str, object]] = {}
    for path in sorted(directory.iterdir()):
        if path.name != _MANIFEST:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                wanted = sizes is None or sizes.get(path.name) == size
                digest = hashlib.file_digest(file, "sha256").hexdigest() if wanted else "not looked at"
            described[path.name] = {"bytes": size, "sha256": digest}
    return described
