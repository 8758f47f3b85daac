"""`pipeline doctor`: what this machine is, and whether a store can be written safely at a place.

Every check looks at the real thing: library versions against the declared ranges, the device that `auto` picks, and
the guarantees of the commit protocol (synced file, exclusive hard link, renamed directory) with probe files.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from pipeline.terminal.application import DISTRIBUTION
from storage.errors import StorageUnavailableError, UsageError
from storage.files import open_files
from storage.threads import usable_cores

Level = Literal["ok", "warn", "fail"]
LOW_MEMORY = 4 * 2**30  # bytes; a 135M teacher with its logits needs about half of it
LOW_DISK = 5 * 2**30  # bytes; about 70 million rows of a hybrid store


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the report.

    Attributes:
        level: ok; warn: works, but think of it; fail: extract or train will not work.
        topic: what was looked at.
        found: what was found.
        fix: what to do about it, unless ok.
        exit_code: code that a fail stands for.
    """

    level: Level
    topic: str
    found: str
    fix: str | None = None
    exit_code: int = UsageError.exit_code


def examine(path: Path) -> Iterator[Check]:
    """Look at this machine, and at `path` as the place of a store (it need not exist).

    Raises:
        UsageError: no store can be there.
    """
    open_files(path)
    yield _python()
    yield from _libraries()
    if find_spec("torch") is not None:
        yield from _processor()
        yield from _device()
    yield _memory()
    yield _disk(path)
    yield _commit_protocol(path)
    if find_spec("huggingface_hub") is not None:
        yield from _model_cache()


def exit_code(checks: Sequence[Check]) -> int:
    """Return 0 if nothing failed, else the code of the worst: storage before the rest."""
    return max((check.exit_code for check in checks if check.level == "fail"), default=0)


def _python() -> Check:
    found = f"{platform.python_version()} ({platform.system()} {platform.machine()})"
    return Check(level="ok", topic="python", found=found)


def declared_requirements() -> list[Requirement]:
    """Return what pyproject.toml declares, extras included: from the installed package, else from the source tree."""
    try:
        declared = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        project = _source_tree_project()
        declared = list(project["dependencies"])
        for extra, lines in project["optional-dependencies"].items():
            declared += [f"{line}; extra == '{extra}'" for line in lines]
    return [Requirement(line) for line in declared]


def _source_tree_project() -> dict[str, dict[str, list[str]]]:
    file = Path(__file__).resolve().parent.parent / "pyproject.toml"
    project: dict[str, dict[str, list[str]]] = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    return project


def _libraries() -> Iterator[Check]:
    """Check versions: a required library that is missing or out of range fails, a missing extra is only told."""
    good: list[str] = []
    absent: dict[str, list[str]] = {}
    for requirement in declared_requirements():
        extra = re.search(r"extra == ['\"](.+?)['\"]", str(requirement.marker or ""))
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = None
        if version is None and extra is not None:
            absent.setdefault(extra[1], []).append(requirement.name)
        elif version is None or not requirement.specifier.contains(version, prereleases=True):
            found = f"{requirement.name} {version or 'missing'}, declared {requirement.specifier}"
            fix = f"pip install '{requirement.name}{requirement.specifier}'"
            yield Check(level="fail" if extra is None else "warn", topic="libraries", found=found, fix=fix)
        elif extra is None:
            good.append(f"{requirement.name} {version}")
    yield Check(level="ok", topic="libraries", found=", ".join(good))
    for name, missing in absent.items():
        fix = f"only if you need it: pip install '{DISTRIBUTION}[{name}]'"
        yield Check(level="ok", topic="extras", found=f"{name}: without {', '.join(missing)}", fix=fix)


def _processor() -> Iterator[Check]:
    import torch

    usable = usable_cores()
    threads = torch.get_num_threads()
    found = f"{usable} usable cores, {threads} threads, {torch.backends.cpu.get_cpu_capability()}"
    if threads > usable:
        fix = f"more threads than cores slow everything down: set OMP_NUM_THREADS={usable}"
        yield Check(level="warn", topic="processor", found=found, fix=fix)
    else:
        yield Check(level="ok", topic="processor", found=found)


