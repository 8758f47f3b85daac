"""pipeline.evaluate against a naive reference: whole models, whole logits, one document at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from pipeline.config.extract import ExtractConfig
from pipeline.config.train import TrainConfig
from pipeline.evaluate import Evaluation, _forwards, bootstrap_interval, evaluate, model_directory, reliability
from pipeline.extract import extract
from pipeline.runs import warn_if_trained_on
from pipeline.train import train
from pipeline.training.data import open_training_data
from stages.batches.sequences import part
from stages.student.source import StudentSource, build_student
from stages.training.run import RunDirectory
from storage.errors import DistillError, IdentityError, NumericsError, UsageError
from storage.plan import SPLITS
from storage.reader import StoreReader
from storage.writer import StoreWriter


@pytest.fixture(scope="module")
def student_dir(tiny_teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with two of the teacher's layers and its padded head."""
    directory = tmp_path_factory.mktemp("student")
    shutil.copytree(tiny_teacher_dir, directory, dirs_exist_ok=True)
    source = StudentSource(init="layers_of_teacher", path=str(tiny_teacher_dir), layers=2)
    build_student(source, seed=0).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def evaluation(tiny_store: Path, tiny_teacher_dir: Path, student_dir: Path) -> Evaluation:
    models = {"student": student_dir, "copy": tiny_teacher_dir}
    return evaluate(tiny_store, models, tiny_teacher_dir, device="cpu")


def naive(store: Path, directory: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [N, V] in float64 and the tokens that follow [N], sequence by sequence."""
    reader = StoreReader(store, split="heldout")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    logprob, following = [], []
    for index in range(len(reader)):
        batch = reader.read([index])
        ids = torch.from_numpy(batch.tokens.astype(np.int64))
        with torch.no_grad():
            logits_TV = model(input_ids=ids[None]).logits[0, :, : reader.plan.vocab_size]
        rows = np.flatnonzero(batch.has_row)
        logprob.append(logits_TV[rows].double().log_softmax(-1))
        following.append(ids[rows + 1])
    return torch.cat(logprob), torch.cat(following)


def test_scores_are_those_of_the_naive_reference(
    evaluation: Evaluation, tiny_store: Path, tiny_teacher_dir: Path, student_dir: Path
) -> None:
    teacher_NV, following_N = naive(tiny_store, tiny_teacher_dir)
    student_NV, _ = naive(tiny_store, student_dir)
    scores = evaluation.students["student"]
    assert scores.tokens == evaluation.tokens == len(following_N)
    nll_N = -student_NV.gather(-1, following_N[:, None])[:, 0]
    assert scores.nll == pytest.approx(float(nll_N.mean()), rel=1e-5)
    kl_N = (teacher_NV.exp() * (teacher_NV - student_NV)).sum(-1)
    assert scores.kl == pytest.approx(float(kl_N.mean()), rel=1e-4)
    agrees_N = teacher_NV.argmax(-1) == student_NV.argmax(-1)
    assert scores.top1_agreement == pytest.approx(float(agrees_N.double().mean()))
    confidence_N, top_N = student_NV.exp().max(-1)
    right_N = (top_N == following_N).double()
    ece = 0.0
    for low in range(15):
        inside = (confidence_N > low / 15) & (confidence_N <= (low + 1) / 15)
        if inside.any():
            ece += float(inside.double().mean() * (confidence_N[inside].mean() - right_N[inside].mean()).abs())
    assert scores.ece == pytest.approx(ece, rel=1e-4)
    teacher_nll = -teacher_NV.gather(-1, following_N[:, None]).mean()
    assert evaluation.teacher.nll == pytest.approx(float(teacher_nll), rel=1e-5)


@pytest.mark.parametrize("bound", [1, 129])
def test_scores_do_not_depend_on_how_sequences_share_forwards(
    bound: int, evaluation: Evaluation, tiny_store: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One or two to a forward: positions are lost nowhere, and stay beside the tokens that follow them."""
    monkeypatch.setattr("pipeline.evaluate._TOKENS_PER_FORWARD", bound)
    monkeypatch.setattr("pipeline.evaluate._CHUNK", 7)
    found = evaluate(tiny_store, {"student": student_dir}, device="cpu")
    assert found.tokens == evaluation.tokens
    for ours, theirs in (
        (found.teacher, evaluation.teacher),
        (found.students["student"], evaluation.students["student"]),
    ):
        for name in ("nll", "ece", "top1_agreement"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name)), name
    assert found.students["student"].kl == pytest.approx(evaluation.students["student"].kl, rel=1e-5)


