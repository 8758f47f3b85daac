"""Time and memory of the losses, head matrix product and backward included, beside plain cross-entropy and peers.

    python -m benchmarks.losses                 a brief look: one setting, three rounds, about a minute
    python -m benchmarks.losses --full          every setting, 11 rounds: some hours on two cores
    python -m benchmarks.losses --full --tokens 1024 --dtype bfloat16 --save benchmarks/results
                                                some of them, kept as losses.jsonl and losses.md
    python -m benchmarks.losses --cpu-time      process time instead of wall time, for a machine that is shared

Cases of one setting run interleaved in one process; a number is the median over rounds of the ratio to cross-entropy in
the same round. Memory is the growth of the resident set's high-water mark in a fresh process per case (Linux); a case
that asks for more than half of the machine's memory is left out of the setting, and said so.

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
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.loss_cases import CASES, FASTER, GOALS, SMALLER, Inputs, Setting


@dataclass(frozen=True, kw_only=True)
class Result:
    """One setting measured: medians of ratios to cross-entropy, and peaks in MiB (None where they cannot be had)."""

    setting: Setting
    rounds: int
    clock: str
    threads: int
    torch: str
    cross_entropy_seconds: float
    ratio: dict[str, float]
    mib: dict[str, float | None]
    left_out: dict[str, str]


def measure(setting: Setting, names: list[str], rounds: int, clock_name: str) -> Result:
    """Memory of each case in a process of its own, then all of them in turn in this one."""
    mib: dict[str, float | None] = {}
    left_out: dict[str, str] = {}
    for name in names:
        try:
            mib[name] = peak_mib(setting, name)
        except (MemoryError, ImportError) as reason:
            left_out[name] = str(reason)
    inputs = Inputs.make(setting)
    steps = {name: CASES[name](inputs) for name in mib}
    for step in steps.values():
        step()
    clock = {"process": time.process_time, "wall": time.perf_counter}[clock_name]
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            inputs.hidden_ND.grad = inputs.weight_VD.grad = None
            start = clock()
            step()
            taken[name].append(clock() - start)
    base = taken["cross-entropy"]
    return Result(
        setting=setting,
        rounds=rounds,
        clock=clock_name,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        cross_entropy_seconds=statistics.median(base),
        ratio={n: statistics.median(a / b for a, b in zip(times, base, strict=True)) for n, times in taken.items()},
        mib=mib,
        left_out=left_out,
    )


def peak_mib(setting: Setting, name: str) -> float | None:
    """High-water mark of a fresh process over one step, in MiB beyond its inputs; None where it cannot be had.

    Raises:
        ImportError: the case's library is not there.
        MemoryError: it wants more than half of the machine's memory.
    """
    argument = json.dumps({"setting": vars(setting), "case": name})
    command = [sys.executable, "-m", "benchmarks.losses", "--memory-of", argument]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return float(done.stdout) if done.stdout.strip() else None
    reason = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
    if "can't allocate" in done.stderr or "MemoryError" in done.stderr or done.returncode < 0:
        raise MemoryError("more than half of the machine's memory")
    raise ImportError(reason)


def _memory_of(argument: str) -> None:
    wanted = json.loads(argument)
    setting, case = Setting(**wanted["setting"]), CASES[wanted["case"]]
    case(Inputs.make(Setting(tokens=8, vocab=512, k=16, dtype=setting.dtype)))()  # libraries allocate on first use
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
    """A line of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def table(result: Result) -> list[str]:
    """A setting's table and how it stands to the goals, as markdown."""
    setting = result.setting
    lines = [
        f"### {setting.dtype}, {setting.tokens:,} tokens, V={setting.vocab:,}, k={setting.k}",
        "",
        f"{result.rounds} rounds, {result.clock} time, {result.threads} threads, torch {result.torch}; "
        f"cross-entropy {result.cross_entropy_seconds:.2f} s.",
        "",
        f"| {'case':<38} | time | peak MiB |",
        "|---|---|---|",
    ]
    for name, value in result.ratio.items():
        mib = result.mib[name]
        lines.append(f"| {name:<38} | {value:.2f}x | {'-' if mib is None else f'{mib:.0f}'} |")
    lines += [f"| {name:<38} | left out: {why} | |" for name, why in result.left_out.items()]
    verdicts = [_verdict(result, name) for name in GOALS if name in result.ratio]
    return [*lines, "", *[f"* {verdict}" for verdict in verdicts], ""]


