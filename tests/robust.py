"""Run the suite under other circumstances: `make test-robust`, about half an hour on two cores, not in CI.

No assertion may depend on the processor's arithmetic, the number of threads, the locale, the time zone, the home
directory, the temporary file system, the user or the order of tests. Each setting below changes several of them at
once, in a copy of the repository; a test that fails under one is a fault of the test or of the product.

    python tests/robust.py [--only PART-OF-A-NAME] [--arguments-of-pytest ...]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A user without a name, a home or a right to anything, as containers on a cluster have it.
NOBODY = 54_321


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Circumstances of one run of the suite.

    Attributes:
        name: what differs, for people.
        environment: variables that are set; they lower what torch (ATEN_CPU_CAPABILITY) and oneDNN may use.
        arguments: of pytest.
        workers: processes of pytest; one where each takes two threads.
        other_user: run as NOBODY, where this process may choose.
        memory: temporary files lie in memory (/dev/shm) and not on disk.
    """

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    workers: int = 2
    other_user: bool = False
    memory: bool = False


SETTINGS = (
    Setting(
        name="ATen default, C locale without UTF-8, time zone +14",
        environment={
            "ATEN_CPU_CAPABILITY": "default",
            "LC_ALL": "C",
            "PYTHONCOERCECLOCALE": "0",
            "PYTHONUTF8": "0",
            "TZ": "Pacific/Kiritimati",
        },
    ),
    Setting(
        name="ATen and oneDNN avx2, two threads",
        environment={"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "TOPK_DISTILL_TEST_THREADS": "2"},
        workers=1,
    ),
    Setting(
        name="oneDNN avx2, another user without a home, files in memory",
        environment={"ONEDNN_MAX_CPU_ISA": "AVX2", "HOME": "/nonexistent", "USER": "", "LOGNAME": ""},
        other_user=True,
        memory=True,
    ),
    Setting(name="ATen avx2, random order", environment={"ATEN_CPU_CAPABILITY": "avx2"}, arguments=("--shuffle=1",)),
)


def main() -> None:
    """Run the chosen settings one after the other, and end with how each went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="settings whose name contains this")
    options, arguments = parser.parse_known_args()
    chosen = [setting for setting in SETTINGS if options.only in setting.name]
    if not chosen:
        parser.error(f"no setting has {options.only!r} in its name: {[setting.name for setting in SETTINGS]}")
    outcomes = [(setting.name, *run(setting, arguments)) for setting in chosen]
    print(f"\n{'s':>5}  {'rc':>2}  setting")
    for name, code, seconds in outcomes:
        print(f"{seconds:5.0f}  {code:2d}  {name}")
    sys.exit(any(code for _, code, _ in outcomes))


def run(setting: Setting, arguments: list[str]) -> tuple[int, float]:
    """Run the suite in a copy of the tracked files; return pytest's exit status and the seconds it took."""
    print(f"\n== {setting.name}", flush=True)
    user = NOBODY if setting.other_user and os.geteuid() == 0 else None
    if setting.other_user and user is None:
        print(f"   (as user {os.geteuid()}: only root may choose another)", flush=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if setting.memory else None, prefix="robust-") as directory:
        tree, temporary = Path(directory, "tree"), Path(directory, "tmp")
        copy_tracked(tree)
        temporary.mkdir()
        if user is not None:
            for path in (Path(directory), *Path(directory).rglob("*")):
                os.chown(path, user, user, follow_symlinks=False)
        environment = {"TMPDIR": str(temporary), "PYTHONPATH": str(tree), **setting.environment}
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *setting.arguments, *arguments]
        spread = ["--numprocesses", str(setting.workers), "--dist", "loadfile", "--no-loadscope-reorder"]
        done = subprocess.run(
            command + spread, cwd=tree, env={**os.environ, **environment}, user=user, group=user,
            extra_groups=None if user is None else [], check=False,
        )  # fmt: skip
    return done.returncode, time.perf_counter() - started


def copy_tracked(tree: Path) -> None:
    """Copy what git tracks, as it lies in the working tree."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)


if __name__ == "__main__":
    main()
