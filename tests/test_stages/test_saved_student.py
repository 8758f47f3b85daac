"""A saved student ends where its tokenizer and chat template end, and never chooses what stands for no token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    PreTrainedModel,
)

from pipeline.config.train import TrainConfig
from pipeline.generate import generate
from pipeline.train import train
from stages.batches.steps import StepShape, evenly_spaced
from stages.corpus.tokenizer import tokenizer_files
from stages.models.head import HeadRule
from stages.models.special_tokens import SpecialTokens, adopt_special_tokens
from stages.student.architecture import random_model
from stages.student.identity import read_tokenizer
from stages.student.model import Student
from stages.student.padding import weights_to_save
from stages.student.save import CardFacts, save_student
from storage.reader import StoreReader

BOS, EOS, PAD, REAL = 0, 1, 2, 512  # of the tiny tokenizer
FACTS = CardFacts(
    teacher="t", store_digest="d", store_id="s", initialisation="i", loss="l", parameters=1, steps=1, tokens=1
)
TEMPLATE = "{% for turn in messages %}<s>{{ turn['content'] }}<pad>\n{% endfor %}"


def files(directory: Path, template: str | None = None) -> dict[str, bytes]:
    found = tokenizer_files(directory)
    return found if template is None else {**found, "chat_template.jinja": template.encode()}


def always(token: int, **fields: Any) -> PreTrainedModel:
    """Return a model that says one token, whatever it reads."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=REAL, **sizes, **fields))
    head_VD = model.get_output_embeddings().weight  # type: ignore[no-untyped-call]
    with torch.no_grad():
        model.gpt_neox.final_layer_norm.weight.zero_()
        model.gpt_neox.final_layer_norm.bias.fill_(1.0)
        head_VD.zero_()
        head_VD[token] = 1.0
    return model


@pytest.mark.parametrize(
    ("own", "template", "ends"),
    [
        (7, None, (EOS,)),  # an ordinary piece of text to this tokenizer
        ([EOS, PAD, 7], None, (EOS,)),
        (BOS, None, (EOS,)),
        (None, TEMPLATE, (EOS, PAD)),
        (EOS, "{{ messages[0]['content'] }}", (EOS,)),
        (EOS, "{{ 1 / 0 }}", (EOS,)),
        (EOS, "{% for", (EOS,)),
    ],
)
def test_ends_are_those_of_tokenizer_and_template(
    own: Any, template: str | None, ends: tuple[int, ...], tiny_tokenizer_dir: Path
) -> None:
    model = always(5, eos_token_id=own)
    assert SpecialTokens.of(model, read_tokenizer(files(tiny_tokenizer_dir, template))).ends == ends