@given(st.lists(st.integers(2, 30), min_size=1, max_size=20))
def test_forwards_hold_every_sequence_once_and_as_many_as_fit(sizes: list[int]) -> None:
    length_S, bound = np.array(sizes), 60
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.evaluate._TOKENS_PER_FORWARD", bound)
        cuts = list(_forwards(length_S))
    assert [index for first, end in cuts for index in range(first, end)] == list(range(len(sizes)))
    for first, end in cuts:
        assert end - first == 1 or max(sizes[first:end]) * (end - first) <= bound
        assert end == len(sizes) or max(sizes[first : end + 1]) * (end + 1 - first) > bound


def test_the_teacher_as_a_student_is_perfect(evaluation: Evaluation) -> None:
    copy = evaluation.students["copy"]
    assert (copy.kl, copy.top1_agreement, copy.top1_agreement_interval) == (0.0, 1.0, (1.0, 1.0))
    assert (copy.nll, copy.ece) == (evaluation.teacher.nll, evaluation.teacher.ece)


def test_the_teacher_is_not_compared_with_itself(evaluation: Evaluation) -> None:
    assert evaluation.teacher.kl is None
    assert evaluation.teacher.top1_agreement is None


def test_scores_become_plain_json(evaluation: Evaluation) -> None:
    values = json.loads(json.dumps(evaluation.to_json()))
    assert {"nll", "kl", "top1_agreement", "top1_agreement_interval", "ece", "calibration"} <= set(
        values["students"]["student"]
    )
    assert sum(item["count"] for item in values["students"]["student"]["calibration"]) == evaluation.tokens


def test_where_the_teacher_was_is_known_to_the_store(tiny_store: Path, evaluation: Evaluation) -> None:
    assert evaluate(tiny_store, {}, device="cpu").teacher.nll == evaluation.teacher.nll


def test_fewer_tokens_are_whole_documents(tiny_store: Path, tiny_teacher_dir: Path, evaluation: Evaluation) -> None:
    reader = StoreReader(tiny_store, split="heldout")
    first = [index for index in range(len(reader)) if reader.read([index]).document[0] == reader.read([0]).document[0]]
    rows, tokens = reader.read(first).rows, len(reader.read(first).tokens)
    second = reader.read([len(first), len(first) + 1])
    assert second.document[0] == second.document[1], "else it could not be cut"
    for bound in (1, tokens, tokens + int(second.token_offset[1])):
        small = evaluate(tiny_store, {}, tiny_teacher_dir, device="cpu", max_tokens=bound)
        assert (small.documents, small.tokens) == (1, rows)
    assert evaluation.documents > 1


def test_another_teacher_is_refused(tiny_store: Path, student_dir: Path) -> None:
    with pytest.raises(IdentityError, match="not the store's teacher"):
        evaluate(tiny_store, {}, student_dir, device="cpu")


@pytest.mark.parametrize("key", ["dtype", "files"])
def test_a_store_that_does_not_describe_its_teacher_is_refused(
    key: str, tiny_store: Path, tiny_teacher_dir: Path, tmp_path: Path
) -> None:
    readers = {split: StoreReader(tiny_store, split=split) for split in SPLITS}
    reader = readers["train"]
    plan = replace(reader.plan, teacher={name: said for name, said in reader.plan.teacher.items() if name != key})
    store = tmp_path / "store"
    writer = StoreWriter.create(store, plan, remap=reader.remap, tokenizer_files=reader.tokenizer_files())
    for shard in writer.missing():
        whole = readers[shard.split].read(np.arange(len(readers[shard.split])))
        first, end = np.searchsorted(whole.document, (shard.first_document, shard.end_document))
        writer.commit(shard, part(whole, int(first), int(end)))
    assert writer.seal()
    with pytest.raises(UsageError, match=f"the store does not say the {key} of its teacher") as caught:
        evaluate(store, {}, tiny_teacher_dir, device="cpu")
    assert caught.value.where == f"plan.json: teacher.{key}"


def tear(student: Path) -> None:
    weights = student / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def lose(student: Path) -> None:
    (student / "model.safetensors").unlink()


