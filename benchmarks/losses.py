"""Time and memory of the losses, head matrix product and backward included, beside plain cross-entropy and peers.

    python benchmarks/losses.py                 a brief look: one setting, three rounds, about a minute
    python benchmarks/losses.py --full          every setting of the table in README, 11 rounds
    python benchmarks/losses.py --cpu-time      process time instead of wall time, for a machine that is shared

Cases of one setting run interleaved in one process; a number is the median over rounds of the ratio to cross-entropy in
the same round. Memory is the growth of the resident set's high-water mark in a fresh process per case (Linux).

Peers run where they can be imported. Put their site-packages on PYTHONPATH; they need none of their dependencies but
trl, which needs transformers, datasets and accelerate:

    pip install --no-deps --target peers nemo-automodel trl liger-kernel torchtune
    PYTHONPATH=peers python benchmarks/losses.py

Sparse rows of ours are compared with dense losses of theirs that are handed their teacher logits for nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.losses import FusedLinearCrossEntropy, FusedLinearKDLoss, KDLoss, SparseTargets, TeacherHead

WIDTH = 576


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row of the table."""

    tokens: int = 1024
    vocab: int = 49_152
    k: int = 40
    dtype: str = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Hidden states and head of both sides, labels, and a sparse teacher of k entries, 8 of them samples."""

    hidden_ND: Tensor
    weight_VD: Tensor
    teacher_hidden_ND: Tensor
    teacher_weight_VD: Tensor
    labels_N: Tensor
    targets: SparseTargets

    @classmethod
    def make(cls, setting: Setting) -> Inputs:
        """Random numbers of a teacher's usual shape, made without ever holding [tokens, vocab]."""
        torch.manual_seed(0)
        dtype = getattr(torch, setting.dtype)
        tokens, vocab, head = setting.tokens, setting.vocab, setting.k - 8
        step = vocab // setting.k
        ids_NE = (torch.randint(vocab, (tokens, 1)) + step * torch.arange(setting.k)) % vocab
        count_NE = torch.zeros(tokens, setting.k, dtype=torch.int32)
        count_NE[:, head:] = 1
        logprob_NE = torch.full((tokens, setting.k), -torch.inf)
        logprob_NE[:, :head] = torch.randn(tokens, head).log_softmax(-1).sort(-1, descending=True)[0] + math.log(0.86)
        targets = SparseTargets(
            ids_NE=ids_NE,
            logprob_NE=logprob_NE,
            head_size_N=torch.full((tokens,), head),
            count_NE=count_NE,
            draws=8,
            tail_logit_N=torch.full((tokens,), math.log(0.14 / 0.86)),
            entropy_N=torch.full((tokens,), 2.5),
        )
        return cls(
            hidden_ND=torch.randn(tokens, WIDTH).to(dtype).requires_grad_(),
            weight_VD=_weight(vocab, dtype).requires_grad_(),
            teacher_hidden_ND=torch.randn(tokens, WIDTH).to(dtype),
            teacher_weight_VD=_weight(vocab, dtype),
            labels_N=torch.randint(vocab, (tokens,)),
            targets=targets,
        )

    def teacher(self) -> TeacherHead:
        """The teacher as hidden states and head."""
        return TeacherHead(hidden_ND=self.teacher_hidden_ND, weight_VD=self.teacher_weight_VD)

    def logits(self) -> Tensor:
        """The student's, whole."""
        return self.hidden_ND @ self.weight_VD.t()

    def teacher_logits(self) -> Tensor:
        """The teacher's, whole."""
        return self.teacher_hidden_ND @ self.teacher_weight_VD.t()


def _weight(vocab: int, dtype: torch.dtype) -> Tensor:
    weight = torch.empty(vocab, WIDTH, dtype=dtype)
    for start in range(0, vocab, 4096):  # no float32 copy of the whole
        block = weight[start : start + 4096]
        block.copy_(torch.randn(len(block), WIDTH) * 0.1)
    return weight


Step = Callable[[], None]
Case = Callable[[Inputs], Step]


def cross_entropy(inputs: Inputs) -> Step:
    """What everything is measured against: logits in the model's precision, torch's own loss."""
    return lambda: torch.autograd.backward(F.cross_entropy(inputs.logits(), inputs.labels_N))


