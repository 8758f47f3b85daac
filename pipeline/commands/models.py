"""Using trained students: `pipeline eval` and `generate`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.commands.options import json_option
from pipeline.terminal.application import common_options
from pipeline.terminal.text import Styled, duration_text, print_json, write

if TYPE_CHECKING:
    from pipeline.evaluate import Evaluation
    from pipeline.generate import Answer


@click.command("eval")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--teacher", metavar="PATH", type=click.Path(path_type=Path), help="Teacher directory (default: recorded)."
)
@click.option("--store", metavar="PATH", type=click.Path(path_type=Path), help="Store (default: the one of the runs).")
@click.option("--max-tokens", type=click.IntRange(min=1), default=100_000, show_default=True, help="Held-out tokens.")
@json_option
@common_options
def evaluate(runs: tuple[Path, ...], teacher: Path | None, store: Path | None, max_tokens: int, as_json: bool) -> None:
    """Score students beside their teacher on held-out documents."""
    from pipeline.evaluate import evaluate
    from pipeline.runs import find_store, name_models

    found = evaluate(store or find_store(runs), name_models(runs), teacher, max_tokens=max_tokens)
    show_evaluation(found, as_json=as_json)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--teacher", is_flag=True, help="Let the teacher answer too.")
@click.option("--chat", is_flag=True, help="Use the tokenizer's chat template.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@json_option
@common_options
def generate(run: Path, prompt: str, teacher: bool, chat: bool, max_new_tokens: int, as_json: bool) -> None:
    """Continue PROMPT with the model of RUN, greedily."""
    from pipeline.generate import generate

    answers = generate(run, prompt, teacher=teacher, chat=chat, max_new_tokens=max_new_tokens)
    show_answers(answers, as_json=as_json)


def show_evaluation(evaluation: Evaluation, *, as_json: bool) -> None:
    """Write scores as a table, the teacher first."""
    if as_json:
        print_json(evaluation.to_json())
        return
    scores = [("teacher", evaluation.teacher), *evaluation.students.items()]
    width = max(len(name) for name, _ in scores)
    write(Styled(text=f"{'':{width}}  {'NLL':>8}  {'KL':>8}  {'top-1 agreement':>26}  {'ECE':>7}", bold=True))
    for name, score in scores:
        kl = "" if score.kl is None else f"{score.kl:.4f}"
        agreement = "" if score.top1_agreement is None else f"{score.top1_agreement:.2%}"
        if score.top1_agreement_interval is not None:
            low, high = score.top1_agreement_interval
            agreement += f" ({low:.2%} to {high:.2%})"
        write(f"{name:{width}}  {score.nll:8.4f}  {kl:>8}  {agreement:>26}  {score.ece:7.4f}")
    write(f"{evaluation.tokens:,} positions of {evaluation.documents:,} held-out documents; nats per position;")
    write("KL is KL(teacher || student) over the full vocabulary; intervals: 95%, bootstrap over documents")


def show_answers(answers: Iterable[Answer], *, as_json: bool) -> None:
    """Write what models answered, each as soon as it is there."""
    if as_json:
        print_json(list(answers))
        return
    for answer in answers:
        rate = f"{answer.tokens} tokens in {duration_text(answer.seconds)}, loading included"
        write(Styled(text=f"{answer.role} {answer.model} ({rate})", bold=True))
        write(f"{answer.text.strip()}\n", lines=True)