def spoil(student: Path) -> None:
    weights = load_file(student / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["lm_head.weight"].fill_(torch.nan)}, student / "model.safetensors")


def rename_a_token(student: Path) -> None:
    (student / "tokenizer.json").write_text((student / "tokenizer.json").read_text().replace('"<pad>"', '"<gap>"'))


@pytest.mark.parametrize(
    ("damage", "kind", "what"),
    [
        (tear, UsageError, "cannot load the model: "),
        (lose, UsageError, "no safetensors weights"),
        (spoil, NumericsError, "the model's logits hold NaN"),
        (rename_a_token, IdentityError, "the student's tokenizer is not the teacher's"),
    ],
)
def test_a_student_with_broken_files_is_named(
    damage: Callable[[Path], None],
    kind: type[DistillError],
    what: str,
    tiny_store: Path,
    tiny_teacher_dir: Path,
    student_dir: Path,
    tmp_path: Path,
) -> None:
    """By its directory: there is no configuration whose keys could be meant."""
    broken = tmp_path / "student"
    shutil.copytree(student_dir, broken)
    damage(broken)
    with pytest.raises(kind, match=what) as caught:
        evaluate(tiny_store, {"student": broken}, tiny_teacher_dir, device="cpu")
    assert str(caught.value.where).startswith(str(broken))
    assert not any(key in str(caught.value) for key in ("student.path", "teacher.attention", "teacher.dtype"))