def _device() -> Iterator[Check]:
    from stages.devices import dtype_name, has_native_bfloat16, resolve_device, resolve_dtype

    device = resolve_device("auto")
    found = f"auto is {device}, {dtype_name(resolve_dtype('auto', device))}"
    if has_native_bfloat16(device):
        yield Check(level="ok", topic="device", found=found)
    else:
        fix = "nothing: float32 is right here; a processor or GPU with bfloat16 would be 2 to 4 times faster"
        yield Check(level="warn", topic="device", found=f"{found} (no native bfloat16)", fix=fix)


def _memory() -> Check:
    free = _available_memory()
    if free is None:
        return Check(level="ok", topic="memory", found="unknown on this system")
    found = f"{_gib(free)} available"
    if free >= LOW_MEMORY:
        return Check(level="ok", topic="memory", found=found)
    fix = "lower batch_size, chunk_size and tokens_per_batch, or close other programs"
    return Check(level="warn", topic="memory", found=found, fix=fix)


def _available_memory() -> int | None:
    """Return the bytes that the kernel says are available, or what the control group leaves if that is less (Linux)."""
    try:
        information = Path("/proc/meminfo").read_text(encoding="ascii")
        free = int(re.findall(r"MemAvailable:\s+(\d+) kB", information)[0]) * 1024
    except (OSError, IndexError):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, int(limit) - used)


def _disk(path: Path) -> Check:
    place = _existing(path)
    free = shutil.disk_usage(place).free
    found = f"{_gib(free)} free at {place}"
    if free >= LOW_DISK:
        return Check(level="ok", topic="disk", found=found)
    return Check(level="warn", topic="disk", found=found, fix="about 75 bytes per token are needed: pipeline plan")


def _commit_protocol(path: Path) -> Check:
    place = _existing(path)
    topic = "file system"
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".topk-distill-doctor-") as probe:
            for what, step in _PROBES:
                error = _failure(step, Path(probe))
                if error is not None:
                    fix = "put the store on a local or POSIX-like file system that has it"
                    return _storage_failure(topic, f"{what} does not work at {place}: {error}", fix)
    except OSError as error:
        fix = "check permissions and mounts, or name another directory: pipeline doctor PATH"
        return _storage_failure(topic, f"cannot write at {place}: {error.strerror}", fix)
    return Check(level="ok", topic=topic, found=f"synced writes, exclusive links and renames work at {place}")


def _storage_failure(topic: str, found: str, fix: str) -> Check:
    return Check(level="fail", topic=topic, found=found, fix=fix, exit_code=StorageUnavailableError.exit_code)


def _failure(step: Callable[[Path], None], folder: Path) -> str | None:
    try:
        step(folder)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _probe_sync(folder: Path) -> None:
    for place in (folder / "file", folder):
        flags = os.O_RDONLY if place.is_dir() else os.O_WRONLY | os.O_CREAT
        descriptor = os.open(place, flags, 0o600)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _probe_link(folder: Path) -> None:
    os.link(folder / "file", folder / "link")
    try:
        os.link(folder / "file", folder / "link")
    except FileExistsError:
        return
    raise OSError(errno.EEXIST, "a second link to the same name was not refused")


def _probe_rename(folder: Path) -> None:
    (folder / "directory").mkdir()
    os.rename(folder / "directory", folder / "renamed")
    if not (folder / "renamed").is_dir():
        raise OSError(errno.ENOENT, "the renamed directory is not there")


_PROBES = (("fsync", _probe_sync), ("an exclusive hard link", _probe_link), ("renaming a directory", _probe_rename))


def _model_cache() -> Iterator[Check]:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    if os.access(_existing(cache), os.W_OK):
        yield Check(level="ok", topic="model cache", found=str(cache))
    else:
        fix = "set HF_HOME to a directory that can be written"
        yield Check(level="warn", topic="model cache", found=f"{cache} cannot be written", fix=fix)
    if constants.HF_HUB_OFFLINE:
        found = "HF_HUB_OFFLINE is set: only local directories and cached models"
    else:
        found = "hub names are downloaded once, then cached; HF_HUB_OFFLINE=1 forbids it"
    yield Check(level="ok", topic="network", found=found)


def _existing(path: Path) -> Path:
    """Return the path itself, or the nearest directory above it that exists."""
    place = path.absolute()
    while not place.is_dir():
        place = place.parent
    return place


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
