"""pipeline.generate: greedy answers of a run and of its teacher."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config.train import TrainConfig
from pipeline.evaluate import evaluate
from pipeline.generate import generate, teacher_directory
from pipeline.train import train
from stages.models.files import find_model
from storage.errors import UsageError
from storage.plan import Plan

PROMPT = "The import statement"


@pytest.fixture(scope="module")
def run(tiny_store: Path, tiny_teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generate") / "run"
    student = {"init": "layers_of_teacher", "path": str(tiny_teacher_dir), "layers": 2}
    values = {"store": tiny_store, "run": path, "student": student, "steps": 1, "tokens_per_step": 128}
    list(train(TrainConfig.model_validate({**values, "dtype": "float32", "device": "cpu"})))
    return path


def naive(directory: Path, prompt: str, count: int) -> str:
    """Greedy continuation by whole forwards."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    ids = tokenizer(prompt)["input_ids"]
    new: list[int] = []
    while len(new) < count and (not new or new[-1] != tokenizer.eos_token_id):
        with torch.no_grad():
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    return str(tokenizer.decode(new, skip_special_tokens=True))


def test_student_and_teacher_answer_greedily(run: Path, tiny_teacher_dir: Path) -> None:
    answers = list(generate(run, PROMPT, teacher=True, max_new_tokens=12, device="cpu", dtype="float32"))
    assert [answer.role for answer in answers] == ["student", "teacher"]
    assert answers[0].text == naive(run / "model", PROMPT, 12)
    assert answers[1].text == naive(tiny_teacher_dir, PROMPT, 12)
    assert 0 < answers[0].tokens <= 12


def test_a_model_directory_answers_alone(tiny_teacher_dir: Path) -> None:
    (answer,) = generate(tiny_teacher_dir, PROMPT, max_new_tokens=3, device="cpu", dtype="float32")
    assert answer.text == naive(tiny_teacher_dir, PROMPT, 3)
    with pytest.raises(UsageError, match="only a run knows its teacher"):
        list(generate(tiny_teacher_dir, PROMPT, teacher=True))


def test_the_chat_template_frames_the_prompt(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        list(generate(run, PROMPT, chat=True, device="cpu"))
    shutil.copytree(run / "model", tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text("Q: {{ messages[0]['content'] }} A:")
    (answer,) = generate(tmp_path / "chat", PROMPT, chat=True, max_new_tokens=6, device="cpu", dtype="float32")
    assert answer.text == naive(run / "model", f"Q: {PROMPT} A:", 6)


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ messages.__class__.__mro__ }}{{ ().__class__.__base__.__subclasses__() }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ messages[7]['content'] + 1 }}",
        "{{ raise_exception('no system turn') }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_chat_template_that_fails_is_the_users_to_mend(template: str, tiny_teacher_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_teacher_dir, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text(template)
    with pytest.raises(UsageError, match=r"the chat template fails: .") as caught:
        list(generate(tmp_path / "chat", PROMPT, chat=True, max_new_tokens=1, device="cpu"))
    assert caught.value.where == str(tmp_path / "chat")


def test_a_teacher_that_moved_is_told(run: Path, tiny_teacher_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    record = tmp_path / "run" / "run.json"
    assert teacher_directory(tmp_path / "run").directory == tiny_teacher_dir
    record.write_text(record.read_text().replace(str(tiny_teacher_dir), str(tmp_path / "elsewhere")))
    with pytest.raises(UsageError, match="not where it was"):
        list(generate(tmp_path / "run", PROMPT, teacher=True, device="cpu"))


@pytest.mark.parametrize("recorded", [{}, {"directory": ""}, {"directory": "."}, {"directory": 7}], ids=str)
def test_a_recorded_teacher_is_never_the_current_directory(
    recorded: object,
    run: Path,
    tiny_store: Path,
    tiny_teacher_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tiny_teacher_dir)
    shutil.copytree(run, tmp_path / "run")
    content = json.loads((run / "run.json").read_text())
    content["store"]["teacher"] = recorded
    (tmp_path / "run" / "run.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="not where it was: what is recorded is no directory of this machine"):
        teacher_directory(tmp_path / "run")
    store = Path(shutil.copytree(tiny_store, tmp_path / "store"))
    plan = Plan.from_json((store / "plan.json").read_bytes())
    (store / "plan.json").write_bytes(replace(plan, recorded={**plan.recorded, "teacher": recorded}).to_json())
    with pytest.raises(UsageError, match="says that it was: what is recorded is no directory of this machine"):
        evaluate(store, {}, device="cpu")


def test_what_is_recorded_of_a_model_is_absolute(tiny_teacher_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_teacher_dir.parent)
    assert find_model(tiny_teacher_dir.name).recorded()["directory"] == str(tiny_teacher_dir)


@pytest.mark.parametrize("prompt", [""])
def test_an_empty_prompt_is_refused(run: Path, prompt: str) -> None:
    with pytest.raises(UsageError, match="prompt is empty"):
        list(generate(run, prompt, device="cpu"))


@pytest.mark.parametrize(("words", "fix"), [(150, "set --max-new-tokens to at most "), (900, "shorten the prompt")])
def test_more_tokens_than_positions_are_refused(words: int, fix: str, run: Path) -> None:
    """Beyond its positions a model says nothing: 512 here."""
    with pytest.raises(UsageError, match="are more than the 512 positions") as caught:
        list(generate(run, "The " * words, max_new_tokens=500, device="cpu", dtype="float32"))
    assert str(caught.value.fix).startswith(fix)


def test_a_run_that_is_not_finished_has_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UsageError, match="no model here"):
        list(generate(tmp_path, PROMPT))