def test_a_teacher_that_is_not_there_is_asked_for_by_its_option(tiny_store: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model directory") as caught:
        evaluate(tiny_store, {}, tmp_path / "nowhere", device="cpu")
    assert caught.value.where == "--teacher"


def test_an_architecture_without_sdpa_goes_through_both_phases(
    tiny_tokenizer_dir: Path, tiny_extraction: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Gemma 2 caps its attention scores, which sdpa cannot."""
    teacher, store = tmp_path / "teacher", tmp_path / "store"
    shutil.copytree(tiny_tokenizer_dir, teacher)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    Gemma2ForCausalLM(Gemma2Config(vocab_size=512, **shape, **heads)).save_pretrained(teacher)
    described = {"path": str(teacher), "dtype": "float32"}
    list(extract(ExtractConfig.model_validate({**tiny_extraction, "store": store, "teacher": described})))
    assert "teacher.attention is eager instead" in caplog.text
    assert StoreReader(store).plan.teacher["attention"] == "eager"
    sizes = {"steps": 1, "tokens_per_step": 128, "dtype": "float32", "device": "cpu"}
    student = {"init": "pretrained", "path": str(teacher)}
    list(train(TrainConfig.model_validate({"store": store, "run": tmp_path / "run", "student": student, **sizes})))
    found = evaluate(store, {"copy": teacher, "run": tmp_path / "run"}, device="cpu")
    assert found.students["copy"].kl == 0.0
    assert 0.0 < (found.students["run"].kl or 0.0) < 0.1


@pytest.fixture
def begin(tiny_teacher_dir: Path, tiny_corpus: Path, tmp_path: Path) -> Callable[..., Path]:
    """Begin a run on the tiny corpus, held out as in the tiny store, with changes, as training does."""

    def make(**changes: Any) -> Path:
        values = {
            "teacher_model": {"path": str(tiny_teacher_dir), "dtype": "float32"},
            "corpus": [{"source": "jsonl", "path": str(tiny_corpus)}],
            "rendering": {"window": 64},
            "heldout": {"fraction": 0.15},
            "run": tmp_path / "run",
            "student": {"init": "pretrained", "path": str(tiny_teacher_dir)},
            "steps": 1,
            "device": "cpu",
            **changes,
        }
        config = TrainConfig.model_validate({key: value for key, value in values.items() if value is not None})
        run = RunDirectory(path=config.run)
        with run.held():
            run.begin(config.model_dump(mode="json"), open_training_data(config).record)
        return run.path

    return make


def warning(run: Path, store: Path) -> str | None:
    reader = StoreReader(store, split="heldout")
    return warn_if_trained_on(run, reader.plan, np.unique(reader.read(np.arange(len(reader))).document).tolist())


@pytest.mark.parametrize(
    ("heldout", "told"),
    [
        ({"fraction": 0.15}, None),
        ({"fraction": 0.5}, None),  # those of 0.15 among them
        (None, "learned from 5 of the 5 documents that it is scored on"),
        ({"fraction": 0.05}, "learned from 4 of the 5 documents"),
        ({"fraction": 0.15, "seed": 1}, "hold out what the store holds out, heldout: {fraction: 0.15, seed: 0}"),
    ],
)
def test_a_run_that_learned_from_what_it_is_scored_on_is_told(
    heldout: dict[str, Any] | None, told: str | None, begin: Callable[..., Path], tiny_store: Path
) -> None:
    run = begin(heldout=heldout)
    for path in (run, run / "model"):
        found = warning(path, tiny_store)
        assert found is None if told is None else told in str(found)


def test_other_texts_and_files_beside_others(
    begin: Callable[..., Path], tiny_store: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "other.jsonl").write_text('{"text": "Words of another corpus, in one sentence."}\n' * 20)
    other, same = ({"source": "jsonl", "path": str(path)} for path in (tmp_path / "other.jsonl", tiny_corpus))
    assert warning(begin(corpus=[other]), tiny_store) is None
    told = warning(begin(corpus=[other, same]), tiny_store)
    assert "learned from files that the store's corpus holds too" in str(told)


def test_a_run_on_another_store_of_the_corpus(
    begin: Callable[..., Path], tiny_store: Path, tiny_extraction: dict[str, Any], tmp_path: Path
) -> None:
    own = dict.fromkeys(("teacher_model", "corpus", "rendering", "heldout"))
    assert warning(begin(**own, store=tiny_store), tiny_store) is None
    store = tmp_path / "store"
    list(extract(ExtractConfig.model_validate({**tiny_extraction, "store": store, "heldout": {"fraction": 0.05}})))
    run = begin(**own, store=store)
    assert "learned from 4 of the 5 documents" in str(warning(run, tiny_store))
    (store / "plan.json").write_text("{")
    assert warning(run, tiny_store) is None
    shutil.rmtree(store)
    assert warning(run, tiny_store) is None


def test_a_record_that_does_not_say_what_was_held_out_is_damaged(begin: Callable[..., Path], tiny_store: Path) -> None:
    run = begin()
    record = json.loads((run / "run.json").read_text())
    for rule in ({"fraction": "some"}, {"fraction": 7.0}, {"share": 0.1}, None):
        record["store"]["identity"]["heldout"] = rule
        (run / "run.json").write_text(json.dumps(record))
        with pytest.raises(UsageError, match="does not say what it learned from") as caught:
            warning(run, tiny_store)
        assert caught.value.where == str(run / "run.json")


def test_a_model_beside_a_record_of_something_else(tiny_store: Path, student_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(student_dir, tmp_path / "student")
    for name in ("run.json", "config.yaml"):
        (tmp_path / "student" / name).write_text('{"mine": 1}')
        assert warning(tmp_path / "student", tiny_store) is None


def test_a_run_stands_for_its_model(tmp_path: Path, student_dir: Path) -> None:
    assert model_directory(student_dir) == student_dir
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UsageError, match="no model"):
        model_directory(tmp_path)
    shutil.copytree(student_dir, tmp_path / "model")
    assert model_directory(tmp_path) == tmp_path / "model"


def test_intervals_are_those_of_the_ratio_over_documents() -> None:
    """95% of a normal law whose variance is that of a ratio of sums over documents of different lengths."""
    random = np.random.default_rng(0)
    size_M = random.integers(20, 200, 400)
    document_N = np.repeat(np.arange(400), size_M)
    value_N = random.random(len(document_N)) < random.random(400)[document_N]
    sum_M = np.bincount(document_N, weights=value_N)
    mean = value_N.mean()
    deviation = np.sqrt(np.square(sum_M - mean * size_M).sum()) / size_M.sum()
    low, high = bootstrap_interval(value_N, document_N)
    assert (low, high) == pytest.approx((mean - 1.96 * deviation, mean + 1.96 * deviation), abs=0.15 * deviation)
    assert (low, high) == bootstrap_interval(value_N, document_N)
    assert (low, high) != bootstrap_interval(value_N, document_N, seed=1)


def test_calibration_bins_are_closed_on_the_right() -> None:
    bins = reliability(np.array([1.0, 1.0 / 15, 1.0 / 15 + 1e-9]), np.array([True, False, True]))
    assert [(item.count, item.accuracy) for item in bins] == [(1, 0.0), (1, 1.0), (1, 1.0)]