def _verdict(result: Result, name: str) -> str:
    """One of our cases against its limit, its floor, and the best peer that does the same work."""
    limit, peers = GOALS[name]
    time_, mine, base = result.ratio[name], result.mib[name], result.mib["cross-entropy"]
    # The teacher's logits are a fourth product, as large as each of the three.
    products, floor = ("four", 4 / 3) if "full" in name else ("three", 1.0)
    floor *= result.ratio["three products"]
    parts = [
        f"{name}: {time_:.2f}x (allowed {limit}x: {'met' if time_ <= limit else 'MISSED'})",
        f"its {products} products alone {floor:.2f}x",
    ]
    if mine and base:
        parts.append(f"peak {mine / base:.2f}x of cross-entropy's")
    rivals = [peer for peer in peers if peer in result.ratio]
    if rivals:
        best = min(rivals, key=lambda peer: result.ratio[peer])
        faster, possible = result.ratio[best] / time_, result.ratio[best] / floor
        met = "met" if faster >= FASTER else f"MISSED, its products alone would be {possible:.1f} times faster"
        parts.append(f"{faster:.1f} times faster than {best} (goal {FASTER}: {met})")
        least = min((result.mib[peer] or 0.0 for peer in rivals), default=0.0)
        if mine and least:
            met = "met" if least / mine >= SMALLER else "MISSED"
            parts.append(f"{least / mine:.1f} times less memory than the least of the peers (goal {SMALLER}: {met})")
    return "; ".join(parts)


def save(result: Result, folder: Path) -> None:
    """Adds a result to losses.jsonl, in place of an earlier one of its setting, and writes losses.md anew."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "losses.jsonl"
    kept = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    mine = json.loads(json.dumps(asdict(result)))
    kept = [*(item for item in kept if item["setting"] != mine["setting"]), mine]
    kept.sort(key=lambda item: [item["setting"][name] for name in ("dtype", "tokens", "vocab", "k")])
    log.write_text("".join(json.dumps(item) + "\n" for item in kept))
    results = [Result(**{**item, "setting": Setting(**item["setting"])}) for item in kept]
    text = ["# Losses: time and memory", "", "Written by `python -m benchmarks.losses --save`.", ""]
    (folder / "losses.md").write_text("\n".join(text + [line for item in results for line in table(item)]))


def settings_of(arguments: argparse.Namespace) -> list[Setting]:
    """The brief look, or all settings of a full one that were asked for."""
    if not arguments.full:
        return [Setting()]
    return [
        Setting(tokens=tokens, vocab=vocab, k=k, dtype=dtype)
        for dtype in ("bfloat16", "float32")
        for tokens in (1024, 4096)
        for vocab in (49_152, 151_936)
        for k in (40, 64)
        if arguments.dtype in (None, dtype)
        and arguments.tokens in (None, tokens)
        and arguments.vocab in (None, vocab)
        and arguments.k in (None, k)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every setting, 11 rounds")
    for name, kind in (("dtype", str), ("tokens", int), ("vocab", int), ("k", int)):
        parser.add_argument(f"--{name}", type=kind, help="with --full: only settings with this")
    parser.add_argument("--cpu-time", action="store_true", help="process time instead of wall time")
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--rounds", type=int, help="repetitions of each case")
    parser.add_argument("--only", help="cases whose name holds this, beside cross-entropy and the three products")
    parser.add_argument("--skip", help="leaves out cases whose name holds this")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="keep results as losses.jsonl and losses.md there")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        _memory_of(arguments.memory_of)
        return
    rounds, clock = arguments.rounds or (11 if arguments.full else 3), "process" if arguments.cpu_time else "wall"
    for setting in settings_of(arguments):
        # How many entries a row has matters to the sparse cases only.
        only = arguments.only or ("" if setting.k == 40 else "sparse")
        names = [name for name in CASES if only in name or name in list(CASES)[:2]]
        names = [name for name in names if not arguments.skip or arguments.skip not in name]
        result = measure(setting, names, rounds, clock)
        print("\n".join(table(result)), flush=True)
        if arguments.save:
            save(result, arguments.save)


if __name__ == "__main__":
    main()
