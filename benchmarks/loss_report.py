"""What `benchmarks.losses` found, as markdown: tables, and each goal with what is allowed, found, and possible at all.

Results are kept one to a line of losses.jsonl; losses.md is written from those lines and from nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.loss_cases import WIDTH, Setting

MIB = 1 << 20
CHUNK, SLACK = 256, 20  # rows of logits that our fused losses hold by default; MiB allowed beside them
FASTER, SMALLER = 1.5, 2.5  # than the best peer: times, and bytes of memory


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


@dataclass(frozen=True, kw_only=True)
class Aim:
    """What one case of ours is held to: times of cross-entropy's, a rule for its peak, peers that do the same work."""

    time: tuple[float, ...]  # the limit and, where there is one, the goal
    peak: str | None = None
    peers: tuple[str, ...] = ()


AIMS: dict[str, Aim] = {
    "ours: fused sparse forward KL + CE": Aim(
        time=(1.0, 0.85),
        peak="sparse",
        peers=("trl sparse forward KL with tail", "nemo KDLoss, teacher free", "torchtune forward KL, teacher free"),
    ),
    "ours: fused sparse reverse KL + CE": Aim(time=(1.3,), peers=("torchtune reverse KL, teacher free",)),
    "ours: fused sparse JSD + CE": Aim(time=(1.3,), peers=("trl JSD, teacher free",)),
    "ours: fused full forward KL + CE": Aim(
        time=(1.7, 1.4), peak="full", peers=("nemo KDLoss", "torchtune forward KL", "trl chunked forward KL")
    ),
    "ours: fused full JSD + CE": Aim(
        time=(1.7, 1.4), peak="full", peers=("trl JSD", "trl chunked JSD", "liger fused JSD + CE")
    ),
}


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A number against what is allowed; `floor` is what could be had if a loss cost nothing beside its products."""

    what: str
    allowed: float
    found: float | None
    floor: float | None
    unit: str = "x"
    at_least: bool = False

    @property
    def verdict(self) -> str:
        """Of the number that was found."""
        if self.found is None:
            return "not measured"
        return "met" if (self.found >= self.allowed if self.at_least else self.found <= self.allowed) else "MISSED"

    def line(self, case: str) -> str:
        """Return its row of the table."""
        sign = "≥" if self.at_least else "≤"
        allowed, found, floor = (self._text(value) for value in (self.allowed, self.found, self.floor))
        return f"| {case} | {self.what} | {sign} {allowed} | {found} | {self.verdict} | {floor} |"

    def _text(self, value: float | None) -> str:
        if value is None:
            return "-"
        return f"{value:.0f} MiB" if self.unit == "MiB" else f"{value:.3g}x"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A result among those of the other settings: dense peers do not depend on k and are measured at one k only."""

    result: Result
    others: list[Result]

    def ratio(self, name: str) -> float | None:
        """Return its time as a multiple of cross-entropy's."""
        return next((item.ratio[name] for item in self._same_work() if name in item.ratio), None)

    def mib(self, name: str) -> float | None:
        """Return its peak in MiB."""
        return next((item.mib[name] for item in self._same_work() if name in item.mib), None)

    def mib_at(self, tokens: int, name: str) -> float | None:
        """Return the peak of the setting that differs in the number of tokens alone."""
        wanted = {**vars(self.result.setting), "tokens": tokens}
        return next((item.mib.get(name) for item in self.others if vars(item.setting) == wanted), None)

    def _same_work(self) -> Iterator[Result]:
        yield self.result
        mine = {**vars(self.result.setting), "k": None}
        yield from (item for item in self.others if {**vars(item.setting), "k": None} == mine)

    def goals(self, name: str) -> Iterator[Goal]:
        """Return all that one of our cases is held to in this setting."""
        aim, products = AIMS[name], self.ratio("three products")
        least = self._least_peak(chunks=2 if aim.peak == "full" else 1)
        # The teacher's logits are a fourth product, as large as each of the three.
        floor = products and products * (4 / 3 if aim.peak == "full" else 1)
        for kind, allowed in zip(("limit", "goal"), aim.time, strict=False):
            what = f"time beside cross-entropy's, {kind}"
            yield Goal(what=what, allowed=allowed, found=self.ratio(name), floor=floor)
        if aim.peak == "sparse":
            yield from self._sparse_peak(name, least)
        elif aim.peak == "full":
            yield self._beside_cross_entropy(name, 0.6, least)
        yield from self._peers(name, floor, least)

    def _least_peak(self, chunks: int) -> float:
        """Return the gradient of the weight and one chunk of logits for each side, MiB."""
        setting = self.result.setting
        return (WIDTH + chunks * CHUNK) * setting.vocab * setting.bytes / MIB

    def _sparse_peak(self, name: str, least: float) -> Iterator[Goal]:
        setting, found = self.result.setting, self.mib(name)
        yield Goal(
            what=f"peak: chunk, weight gradient, {SLACK} MiB",
            allowed=least + SLACK,
            found=found,
            floor=least,
            unit="MiB",
        )
        if setting.tokens < 4096:
            return
        yield self._beside_cross_entropy(name, 0.1, least)
        before = self.mib_at(1024, name)
        yield Goal(
            what="flat: growth of the peak since 1,024 tokens",
            allowed=SLACK,
            found=None if found is None or before is None else found - before,
            floor=(setting.tokens - 1024) * WIDTH * setting.bytes / MIB,  # the gradient of hidden
            unit="MiB",
        )

    def _beside_cross_entropy(self, name: str, allowed: float, least: float) -> Goal:
        found, base = self.mib(name), self.mib("cross-entropy")
        return Goal(
            what="peak beside cross-entropy's",
            allowed=allowed,
            found=found / base if found and base else None,
            floor=least / base if base else None,
        )

    def _peers(self, name: str, floor: float | None, least: float) -> Iterator[Goal]:
        times = {peer: time for peer in AIMS[name].peers if (time := self.ratio(peer))}
        sizes = {peer: size for peer in AIMS[name].peers if (size := self.mib(peer))}
        mine, size = self.ratio(name), self.mib(name)
        best = min(times, key=times.__getitem__, default=None)
        yield Goal(
            what="faster than the best peer" + (f", {best}" if best else ""),
            allowed=FASTER,
            found=times[best] / mine if best and mine else None,
            floor=times[best] / floor if best and floor else None,
            at_least=True,
        )
        leanest = min(sizes, key=sizes.__getitem__, default=None)
        yield Goal(
            what="smaller than the best peer" + (f", {leanest}" if leanest else ""),
            allowed=SMALLER,
            found=sizes[leanest] / size if leanest and size else None,
            floor=sizes[leanest] / least if leanest else None,
            at_least=True,
        )


