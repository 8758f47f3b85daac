"""Results on the terminal: facts, checks, estimates, samples. With `--json` the same as one JSON document on stdout.

Nothing here decides anything; progress of long steps is in `pipeline.progress`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pipeline.doctor import Check
    from pipeline.evaluate import Evaluation
    from pipeline.generate import Answer
    from pipeline.inspect import RowText, SequenceText
    from pipeline.planning import Estimate
    from pipeline.train import Estimate as TrainingEstimate
    from storage.tools.diff import Difference, SplitDifference
    from storage.tools.gc import Garbage
    from storage.tools.repair import Action
    from storage.tools.status import Status
    from storage.tools.verify import Report

_LEVEL_COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}


def print_json(value: Any) -> None:
    """Write a value, dataclasses and paths included, as one JSON document."""
    click.echo(json.dumps(to_json(value), indent=2, ensure_ascii=False))


def to_json(value: Any) -> Any:
    """Turn dataclasses, mappings, sequences and paths into plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_json(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Write name and value pairs in two columns."""
    pairs = list(facts)
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        click.echo(f"{click.style(name.ljust(width), dim=True)}  {value}")


def show_checks(checks: Iterable[Check], *, as_json: bool) -> list[Check]:
    """Write the checks of `doctor` as they come, and return them."""
    seen: list[Check] = []
    for check in checks:
        seen.append(check)
        if not as_json:
            level = click.style(f"{check.level:4}", fg=_LEVEL_COLORS[check.level], bold=check.level != "ok")
            click.echo(f"{level}  {check.topic:<11}  {check.found}")
            if check.fix is not None:
                click.echo(f"{'':19}{click.style(check.fix, dim=True)}")
    if as_json:
        print_json(seen)
    return seen


def show_estimate(estimate: Estimate, *, as_json: bool) -> None:
    """Write what an extraction would take."""
    if as_json:
        print_json(estimate)
        return
    about = "" if estimate.exact else "about "
    bound = "at most" if estimate.at_most else "about"
    held_out = f" ({estimate.heldout_documents:,} held out)" if estimate.heldout_documents else ""
    if estimate.seconds is None or estimate.tokens_per_second is None:
        time = "unknown until this teacher has run here with these settings; pipeline plan --rate N assumes a rate"
    else:
        rate = f"{estimate.tokens_per_second:,.0f} tokens/s ({estimate.rate_source})"
        time = f"about {duration_text(estimate.seconds)} at {rate}"
    print_facts(
        [
            ("teacher", f"{estimate.teacher}, {estimate.dtype} on {estimate.device}"),
            ("corpus", f"{counted(estimate.documents, 'document')}{held_out}, {about}{estimate.tokens:,} tokens"),
            ("rows", f"{about}{estimate.rows:,} in {counted(estimate.shards, 'shard')}; {estimate.contents}"),
            ("size", f"{bound} {size_line(estimate.bytes, estimate.bytes_per_row)}"),
            ("time", time),
        ]
    )


def show_training_estimate(estimate: TrainingEstimate, *, as_json: bool) -> None:
    """Write what a training run would take."""
    if as_json:
        print_json(estimate)
        return
    place = f"{estimate.dtype} on {estimate.device}"
    facts = [
        ("student", f"{estimate.parameters / 1e6:,.1f}M parameters, {place}"),
        ("steps", f"{estimate.steps:,}, about {estimate.tokens:,} tokens, {estimate.epochs:.2f} epochs"),
        ("corpus" if estimate.online else "store", f"{estimate.sequences:,} sequences"),
        ("memory", f"about {bytes_text(estimate.memory_bytes)}"),
        ("time", f"about {duration_text(estimate.seconds)}, from one micro-batch measured now"),
    ]
    if estimate.teacher_parameters is not None:
        facts.insert(1, ("teacher", f"{estimate.teacher_parameters / 1e6:,.1f}M parameters, live"))
    print_facts(facts)


def show_status(status: Status, *, as_json: bool) -> None:
    """Write what a store holds."""
    if as_json:
        print_json(status)
        return
    sealed = f"sealed, digest {status.digest}" if status.digest else "not sealed"
    held_out = f" ({status.heldout_rows:,} held out)" if status.heldout_rows else ""
    corpus = [(status.documents, "document"), (status.sequences, "sequence"), (status.tokens, "token")]
    facts = [
        ("store", status.path),
        ("teacher", status.teacher or "unnamed"),
        ("rows", f"{status.rows:,}{held_out}, {status.contents}"),
        ("corpus", ", ".join(counted(count, noun) for count, noun in corpus)),
        ("size", size_line(status.bytes, status.bytes_per_row)),
        ("shards", f"{status.committed} of {status.shards} committed, {sealed}"),
    ]
    if status.head_mass is not None:
        facts.insert(4, ("kept mass", f"{status.head_mass:.4f} of the teacher's probability is in the exact head"))
    if status.pace is not None:
        newest = f"over the newest {counted(status.pace.shards, 'shard')}, {duration_text(status.pace.seconds)}"
        facts.append(("pace", f"{status.pace.rows_per_second:,.0f} rows/s {newest}"))
    facts.append(("contents", f"not checked here: pipeline verify {status.path} does"))
    print_facts(facts)
    if status.missing:
        click.echo(f"{counted(status.missing, 'shard')} missing: run the same `{status.written_by}` again to go on")


def show_verification(report: Report, store: Path, *, as_json: bool) -> int:
    """Write what a verification found, and return its exit code."""
    if as_json:
        print_json({"ok": not report.problems, **to_json(report)})
        return report.exit_code
    for problem in report.problems:
        click.echo(f"{click.style('damaged', fg='red', bold=True)}  {problem.name}: {problem.message}")
    for warning in report.warnings:
        click.echo(f"{click.style('warning', fg='yellow')}  {warning}")
    checked = "names and sizes of" if report.quick else "every byte of"
    click.echo(f"checked {checked} {report.committed} of {report.shards} shards, {report.rows:,} rows")
    if report.problems:
        click.echo(f"{counted(len(report.problems), 'problem')}; run: pipeline repair {store}")
    else:
        click.echo(click.style("no damage", fg="green"))
    return report.exit_code


def show_repair(actions: Sequence[Action], store: Path, *, command: str, applied: bool, as_json: bool) -> None:
    """Write what a repair did or would do, and in the end the command that computes what is missing."""
    if as_json:
        print_json({"applied": applied, "actions": actions})
        return
    for action in actions:
        moved = f"moved to {action.moved_to}" if action.moved_to else f"would be moved to {action.goes_to}"
        moved = "missing, nothing to move" if action.missing else moved
        click.echo(f"{action.name}: {action.reason}; {moved}")
    if not actions:
        click.echo("nothing to repair")
    elif applied:
        click.echo(f"run the same `{command}` again: it computes exactly what is missing now")
    else:
        click.echo(f"no worker may run meanwhile; to do it: pipeline repair {store} --yes")


def show_garbage(found: Sequence[Garbage], store: Path, *, applied: bool, as_json: bool) -> None:
    """Write what a garbage collection removed or would remove."""
    if as_json:
        print_json({"applied": applied, "garbage": found})
        return
    for item in found:
        click.echo(f"{item.name}: {item.reason}; {bytes_text(item.bytes)}{' removed' if applied else ''}")
    if not found:
        click.echo("nothing to remove")
    elif not applied:
        total = bytes_text(sum(item.bytes for item in found))
        click.echo(f"{total} in all; no worker may run meanwhile; to do it: pipeline gc {store} --yes")


def show_difference(found: Difference, *, as_json: bool) -> int:
    """Write how two stores differ, and return the exit code of `diff`: 0 equal, 1 different."""
    code = 0 if found.equal else 1
    if as_json:
        print_json({"equal": found.equal, **to_json(found)})
        return code
    for line in found.plan:
        click.echo(f"plan  {line}")
    for split, part in found.splits.items():
        if part.sequences or not part.equal:
            _show_split_difference(split, part)
    digests = " and ".join(dict.fromkeys(found.digests))
    click.echo(f"{'equal' if found.equal else 'different'}, digest {digests}")
    return code


def _show_split_difference(split: str, part: SplitDifference) -> None:
    for count, which in ((part.only_first, "first"), (part.only_second, "second")):
        if count:
            click.echo(f"{split}  {counted(count, 'sequence')} only in the {which} store")
    compared = f"{part.sequences_different:,} of {counted(part.sequences, 'sequence')}"
    click.echo(f"{split}  {compared} and {part.rows_different:,} of {counted(part.rows, 'row')} differ")
    if part.equal:
        return
    if part.other_tokens:
        click.echo(f"{split}  {counted(part.other_tokens, 'sequence')} with other tokens or positions")
    for name, count in part.other_parts.items():
        click.echo(f"{split}  {counted(count, 'sequence')} with other values of {name}")
    click.echo(
        f"{split}  {part.rows_other_head:,} other heads, {part.rows_other_samples:,} other samples;"
        f" log-probabilities differ by up to {part.largest_logprob:.3g} nats, mean KL {part.mean_kl:.2e} nats"
    )
    for item in part.examples:
        rows = (
            "other tokens"
            if item.rows is None
            else f"{counted(item.rows, 'row')}, up to {item.largest_logprob:.3g} nats"
        )
        what = ", ".join((rows, *item.parts))
        click.echo(f"  shard {item.shard}, document {item.document}, window at {item.window_start}: {what}")


def show_sequences(sequences: Sequence[SequenceText], total: int) -> None:
    """Write sampled sequences: each row with its context, the token that followed, and the teacher's candidates."""
    for item in sequences:
        start = f" from token {item.window_start}" if item.window_start else ""
        click.secho(f"sequence {item.number} of {total:,}: document {item.document}{start}", bold=True)
        kept = "" if item.head_mass is None else f"kept mass {item.head_mass:.3f}, "
        mean = f"{kept}entropy {item.entropy:.2f} nats (means)"
        click.echo(f"{counted(item.tokens, 'token')}, {counted(item.rows, 'row')}, {mean}\n")
        for row in item.shown:
            show_row(row)
        click.echo()


def show_row(row: RowText) -> None:
    """Write one target row in two lines."""
    context, following = (quoted(text)[1:-1].replace('\\"', '"') for text in (row.context, row.next_text))
    click.echo(f"{row.position:>5}  {context}{click.style(following, fg='cyan', underline=True)}")
    shown = [
        click.style(f"{quoted(item.text)} {item.probability:.1%}", fg="cyan" if item.follows else None)
        for item in row.candidates
    ]
    kept = "" if row.head_mass is None else f"kept {row.head_mass:.3f}  "
    facts = f"{kept}entropy {row.entropy:.2f}  p(next) {row.next_probability:.3g}"
    drawn = " ".join(quoted(text) + (f"×{count}" if count > 1 else "") for text, count in row.tail)
    if shown:
        click.echo(f"{'':7}{'  '.join(shown)}")
    samples = "samples" if row.head_mass is None else "tail"
    click.secho(f"{'':7}{facts}" + (f"  {samples} {drawn}" if drawn else ""), dim=True)


def show_evaluation(evaluation: Evaluation, *, as_json: bool) -> None:
    """Write scores as a table, the teacher first."""
    if as_json:
        print_json(evaluation.to_json())
        return
    scores = {"teacher": evaluation.teacher, **evaluation.students}
    width = max(len(name) for name in scores)
    click.secho(f"{'':{width}}  {'NLL':>8}  {'KL':>8}  {'top-1 agreement':>26}  {'ECE':>7}", bold=True)
    for name, score in scores.items():
        kl = "" if score.kl is None else f"{score.kl:.4f}"
        agreement = "" if score.top1_agreement is None else f"{score.top1_agreement:.2%}"
        if score.top1_agreement_interval is not None:
            low, high = score.top1_agreement_interval
            agreement += f" ({low:.2%} to {high:.2%})"
        click.echo(f"{name:{width}}  {score.nll:8.4f}  {kl:>8}  {agreement:>26}  {score.ece:7.4f}")
    click.echo(f"{evaluation.tokens:,} positions of {evaluation.documents:,} held-out documents; nats per position;")
    click.echo("KL is KL(teacher || student) over the full vocabulary; intervals: 95%, bootstrap over documents")


def show_answers(answers: Iterable[Answer], *, as_json: bool) -> None:
    """Write what models answered, each as soon as it is there."""
    if as_json:
        print_json(list(answers))
        return
    for answer in answers:
        rate = f"{answer.tokens} tokens in {duration_text(answer.seconds)}, loading included"
        click.secho(f"{answer.role} {answer.model} ({rate})", bold=True)
        click.echo(f"{answer.text.strip()}\n")


def quoted(text: str) -> str:
    """Quote text so that white space and control characters show."""
    return json.dumps(text, ensure_ascii=False)


def counted(count: int, noun: str) -> str:
    """Write a count with its noun: 1 shard, 2 shards."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def size_line(size: int, per_row: float | None) -> str:
    """Write a size in a fitting unit, with bytes per row if known."""
    return bytes_text(size) + ("" if per_row is None else f", {per_row:.1f} bytes per row")


def bytes_text(size: float) -> str:
    """Write a number of bytes in a fitting decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def duration_text(seconds: float) -> str:
    """Write a duration as people say it: 42 s, 3 min 20 s, 5 h 12 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
