"""stages/student: packing keeps sequences apart, students come from where they should, fit the store, and are saved."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from stages.corpus.tokenizer import load_tokenizer, tokenizer_files
from stages.models.packed import PACKED_SDPA, use_packed_attention
from stages.student.architecture import chosen_layers, keep_layers
from stages.student.identity import check_tokenizer, check_vocabulary
from stages.student.model import Student
from stages.student.save import CardFacts, save_student
from stages.student.source import StudentSource, build_student
from storage.errors import IdentityError, UsageError

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    # The last two layers see 4 tokens back.
    "qwen2-window": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1),
}
LENGTHS = (7, 1, 12, 5)


def model_of(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()


def logits(model: PreTrainedModel, ids_1T: Tensor, positions_1T: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids_1T, position_ids=positions_1T, use_cache=False).logits[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_logits_are_those_of_single_sequences(name: str, attention: str) -> None:
    model = model_of(CONFIGS[name])
    ids = [torch.randint(0, 97, (1, length), generator=torch.Generator().manual_seed(length)) for length in LENGTHS]
    positions = [torch.arange(length)[None] for length in LENGTHS]
    model.set_attn_implementation("eager")  # the reference: one sequence, the plainest attention
    alone = torch.cat([logits(model, one, at) for one, at in zip(ids, positions, strict=True)])
    use_packed_attention(model, attention)
    assert model.config._attn_implementation == (PACKED_SDPA if attention == "sdpa" else "eager")
    packed = logits(model, torch.cat(ids, 1), torch.cat(positions, 1))
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    # The same tokens as one long sequence are another thing: the test can fail.
    mixed = logits(model, torch.cat(ids, 1), torch.arange(sum(LENGTHS))[None])
    assert (mixed - alone).abs().max() > 0.1


def test_packed_gradients_are_those_of_single_sequences() -> None:
    model = model_of(CONFIGS["llama"])
    ids = [torch.randint(0, 97, (1, length), generator=torch.Generator().manual_seed(length)) for length in LENGTHS]
    positions = [torch.arange(length)[None] for length in LENGTHS]
    gradients = []
    for pairs in (list(zip(ids, positions, strict=True)), [(torch.cat(ids, 1), torch.cat(positions, 1))]):
        use_packed_attention(model, "sdpa")
        model.zero_grad()
        for one, at in pairs:
            model(input_ids=one, position_ids=at, use_cache=False).logits.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


MAMBA = MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4)
GPT_OSS = GptOssConfig(**SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2)


@pytest.mark.parametrize(
    ("config", "attention", "words", "fix"),
    [
        (MAMBA, "sdpa", "cannot attend", "set it to eager, or choose another architecture for the student"),
        (MAMBA, "eager", "see each other", "choose another architecture for the student"),
        (GPT_OSS, "eager", "see each other", "only flash attention keeps packed sequences apart, .* a CUDA device"),
    ],
)
def test_an_architecture_that_mixes_packed_sequences_is_refused(
    config: PreTrainedConfig, attention: str, words: str, fix: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        use_packed_attention(model_of(config), attention)
    assert re.search(f"{fix}$", caught.value.fix or "")


@pytest.mark.parametrize(
    ("layers", "available", "expected"),
    [(1, 30, (0,)), (2, 30, (0, 29)), (6, 30, (0, 6, 12, 17, 23, 29)), (4, 4, (0, 1, 2, 3)), ((3, 1), 4, (1, 3))],
)
def test_layers_are_spread_evenly(layers: int | tuple[int, ...], available: int, expected: tuple[int, ...]) -> None:
    assert chosen_layers(layers, available) == expected


@pytest.mark.parametrize("layers", [5, (0, 0), (4,), (-1,), ()])
def test_layers_that_there_are_not_are_refused(layers: int | tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="4 layers"):
        chosen_layers(layers, 4)


@pytest.mark.parametrize("name", CONFIGS)
def test_all_layers_kept_is_the_model_itself(name: str) -> None:
    model = model_of(CONFIGS[name])
    kept = keep_layers(model, range(3)).eval()
    ids, at = torch.arange(20)[None], torch.arange(20)[None]
    assert torch.equal(logits(kept, ids, at), logits(model, ids, at))


def test_kept_layers_bring_their_kind_and_their_weights() -> None:
    model = model_of(CONFIGS["qwen2-window"])
    kept = keep_layers(model, (0, 2))
    assert kept.config.num_hidden_layers == 2
    assert kept.config.layer_types == ["full_attention", "sliding_attention"]
    assert [layer.self_attn.layer_idx for layer in kept.model.layers] == [0, 1]
    for new, old in enumerate((0, 2)):
        for name, weight in kept.model.layers[new].state_dict().items():
            assert torch.equal(weight, model.model.layers[old].state_dict()[name])


def test_random_students_of_one_seed_are_equal(tiny_teacher_dir: Path) -> None:
    source = StudentSource(init="from_config", path=str(tiny_teacher_dir), overrides={"num_hidden_layers": 1})
    torch.manual_seed(1)
    one = build_student(source, seed=3)
    torch.manual_seed(2)
    same, other = build_student(source, seed=3), build_student(source, seed=4)
    assert len(one.model.layers) == 1
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("init", ["from_config", "pretrained", "layers_of_teacher"])
@pytest.mark.parametrize(
    "config", [LlamaConfig(**SIZES, eos_token_id=1), Qwen2Config(**SIZES, tie_word_embeddings=True)]
)
def test_an_end_token_that_pads_learns_as_every_other(init: str, config: PreTrainedConfig, tmp_path: Path) -> None:
    ids_1T = torch.tensor([[5, 9, 1, 7, 1, 3]])
    trained = []
    for pad in (None, 1):
        directory = tmp_path / f"pad {pad}"
        model_of(config).save_pretrained(directory)
        stored = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**stored, "pad_token_id": pad}))
        source = StudentSource(init=init, path=str(directory), layers=2 if init == "layers_of_teacher" else None)  # type: ignore[arg-type]
        model = build_student(source, seed=0)
        assert model.config.pad_token_id == pad
        first = model.get_input_embeddings().weight[1].detach().clone()  # type: ignore[no-untyped-call]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            model(input_ids=ids_1T, labels=ids_1T).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert (model.get_input_embeddings().weight[1] - first).norm() > 1e-2  # type: ignore[no-untyped-call]
        trained.append(model.state_dict())
    assert all(torch.equal(weight, trained[1][name]) for name, weight in trained[0].items())


def test_a_student_can_be_made_from_a_bare_config_file(tiny_teacher_dir: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_teacher_dir / "config.json", tmp_path)
    source = StudentSource(init="from_config", path=str(tmp_path / "config.json"), overrides={"hidden_size": 32})
    assert build_student(source, seed=0).config.hidden_size == 32
    assert not check_tokenizer(source, load_tokenizer(tiny_teacher_dir))


def test_an_unknown_field_names_the_nearest(tiny_teacher_dir: Path) -> None:
    source = StudentSource(init="from_config", path=str(tiny_teacher_dir), overrides={"num_hiden_layers": 1})
    with pytest.raises(UsageError, match="num_hiden_layers") as caught:
        build_student(source, seed=0)
    assert caught.value.fix == "did you mean 'num_hidden_layers'?"


@pytest.mark.parametrize("overrides", [{"hidden_size": "big"}, {"num_attention_heads": 7}, {"hidden_act": "none"}])
def test_a_configuration_that_makes_no_model_is_told(overrides: dict[str, object], tiny_teacher_dir: Path) -> None:
    with pytest.raises(UsageError, match="no student can be made") as caught:
        build_student(StudentSource(init="from_config", path=str(tiny_teacher_dir), overrides=overrides), seed=0)
    assert caught.value.where == "overrides"


def test_a_broken_weight_file_is_told(tiny_teacher_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_teacher_dir, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(UsageError, match="cannot load the model"):
        build_student(StudentSource(init="pretrained", path=str(tmp_path / "broken")), seed=0)


@pytest.mark.parametrize("init", ["pretrained", "from_config"])
def test_a_missing_model_is_told_by_its_path(init: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        build_student(StudentSource(init=init, path=str(tmp_path / "nothing")), seed=0)
    assert caught.value.where == f"path: {tmp_path / 'nothing'}"


def test_another_tokenizer_is_refused_with_the_first_differing_id(tiny_teacher_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_teacher_dir, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    by_id = {index: token for token, index in vocabulary.items()}
    vocabulary[by_id[300]], vocabulary[by_id[301]] = 301, 300
    path.write_text(json.dumps(tokenizer))
    teachers = load_tokenizer(tiny_teacher_dir)
    assert check_tokenizer(StudentSource(init="pretrained", path=str(tiny_teacher_dir)), teachers)
    with pytest.raises(IdentityError, match="id 300") as caught:
        check_tokenizer(StudentSource(init="pretrained", path=str(tmp_path / "other")), teachers)
    assert repr(by_id[300]) in caught.value.what
    assert repr(by_id[301]) in caught.value.what


@pytest.mark.parametrize(("rows", "tokens", "same"), [(97, 98, True), (97, 60, False)])
def test_really_different_vocabularies_are_refused_with_both_sizes(rows: int, tokens: int, same: bool) -> None:
    model = model_of(CONFIGS["llama"])
    with pytest.raises(UsageError, match=f"{rows} rows.*{tokens} tokens"):
        check_vocabulary(model, tokens, same_tokenizer=same)


@pytest.mark.parametrize(("tokens", "same"), [(97, False), (95, False), (60, True)])
def test_padded_heads_are_accepted(tokens: int, same: bool) -> None:
    check_vocabulary(model_of(CONFIGS["llama"]), tokens, same_tokenizer=same)


def test_a_saved_student_is_a_plain_model_directory(tiny_teacher_dir: Path, tmp_path: Path) -> None:
    source = StudentSource(init="layers_of_teacher", path=str(tiny_teacher_dir), layers=2)
    model = build_student(source, seed=0)
    use_packed_attention(model, "sdpa")
    facts = CardFacts(
        teacher="a teacher",
        store_digest="d1",
        store_id="s1",
        initialisation="layers",
        loss="KD",
        parameters=Student.of(model, torch.float32).parameters,
        steps=5,
        tokens=1234,
    )
    for _ in range(2):  # the second time in place of the first
        save_student(model, tmp_path / "model", tokenizer_files=tokenizer_files(tiny_teacher_dir), facts=facts)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids, at = torch.arange(3, 20)[None], torch.arange(17)[None]
    torch.testing.assert_close(logits(loaded, ids, at), logits(model.eval(), ids, at))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.decode(tokenizer("The import statement")["input_ids"]) == "The import statement"
    card = (tmp_path / "model" / "README.md").read_text()
    assert all(fact in card for fact in ("a teacher", "d1", "s1", "KD", "1,234"))
    assert loaded.config._attn_implementation == "sdpa"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