def test_ends_of_its_own_that_are_special_stay(tiny_tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eom|>"]})
    model = always(5)
    model.resize_token_embeddings(REAL + 1)  # type: ignore[no-untyped-call]
    model.generation_config.eos_token_id = [REAL, EOS]  # type: ignore[union-attr]
    assert SpecialTokens.of(model, tokenizer) == SpecialTokens(bos=BOS, pad=PAD, ends=(EOS, REAL))


def test_a_stated_end_that_is_the_padding_too_stays_an_end(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    always(PAD, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD).save_pretrained(tmp_path)
    shutil.copytree(tiny_tokenizer_dir, tmp_path, dirs_exist_ok=True)
    GenerationConfig(eos_token_id=[EOS, PAD], pad_token_id=PAD).save_pretrained(tmp_path)
    (answer,) = generate(tmp_path, "The", max_new_tokens=9, device="cpu", dtype="float32")
    assert answer.tokens == 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    content = files(tiny_tokenizer_dir)
    adopt_special_tokens(model, read_tokenizer(content))
    save_student(model, tmp_path / "student", tokenizer_files=content, facts=FACTS)
    assert GenerationConfig.from_pretrained(tmp_path / "student").eos_token_id == [EOS, PAD]


@pytest.mark.parametrize(("token", "template"), [(EOS, None), (PAD, TEMPLATE)])
def test_a_saved_student_stops(token: int, template: str | None, tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    model = always(token, bos_token_id=9, eos_token_id=8, pad_token_id=7)
    content = files(tiny_tokenizer_dir, template)
    adopt_special_tokens(model, read_tokenizer(content))
    save_student(model, tmp_path / "model", tokenizer_files=content, facts=FACTS)
    ends = [EOS, PAD] if template else EOS
    stored = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert {key: stored[key] for key in stored if key.endswith("token_id")} == {
        "bos_token_id": BOS,
        "eos_token_id": ends,
        "pad_token_id": PAD,
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    said = loaded.config
    assert (said.bos_token_id, said.eos_token_id, said.pad_token_id) == (BOS, EOS, PAD)
    assert loaded.generate(torch.tensor([[5, 6]]), max_new_tokens=9).tolist() == [[5, 6, token]]
    (answer,) = generate(tmp_path / "model", "The", max_new_tokens=9, device="cpu", dtype="float32")
    assert answer.tokens == 1


def test_generate_ends_where_a_model_of_others_does_not(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    always(EOS, eos_token_id=8).save_pretrained(tmp_path)
    shutil.copytree(tiny_tokenizer_dir, tmp_path, dirs_exist_ok=True)
    assert len(AutoModelForCausalLM.from_pretrained(tmp_path).generate(torch.tensor([[5]]), max_new_tokens=9)[0]) == 10
    (answer,) = generate(tmp_path, "The", max_new_tokens=9, device="cpu", dtype="float32")
    assert answer.tokens == 1


def test_settings_of_generation_stay_if_they_can_be_saved(
    tiny_tokenizer_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    model = always(5)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7)
    adopt_special_tokens(model, tokenizer)
    assert (model.generation_config.temperature, model.generation_config.eos_token_id) == (0.7, EOS)
    assert not caplog.text
    model.generation_config.do_sample = False
    adopt_special_tokens(model, tokenizer)
    assert "generation_config.json is left out but for its tokens" in caplog.text
    model.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == EOS


def trained(store: Path, teacher: Path, run: Path, student: dict[str, Any]) -> PreTrainedModel:
    values = {"store": store, "run": run, "student": {"path": str(teacher), **student}, "dtype": "float32"}
    sizes = {"steps": 4, "tokens_per_step": 256, "device": "cpu", "optimizer": {"lr": 3e-3}}
    list(train(TrainConfig.model_validate({**values, **sizes})))
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    return model


@torch.no_grad()
def padding_mass(model: PreTrainedModel, store: Path) -> float:
    ids_T = torch.from_numpy(StoreReader(store, split="heldout").read([0]).tokens.astype("int64"))  # type: ignore[arg-type]
    return float(model(input_ids=ids_T[None]).logits.softmax(-1)[..., REAL:].sum(-1).mean())


@pytest.mark.parametrize("tied", [True, False])
def test_a_student_of_a_padded_configuration_never_says_padding(
    tied: bool, tiny_store: Path, tiny_teacher_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = {"num_hidden_layers": 1, "tie_word_embeddings": tied}
    student = {"init": "from_config", "overrides": overrides}
    model = trained(tiny_store, tiny_teacher_dir, tmp_path / "run", student)
    assert padding_mass(model, tiny_store) < 1e-3
    assert model.config.vocab_size == REAL
    assert "rows 512 to 519 of the student's head stand for no token" in caplog.text
    (answer,) = generate(tmp_path / "run", "The import", max_new_tokens=4, device="cpu", dtype="float32")
    assert answer.tokens > 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("spread", "rows"), [(0.02, REAL), (2.0, REAL + 8)])
def test_padding_becomes_the_mean_where_that_is_enough(spread: float, rows: int, bias: bool, tiny_store: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = random_model(LlamaConfig(vocab_size=REAL + 8, **sizes))
    torch.nn.init.normal_(model.lm_head.weight, std=spread)  # type: ignore[union-attr, arg-type]
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(REAL + 8))  # type: ignore[union-attr]
    sample = evenly_spaced(StoreReader(tiny_store), 4, StepShape(tokens_per_step=256, tokens_per_batch=256))
    student = Student.of(model, torch.float32)
    weights = weights_to_save(student, sample, vocab_size=REAL)
    before = model.state_dict()
    assert {len(weights[name]) for name in weights if "lm_head" in name or "embed" in name} == {rows}
    for name, weight in weights.items():
        assert torch.equal(weight[:REAL], before[name][:REAL])
    if rows > REAL:
        mean_D = before["lm_head.weight"][:REAL].mean(0)
        assert all(torch.equal(row_D, mean_D) for row_D in weights["lm_head.weight"][REAL:])
        model.load_state_dict(weights)
        assert unchanged(weights_to_save(student, sample, vocab_size=REAL), weights)


class Counting(HeadRule):
    """Counts the positions whose logits exist at one time."""

    def applied(self, logits_NV: Tensor) -> Tensor:
        COUNTED.append(len(logits_NV))
        return super().applied(logits_NV)


COUNTED: list[int] = []


def test_padding_is_measured_at_a_bounded_number_of_positions_a_few_at_a_time(tiny_store: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = random_model(LlamaConfig(vocab_size=REAL + 8, **sizes))
    sample = evenly_spaced(StoreReader(tiny_store), 8, StepShape(tokens_per_step=64, tokens_per_batch=64))
    assert 256 < sum(batch.rows for batch in sample) < 512
    COUNTED.clear()
    weights_to_save(Student(model=model, dtype=torch.float32, rule=Counting()), sample, vocab_size=REAL)
    assert max(COUNTED) <= 32
    assert sum(COUNTED) <= 2 * 256  # as it is, and with the mean in the rows of padding


def unchanged(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(found[name], weight) for name, weight in expected.items())
