"""Size, fidelity, speed and memory of the store beside the alternatives: `python -m benchmarks.storage`.

Five minutes on two cores. `--full` takes the whole corpus, `--save` writes benchmarks/results/storage.json and .md.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.storage import fidelity, formats, memory, speed
from benchmarks.storage.goals import RESULTS, goals, save
from benchmarks.storage.material import MAIN, Material, make, replicated
from storage.reader import StoreReader
from storage.tools.status import status
from storage.writer import StoreWriter

QUICK_TOKENS = 15_000
SPEED_ROWS = 110_000
SHARDS = 100_000
MEMORY_CACHE, MEMORY_ROWS = 8 * 2**20, 50_000  # what 1x holds, decoded, is more than the cache


def report_sizes(material: Material, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    print(
        f"\nBytes per row; angle to the full gradient over {fidelity.ANGLE_TOKENS} tokens; divergence of decoded rows"
    )
    angles = fidelity.angles(material)
    for name, kind in material.kinds.items():
        state = status(kind.store)
        found[name] = {
            "all_in": state.bytes_per_row,
            "growing": state.shard_bytes_per_row,
            "decode_kl": fidelity.decode_kl(kind),
            "angle": angles[name],
            **formats.sizes(kind.batches, folder),
        }
        line = "".join(f"  {key} {_number(value)}" for key, value in found[name].items())
        print(f"  {name}:{line}", flush=True)
    found["top 50, renormalised"] = {"angle": angles["top 50, renormalised"]}
    print(f"  top 50, renormalised: angle {angles['top 50, renormalised']:.2f}")
    vocab_size = material.kinds[MAIN].planned.plan.vocab_size
    for name, size in formats.distillkit_bytes(vocab_size).items():
        found[f"DistillKit {name} (arithmetic)"] = {"all_in": size}
        print(f"  DistillKit, {name} (arithmetic from its README, nothing run): {size:.0f}")
    return found


def report_writing(material: Material) -> dict[str, Any]:
    kind = material.kinds[MAIN]
    found = {
        "encode_rows_per_second": kind.rows / material.encode_cpu_seconds,
        "encode_share_of_teacher": material.encode_seconds / material.teacher_seconds,
    }
    print(
        f"\n{MAIN}: check, encode and commit {found['encode_rows_per_second']:,.0f} rows per second of processor time,"
    )
    print(f"  {found['encode_share_of_teacher']:.2%} of the time of the teacher and its rows")
    return found


def report_reading(material: Material, folder: Path, rounds: speed.Rounds) -> dict[str, Any]:
    kind = material.kinds[MAIN]
    store = replicated(kind, folder / "speed", max(1, round(SPEED_ROWS / kind.rows)))
    reader = StoreReader(store)
    table = formats.table(reader.read(range(len(reader))))
    files = {name: folder / f"speed {name}" for name in formats.PARQUET}
    for name, options in formats.PARQUET.items():
        pq.write_table(table, files[name], **options)
    print("\nBytes per row of the Parquet files: ", end="")
    print(", ".join(f"{name} {file.stat().st_size / len(table):.1f}" for name, file in files.items()))
    pq.write_table(table, folder / "groups", compression="zstd", row_group_size=4096)
    k, found = kind.planned.plan.target.k, {}
    for order, (rates, ratios) in {
        "sequential": speed.sequential(store, files, rounds, k),
        "random": speed.random_sequences(store, folder / "groups", rounds, k),
    }.items():
        print(f"\n{order}, {reader.rows:,} rows of {MAIN}: rows/s, and times slower than ours")
        print('  (all but "raw arrays" give numpy arrays of every sequence: head, log-probabilities, samples, counts)')
        for name in rates:
            print(f"  {name:<36}{rates[name]:12,.0f}{ratios[name]:8.2f}x", flush=True)
        found[order] = {"rows_per_second": rates, "ratio": ratios}
    return found


def report_looking(material: Material, folder: Path) -> dict[str, Any]:
    """Measure rows for other tools: a Parquet export, and sequences as slices of a decoded shard."""
    reader = StoreReader(replicated(material.kinds[MAIN], folder / "looking", 1))
    found = speed.looking(reader, folder / "export.parquet")
    print(f"\nParquet export {found['export_rows_per_second']:,.0f} rows per second of processor time;", end=" ")
    print(f"a sequence as a slice of a decoded shard {found['slice_microseconds']:.1f} microseconds")
    return found


def report_memory(material: Material, folder: Path) -> dict[str, Any]:
    kind, found = material.kinds[MAIN], {}
    least = max(1, round(MEMORY_ROWS / kind.rows))
    print(f"\nGrowth of memory over one pass, MiB; cache {MEMORY_CACHE >> 20} MiB; 1x is {least * kind.rows:,} rows")
    for times in (1, 4, 16):
        store = replicated(kind, folder / f"times-{times}", least * times)
        for order in ("sequential", "random"):
            found[f"{order} {times}x"] = memory.growth(store, order, MEMORY_CACHE)
        print(f"  {times:>2}x: sequential {found[f'sequential {times}x']:.1f}, random {found[f'random {times}x']:.1f}")
    return found


def report_opening(material: Material, folder: Path) -> dict[str, Any]:
    made = material.kinds[MAIN].planned
    path = folder / "many"

    def create(plan: Any) -> StoreWriter:
        return StoreWriter.create(path, plan, remap=made.remap, tokenizer_files=made.tokenizer_files)

    seconds = speed.open_sealed(path, made.plan, create, SHARDS)
    print(f"\nOpening a sealed store of {SHARDS:,} shards: {seconds:.2f} s")
    return {"seconds": seconds, "shards": SHARDS}


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1e}" if value and abs(value) < 0.01 else f"{value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the whole corpus: bytes per row then have a goal")
    parser.add_argument("--tokens", type=int, default=QUICK_TOKENS, help="about so many tokens of it")
    parser.add_argument("--rounds", type=int, default=5, help="of each comparison")
    parser.add_argument("--cpu-time", action="store_true", help="ratios of processor time, for a busy machine")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS}/storage.json and .md")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    pa.set_cpu_count(os.cpu_count() or 1)  # whatever OMP_NUM_THREADS says: all sides may use all cores
    rounds = speed.Rounds(arguments.rounds, time.process_time if arguments.cpu_time else time.perf_counter)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="topk-distill-bench-") as name:
        folder = Path(name)
        material = make(folder, None if arguments.full else arguments.tokens)
        print(f"{material.kinds[MAIN].rows:,} rows of a real teacher, {time.perf_counter() - began:.0f} s")
        found: dict[str, Any] = {"full": arguments.full, "rows": material.kinds[MAIN].rows}
        found["writing"] = report_writing(material)
        found |= report_reading(material, folder, rounds)
        found["looking"] = report_looking(material, folder)
        found["memory"] = report_memory(material, folder)
        found["opening"] = report_opening(material, folder)
        found["kinds"] = report_sizes(material, folder)
    found["goals"] = goals(found)
    print("\nGoals")
    for what, value, limit, met in found["goals"]:
        print(f"  {'met   ' if met else 'MISSED'}  {what}: {value:,.4g} (goal {limit:,.4g})")
    print(f"{time.perf_counter() - began:.0f} s")
    if arguments.save:
        save(found)


if __name__ == "__main__":
    main()
