"""stages.models.load: weights come in whole, of the right shapes, tied as the file ties them, or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV3Config, Gemma2Config, GptOssConfig, LlamaConfig, LlamaForCausalLM

from pipeline.generate import generate
from stages.models.files import find_model, read_config
from stages.models.load import attention_for, load_model
from stages.student.architecture import keep_layers, random_model
from stages.student.source import StudentSource, build_student
from stages.teacher.hf import HFTeacher
from storage.errors import UsageError

Weights = dict[str, Tensor]
SIZES = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def save(directory: Path, change: Callable[[Weights], Weights] = lambda weights: weights, **fields: Any) -> Path:
    """Save a small Llama whose head is not tied, with its weights changed, and then fields of its configuration."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)).save_pretrained(directory)
    return changed(directory, change, **fields)


def changed(directory: Path, change: Callable[[Weights], Weights], **fields: Any) -> Path:
    weights = change(load_file(directory / "model.safetensors"))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))
    return directory


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: weight for name, weight in weights.items() if part not in name}


def student(init: str, **more: Any) -> Callable[[Path], object]:
    return lambda directory: build_student(StudentSource(init=init, path=str(directory), **more), seed=0)  # type: ignore[arg-type]


def teacher(directory: Path) -> object:
    return HFTeacher.load(
        find_model(str(directory)),
        vocab_size=512,
        device=torch.device("cpu"),
        dtype=torch.float32,
        attention="sdpa",
    )


LOADS: dict[str, Callable[[Path], object]] = {
    "pretrained": student("pretrained"),
    "layers_of_teacher": student("layers_of_teacher", layers=2),
    "teacher": teacher,  # eval loads as it does
    "generate": lambda directory: list(generate(directory, "The", max_new_tokens=1, device="cpu", dtype="float32")),
}
UP = "model.layers.1.mlp.up_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "a matrix": (without(UP), rf"lack 1 of the weights .* such as {UP}"),
    "the head": (without(HEAD), "such as lm_head.weight"),
    "a layer": (without("layers.3."), r"lack 9 of the weights .* such as model\.layers\.3\.input_layernorm\.weight"),
    "all names": (
        lambda weights: {f"student.{name}": weight for name, weight in weights.items()},
        r"lack 39 .* such as lm_head\.weight; it has 39 that are not asked for, such as student\.lm_head\.weight",
    ),
    "a shape": (
        lambda weights: {**weights, UP: weights[UP][:100].clone()},
        rf"1 weight has other shapes .* such as {UP}: \[100, 64\] in the file, \[128, 64\] asked for",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("load", LOADS)
def test_weights_that_are_not_whole_are_refused_by_name(
    load: str, damage: str, tiny_teacher_dir: Path, tmp_path: Path
) -> None:
    change, words = DAMAGES[damage]
    shutil.copytree(tiny_teacher_dir, tmp_path / "model")
    with pytest.raises(UsageError, match=words):
        LOADS[load](changed(tmp_path / "model", change))


def test_weights_without_a_place_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = save(tmp_path, num_hidden_layers=2)
    load_model(find_model(str(directory)), dtype=torch.float32)
    assert "9 weights of the files have no place in the model" in caplog.text
    assert "model.layers.2.input_layernorm.weight" in caplog.text


def test_a_tied_configuration_over_an_untied_file_keeps_both(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = save(tmp_path / "model", tie_word_embeddings=True)
    stored = load_file(directory / "model.safetensors")
    source = StudentSource(init="layers_of_teacher", path=str(directory), layers=3)
    kept = build_student(source, seed=0).eval()
    assert f"config.json ties {HEAD} to {EMBEDDING}, which differ" in caplog.text
    assert torch.equal(kept.get_output_embeddings().weight, stored[HEAD])  # type: ignore[no-untyped-call]
    assert torch.equal(kept.get_input_embeddings().weight, stored[EMBEDDING])  # type: ignore[no-untyped-call]
    original = load_model(find_model(str(directory)), dtype=torch.float32)
    ids_1T = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(kept(input_ids=ids_1T).logits, original(input_ids=ids_1T).logits)
    kept.save_pretrained(tmp_path / "saved")
    assert not read_config(tmp_path / "saved" / "config.json").tie_word_embeddings


def test_a_tied_file_needs_no_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load_model(find_model(str(save(tmp_path, without(HEAD), tie_word_embeddings=True))), dtype=torch.float32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[no-untyped-call]
    assert not caplog.text


def test_layers_that_change_their_kind_are_refused() -> None:
    sizes = {**SIZES, "n_routed_experts": 4, "moe_intermediate_size": 8, "first_k_dense_replace": 1, "n_group": 1}
    ranks = {"topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
    model = random_model(DeepseekV3Config(**sizes, **ranks, v_head_dim=8, num_experts_per_tok=2))
    assert len(keep_layers(model, (0, 2)).state_dict()) < len(model.state_dict())
    with pytest.raises(UsageError, match=r"does not stay itself with layers \[1, 2\]: model\.layers\.0\.mlp"):
        keep_layers(model, (1, 2))  # the first layer is dense, wherever it comes from


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Gemma2Config(), "gemma2 caps its attention, which sdpa leaves out"),
        (Gemma2Config(attn_logit_softcapping=None), "gemma2 has no sdpa attention"),
        (GptOssConfig(), "gpt_oss has no sdpa attention"),
    ],
)
def test_without_sdpa_attention_is_eager_and_told(config: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    assert attention_for(config, "sdpa", key="teacher.attention") == "eager"
    assert caplog.messages == [f"{reason}: teacher.attention is eager instead"]
    assert [attention_for(config, asked, key="k") for asked in ("eager", "flash_attention_2")] == [
        "eager",
        "flash_attention_2",
    ]
    assert attention_for(LlamaConfig(), "sdpa", key="k") == "sdpa"
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("fields", "words", "fix"),
    [
        ({"model_type": "nonsense"}, "nonsense", "upgrade transformers if a newer one"),
        ({"model_type": "t5"}, "'t5' is not a causal language model", "predicts the next token"),
        ({"num_attention_heads": 0}, "by zero", "repair that value"),
        ({"num_key_value_heads": 0}, "by zero", "repair that value"),
        ({"hidden_act": "nope"}, "KeyError 'nope'", "repair that value"),
    ],
    ids=str,
)
@pytest.mark.parametrize("init", ["pretrained", "layers_of_teacher", "from_config"])
def test_what_transformers_refuses_gets_advice_about_its_cause(
    init: str, fields: dict[str, Any], words: str, fix: str, tmp_path: Path
) -> None:
    directory = save(tmp_path, **fields)
    more = {"layers": 1} if init == "layers_of_teacher" else {}
    with pytest.raises(UsageError, match=words) as caught:
        student(init, **more)(directory)
    assert caught.value.where == f"path: {directory}"
    assert fix in (caught.value.fix or "")
