"""Time and memory of the losses, head matrix product and backward included, beside plain cross-entropy and peers.

    python -m benchmarks.losses                 a brief look: one setting, three rounds, about a minute
    python -m benchmarks.losses --full          every setting, 11 rounds: some hours on two cores
    python -m benchmarks.losses --full --tokens 1024 --dtype bfloat16 --save benchmarks/results
                                                some of them, kept as losses.jsonl and losses.md
    python -m benchmarks.losses --render benchmarks/results
                                                losses.md anew from losses.jsonl, nothing measured
    python -m benchmarks.losses --cpu-time      process time instead of wall time, for a machine that is shared

Cases of one setting run interleaved in one process, both k together, and what does not depend on k once. A number is
the median over rounds of the ratio to cross-entropy in the same round. Memory is the growth of the resident set's
high-water mark in a fresh process per case (Linux); a case that asks for more than half of the machine's memory is left
out of the setting, and said so. Each goal is printed with what was found and with what could be had at all.

Peers run where they can be imported. Put their site-packages on PYTHONPATH; they need none of their dependencies but
trl, which needs transformers, datasets and accelerate:

    pip install --no-deps --target peers nemo-automodel trl liger-kernel torchtune
    PYTHONPATH=peers python -m benchmarks.losses

Sparse rows of ours are compared with dense losses of theirs that are handed their teacher logits for nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.loss_cases import BASE, CASES, Case, Inputs, Setting, sparse_rows
from benchmarks.loss_report import Result, render, save, table

Value = TypeVar("Value")


def measure(settings: list[Setting], names: list[str], rounds: int, clock_name: str) -> list[Result]:
    """Measure the memory of each case in a process of its own, then the time of all in turn in this one.

    Args:
        settings: they differ in k alone; cases that do not depend on k are measured in the first only.
        names: of CASES, with all of BASE.
        rounds: how often each case is timed.
        clock_name: "process" or "wall".
    """
    first = settings[0]
    mib: dict[tuple[Setting, str], float | None] = {}
    left_out: dict[tuple[Setting, str], str] = {}
    for setting in settings:
        for name in names if setting == first else [name for name in names if _depends_on_k(name)]:
            try:
                mib[setting, name] = peak_mib(setting, name)
            except (MemoryError, ImportError) as reason:
                left_out[setting, name] = str(reason)
    clock = {"process": time.process_time, "wall": time.perf_counter}[clock_name]
    taken = _times(first, list(mib), rounds, clock)
    base = taken[first, "cross-entropy"]
    ratio = {case: statistics.median(a / b for a, b in zip(times, base, strict=True)) for case, times in taken.items()}
    return [
        Result(
            setting=setting,
            rounds=rounds,
            clock=clock_name,
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            cross_entropy_seconds=statistics.median(base),
            ratio=_of(setting, first, ratio),
            mib=_of(setting, first, mib),
            left_out=_of(setting, first, left_out),
        )
        for setting in settings
    ]


def _times(
    first: Setting, cases: list[tuple[Setting, str]], rounds: int, clock: Callable[[], float]
) -> dict[tuple[Setting, str], list[float]]:
    """Return the seconds of each case in each round, all on the same hidden states and heads."""
    for setting, name in cases:
        _first_use(setting, CASES[name])
    inputs = Inputs.make(first)
    of_each = dict.fromkeys(setting for setting, _ in cases)
    given = {s: inputs if s == first else replace(inputs, targets=sparse_rows(s)) for s in of_each}
    steps = {(setting, name): CASES[name](given[setting]) for setting, name in cases}
    taken: dict[tuple[Setting, str], list[float]] = {case: [] for case in steps}
    for _ in range(rounds):
        for case, step in steps.items():
            inputs.hidden_ND.grad = inputs.weight_VD.grad = None
            start = clock()
            step()
            taken[case].append(clock() - start)
    return taken


def _first_use(setting: Setting, case: Case) -> None:
    """Let libraries load and allocate what they keep."""
    case(Inputs.make(Setting(tokens=8, vocab=512, k=16, dtype=setting.dtype)))()


def _depends_on_k(name: str) -> bool:
    return "sparse" in name


def _of(setting: Setting, first: Setting, values: dict[tuple[Setting, str], Value]) -> dict[str, Value]:
    """Return what was found for one setting, and what all settings are compared with."""
    return {name: value for (s, name), value in values.items() if s == setting or (s == first and name in BASE)}


def peak_mib(setting: Setting, name: str) -> float | None:
    """Return a fresh process's high-water mark over one step, in MiB beyond its inputs; None if it cannot be had.

    Every tensor of that process has a mapping of its own, so that freed memory leaves the resident set at once. glibc
    keeps it otherwise, by chance: now and then 40 to 60 MiB that the making of the inputs had freed.

    Raises:
        ImportError: the case's library is not there.
        MemoryError: it wants more than half of the machine's memory.
    """
    argument = json.dumps({"setting": vars(setting), "case": name})
    command = [sys.executable, "-m", "benchmarks.losses", "--memory-of", argument]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(64 << 10)}  # fixed: glibc raises its own while it runs
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode == 0:
        return float(done.stdout) if done.stdout.strip() else None
    reason = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
    if "can't allocate" in done.stderr or "MemoryError" in done.stderr or done.returncode < 0:
        raise MemoryError("more than half of the machine's memory")
    raise ImportError(reason)


def _memory_of(argument: str) -> None:
    wanted = json.loads(argument)
    setting, case = Setting(**wanted["setting"]), CASES[wanted["case"]]
    _first_use(setting, case)
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    resource.setrlimit(resource.RLIMIT_DATA, (half, half))
    step = case(Inputs.make(setting))
    if not Path("/proc/self/clear_refs").exists():
        return
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    step()
    print((_status("VmHWM") - before) / 1024)


def _status(key: str) -> int:
    """Return a line of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def settings_of(arguments: argparse.Namespace) -> list[list[Setting]]:
    """Return the brief look, or the settings of a full one asked for; those that differ in k alone together."""
    if not arguments.full:
        return [[Setting()]]
    return [
        [Setting(tokens=tokens, vocab=vocab, k=k, dtype=dtype) for k in (40, 64)]
        for dtype in ("bfloat16", "float32")
        for tokens in (1024, 4096)
        for vocab in (49_152, 151_936)
        if arguments.dtype in (None, dtype) and arguments.tokens in (None, tokens) and arguments.vocab in (None, vocab)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every setting, 11 rounds")
    for name, kind in (("dtype", str), ("tokens", int), ("vocab", int)):
        parser.add_argument(f"--{name}", type=kind, help="with --full: only settings with this")
    parser.add_argument("--cpu-time", action="store_true", help="process time instead of wall time")
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--rounds", type=int, help="repetitions of each case")
    parser.add_argument("--only", help="cases whose name holds this, beside cross-entropy and the three products")
    parser.add_argument("--skip", help="leaves out cases whose name holds this")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="keep results as losses.jsonl and losses.md there")
    parser.add_argument("--render", type=Path, metavar="FOLDER", help="only write its losses.md from its losses.jsonl")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        _memory_of(arguments.memory_of)
        return
    if arguments.render:
        render(arguments.render)
        return
    rounds, clock = arguments.rounds or (11 if arguments.full else 3), "process" if arguments.cpu_time else "wall"
    names = [name for name in CASES if not arguments.only or arguments.only in name or name in BASE]
    names = [name for name in names if not arguments.skip or arguments.skip not in name]
    measured: list[Result] = []
    for settings in settings_of(arguments):
        results = measure(settings, names, rounds, clock)
        measured += results
        for result in results:
            print("\n".join(table(result, measured)), flush=True)
        if arguments.save:
            save(results, arguments.save)


if __name__ == "__main__":
    main()