def table(result: Result, others: list[Result]) -> list[str]:
    """Return a setting's times and peaks, and its goals, as markdown.

    Args:
        result: of this setting.
        others: all that is known, for what is compared between settings.
    """
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
    standing = Standing(result=result, others=others)
    goals = [goal.line(name) for name in AIMS if name in result.ratio for goal in standing.goals(name)]
    if goals:
        lines += ["", "| case | goal | allowed | found | | floor |", "|---|---|---|---|---|---|", *goals]
    return [*lines, ""]


def save(results: list[Result], folder: Path) -> None:
    """Add results to losses.jsonl, in place of earlier ones of their settings, and writes losses.md anew."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "losses.jsonl"
    new = [item.setting for item in results]
    kept = [item for item in _load(log) if item.setting not in new] if log.exists() else []
    kept = sorted([*kept, *results], key=lambda item: (item.setting.dtype, *_numbers(item.setting)))
    log.write_text("".join(json.dumps(asdict(item)) + "\n" for item in kept))
    render(folder)


def render(folder: Path) -> None:
    """Write losses.md from losses.jsonl."""
    results = _load(folder / "losses.jsonl")
    lines = [line for item in results for line in table(item, results)]
    (folder / "losses.md").write_text("\n".join([*_HEAD, *lines]))


def _numbers(setting: Setting) -> tuple[int, int, int]:
    return setting.tokens, setting.vocab, setting.k


def _load(log: Path) -> list[Result]:
    items = [json.loads(line) for line in log.read_text().splitlines()]
    return [Result(**{**item, "setting": Setting(**item["setting"])}) for item in items]


_HEAD = (
    "# Losses: time and memory",
    "",
    "Written by `python -m benchmarks.losses --save`; with `--render` anew from losses.jsonl.",
    "Times are medians of ratios to cross-entropy in the same round, head product and backward included.",
    "The floor is a loss that takes no time beside its matrix products (three, and a fourth for a full teacher) and",
    "holds nothing beside the gradient of the weight and a chunk of logits for each side; it grows with the tokens",
    "by the gradient of the hidden states. Dense peers do not depend on k: they are measured at k=40 only.",
    "",
)
