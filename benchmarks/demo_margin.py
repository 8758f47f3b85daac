"""By what margin the demo's claim holds, kd < ce < untrained in KL to the teacher, over seeds of the order.

    pipeline demo && python -m benchmarks.demo_margin --seeds 5 --save benchmarks/results

For each seed it trains the two twins on the demo's store as the demo does, another `seed` in their configurations and
nothing else, in directories of its own; then it scores all of them at once on the held-out documents. Twins of one
seed see the same text in the same order, so the margin of a seed is the difference within it. Seed 0 is the demo's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import yaml

from pipeline.config.loading import load_train
from pipeline.demo.comparison import CE, KD
from pipeline.demo.settings import UNTRAINED, DemoSettings
from pipeline.evaluate import evaluate
from pipeline.train import train

HEADER = """# The margin of the demo's claim

Written by `python -m benchmarks.demo_margin`: KL(teacher || student) in nats per token on the demo's held-out topics,
for twins that differ in `kd_ratio` alone, by the seed of the order in which they saw the store.

"""


def main() -> None:
    """Train, score and print; with --save, write demo_margin.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="a finished demo's directory")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--save", type=Path, help="directory of demo_margin.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        untrained, twins = measure(options.demo.resolve(), range(options.seeds), Path(scratch))
    text = table(untrained, twins)
    print(text)
    if options.save:
        (options.save / "demo_margin.md").write_text(HEADER + text)


def measure(demo: Path, seeds: range, scratch: Path) -> tuple[float, list[tuple[float, float]]]:
    """Return the KL of the untrained student, and of each seed's (kd, ce)."""
    models = {UNTRAINED: demo / "runs" / UNTRAINED / "model"}
    for seed in seeds:
        for name in (KD, CE):
            label = f"{name}-{seed}"
            content = {**DemoSettings().train_config(demo, name), "seed": seed, "run": str(scratch / label)}
            path = scratch / f"{label}.yaml"
            path.write_text(yaml.safe_dump(content))
            for _ in train(load_train(path)):
                pass
            models[label] = scratch / label / "model"
            print(f"trained {label}", flush=True)
    students = evaluate(demo / "store", models, demo / "teacher").students
    kl = {name: scores.kl for name, scores in students.items() if scores.kl is not None}
    return kl[UNTRAINED], [(kl[f"{KD}-{seed}"], kl[f"{CE}-{seed}"]) for seed in seeds]


def table(untrained: float, twins: list[tuple[float, float]]) -> str:
    """Return the KLs and margins of all seeds as Markdown."""
    lines = ["| seed | kd | ce | ce - kd |", "|---|---|---|---|"]
    lines += [f"| {seed} | {kd:.3f} | {ce:.3f} | {ce - kd:.3f} |" for seed, (kd, ce) in enumerate(twins)]
    margins = [ce - kd for kd, ce in twins]
    spread = statistics.stdev(margins) if len(margins) > 1 else float("nan")
    return "\n".join(
        [
            *lines,
            "",
            f"Untrained: {untrained:.3f}. Seeds where kd < ce < untrained: "
            f"{sum(kd < ce < untrained for kd, ce in twins)} of {len(twins)}. "
            f"Margin ce - kd: mean {statistics.mean(margins):.3f}, smallest {min(margins):.3f}, "
            f"standard deviation {spread:.3f}.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