def three_products(inputs: Inputs) -> Step:
    """The limit: logits, gradient of hidden, gradient of weight, in chunks, and nothing else."""

    @torch.no_grad()
    def step() -> None:
        weight = inputs.weight_VD
        gradient = torch.zeros_like(weight)
        for rows in range(0, len(inputs.hidden_ND), 256):
            hidden = inputs.hidden_ND[rows : rows + 256]
            logits = hidden @ weight.t()
            torch.mm(logits, weight)
            gradient.addmm_(logits.t(), hidden)

    return step


def fused(divergence: str, teacher: str = "sparse") -> Case:
    def case(inputs: Inputs) -> Step:
        loss = FusedLinearKDLoss(divergence=divergence)
        targets = inputs.targets if teacher == "sparse" else inputs.teacher()
        return lambda: loss(inputs.hidden_ND, inputs.weight_VD, targets, inputs.labels_N).loss.backward()

    return case


def fused_cross_entropy(inputs: Inputs) -> Step:
    loss = FusedLinearCrossEntropy(reduction="mean")
    return lambda: loss(inputs.hidden_ND, inputs.labels_N, inputs.weight_VD).backward()


def dense_logits(inputs: Inputs) -> Step:
    loss = KDLoss()
    teacher = inputs.teacher_logits()
    return lambda: loss(inputs.logits(), teacher, inputs.labels_N).backward()


def peer(load: Callable[[], Callable[[Tensor, Tensor, Tensor], Tensor]], *, free_teacher: bool) -> Case:
    def case(inputs: Inputs) -> Step:
        function = load()
        given = inputs.teacher_logits() if free_teacher else None

        def step() -> None:
            teacher = inputs.teacher_logits() if given is None else given
            torch.autograd.backward(function(inputs.logits(), teacher, inputs.labels_N))

        return step

    return case


def liger(inputs: Inputs) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # type: ignore[import-not-found]

    loss = LigerFusedLinearJSDLoss(compiled=False)
    student, teacher = (inputs.hidden_ND, inputs.weight_VD), (inputs.teacher_hidden_ND, inputs.teacher_weight_VD)
    return lambda: loss(*student, *teacher, inputs.labels_N).backward()


def _file_of(distribution: str, path: str) -> Any:
    """One file of a distribution as a module, without its package and what that imports."""
    file = Path(str(importlib.metadata.distribution(distribution).locate_file(path)))
    spec = importlib.util.spec_from_file_location(file.stem + "_of_" + distribution.replace("-", "_"), file)
    if spec is None or spec.loader is None or not file.exists():
        raise ImportError(f"{distribution} has no {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_nemo() -> Any:
    return _file_of("nemo-automodel", "nemo_automodel/components/loss/kd_loss.py").KDLoss()


def load_torchtune() -> Any:
    return _file_of("torchtune", "torchtune/modules/loss/kd_losses.py").ForwardKLLoss()


def load_trl() -> Any:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer  # type: ignore[import-not-found]

    function = GKDTrainer.generalized_jsd_loss
    return lambda student, teacher, labels: function(student[None], teacher[None], labels[None], beta=0.5)


CASES: dict[str, Case] = {
    "cross-entropy": cross_entropy,
    "three products": three_products,
    "ours: fused cross-entropy": fused_cross_entropy,
    "ours: fused sparse forward KL + CE": fused("forward_kl"),
    "ours: fused sparse reverse KL + CE": fused("reverse_kl"),
    "ours: fused sparse JSD + CE": fused("jsd"),
    "ours: fused full forward KL + CE": fused("forward_kl", "head"),
    "ours: fused full JSD + CE": fused("jsd", "head"),
    "ours: KDLoss on logits": dense_logits,
    "nemo KDLoss, teacher free": peer(load_nemo, free_teacher=True),
    "torchtune forward KL, teacher free": peer(load_torchtune, free_teacher=True),
    "trl JSD, teacher free": peer(load_trl, free_teacher=True),
    "nemo KDLoss": peer(load_nemo, free_teacher=False),
    "torchtune forward KL": peer(load_torchtune, free_teacher=False),
    "trl JSD": peer(load_trl, free_teacher=False),
    "liger fused JSD + CE": liger,
}
# ours -> the largest ratio of time to cross-entropy that it may take (bfloat16), and the peers that do the same work
GOALS: dict[str, tuple[float, tuple[str, ...]]] = {
    "ours: fused sparse forward KL + CE": (1.0, ("nemo KDLoss, teacher free", "torchtune forward KL, teacher free")),
    "ours: fused sparse reverse KL + CE": (1.3, ()),
    "ours: fused sparse JSD + CE": (1.3, ("trl JSD, teacher free",)),
    "ours: fused full forward KL + CE": (1.7, ("nemo KDLoss", "torchtune forward KL")),
    "ours: fused full JSD + CE": (1.7, ("trl JSD", "liger fused JSD + CE")),
}


def ratios(setting: Setting, names: list[str], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median over rounds of each case's time divided by cross-entropy's."""
    inputs, steps = Inputs.make(setting), {}
    for name in names:
        try:
            steps[name] = CASES[name](inputs)
            steps[name]()
        except (ImportError, OSError) as reason:
            print(f"  {name}: left out, {str(reason).strip().splitlines()[0]}", file=sys.stderr)
            steps.pop(name, None)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            inputs.hidden_ND.grad = inputs.weight_VD.grad = None
            start = clock()
            step()
            taken[name].append(clock() - start)
    base = taken["cross-entropy"]
    return {name: statistics.median(a / b for a, b in zip(times, base, strict=True)) for name, times in taken.items()}


def peak_mib(setting: Setting, name: str) -> float | None:
    """High-water mark of a fresh process over one step, in MiB beyond its inputs; None where it cannot be had."""
    argument = json.dumps({"setting": vars(setting), "case": name})
    command = [sys.executable, __file__, "--memory-of", argument]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(done.stdout) if done.returncode == 0 and done.stdout.strip() else None


def _memory_of(argument: str) -> None:
    wanted = json.loads(argument)
    setting, case = Setting(**wanted["setting"]), CASES[wanted["case"]]
    case(Inputs.make(Setting(tokens=8, vocab=512, k=16, dtype=setting.dtype)))()  # libraries allocate on first use
    step = case(Inputs.make(setting))
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    step()
    print((_status("VmHWM") - before) / 1024)


def _status(key: str) -> int:
    """A line of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def report(setting: Setting, rounds: int, clock: Callable[[], float], names: list[str]) -> None:
    """Prints one setting's table and how it stands to the goals."""
    print(f"\n{setting.dtype}, {setting.tokens:,} tokens, V={setting.vocab:,}, k={setting.k}")
    times = ratios(setting, names, rounds, clock)
    memory = {name: peak_mib(setting, name) for name in times}
    for name, value in times.items():
        mib = memory[name]
        print(f"  {name:<40}{value:6.2f}x  {'' if mib is None else f'{mib:7.0f} MiB'}")
    for name, (limit, peers) in GOALS.items():
        if name not in times:
            continue
        line = f"  {name}: {times[name]:.2f}x"
        if setting.dtype == "bfloat16":
            line += f" (allowed {limit}x: {'met' if times[name] <= limit else 'MISSED'})"
        line += f", {times['three products']:.2f}x is the limit of three products"
        rivals = [peer for peer in peers if peer in times]
        if rivals:
            best = min(rivals, key=lambda peer: times[peer])
            line += f"; {times[best] / times[name]:.1f} times faster than {best}"
            mine, least = memory[name], min((memory[p] or 0.0 for p in rivals), default=0.0)
            if mine and least:
                line += f", {least / mine:.1f} times less memory"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every setting, 11 rounds")
    parser.add_argument("--cpu-time", action="store_true", help="process time instead of wall time")
    parser.add_argument("--threads", type=int, help="torch threads")
    parser.add_argument("--rounds", type=int, help="repetitions of each case")
    parser.add_argument("--only", help="cases whose name holds this, beside cross-entropy and the three products")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        _memory_of(arguments.memory_of)
        return
    settings = [Setting()]
    if arguments.full:
        settings = [
            Setting(tokens=tokens, vocab=vocab, k=k, dtype=dtype)
            for dtype in ("bfloat16", "float32")
            for vocab in (49_152, 151_936)
            for tokens in (1024, 4096)
            for k in (40, 64)
        ]
    names = [name for name in CASES if not arguments.only or arguments.only in name or name in list(CASES)[:2]]
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for setting in settings:
        report(setting, arguments.rounds or (11 if arguments.full else 3), clock, names)


if __name__ == "__main__":
    main()
