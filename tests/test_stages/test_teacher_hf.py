"""Teachers: our hidden states and head give the model's own logits, for each way in which heads differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import cast

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
)

from stages.devices import has_native_bfloat16, resolve_device, resolve_dtype
from stages.models.files import find_model, load_config
from stages.models.head import SCALES, Head, HeadRule
from stages.teacher import BACKENDS
from stages.teacher.backend import HiddenStateTeacher, teacher_identity
from storage.errors import OutOfSpaceError, UsageError

SIZES = {
    "vocab_size": 104,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
REAL = 100  # the last four rows of each head are padding
GPT2 = {"vocab_size": 104, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen2, tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "gemma2: softcap": Gemma2Config(**SIZES, final_logit_softcapping=3.0, sliding_window=16),
    "cohere: scale": CohereConfig(**SIZES, logit_scale=0.25),
    "cohere2: scale": Cohere2Config(**SIZES, logit_scale=0.25, sliding_window=16),
    "granite: divisor": GraniteConfig(**SIZES, logits_scaling=4.0),
    "hyperclovax: scale": HyperCLOVAXConfig(**SIZES, logits_scaling=0.25),
    "falcon h1: multiplier": FalconH1Config(
        **SIZES, lm_head_multiplier=0.5, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8
    ),
    "gpt2": GPT2Config(**GPT2),
    "gpt-neox": GPTNeoXConfig(**{key: SIZES[key] for key in SIZES if key not in ("num_key_value_heads", "head_dim")}),
}


def save(config: PretrainedConfig, directory: Path) -> Path:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # logits large enough for a softcap to show
    model.save_pretrained(directory)
    return directory


def load(
    directory: Path, *, vocab_size: int = REAL, dtype: torch.dtype = torch.float32, attention: str | None = None
) -> HiddenStateTeacher:
    files = find_model(str(directory))
    if attention is None:
        attention = "eager" if load_config(files).model_type == "gemma2" else "sdpa"
    load_hf = BACKENDS["hf"].load()
    teacher = load_hf(files, vocab_size=vocab_size, device=torch.device("cpu"), dtype=dtype, attention=attention)
    return cast("HiddenStateTeacher", teacher)


def token_ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, REAL, shape, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_models_own(name: str, tmp_path: Path) -> None:
    directory = save(CONFIGS[name], tmp_path)
    teacher = load(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    ids_BT = token_ids(3, 20)
    expected_BTV = model(input_ids=ids_BT).logits[..., :REAL]
    found_NV = teacher.logits(teacher.hidden(ids_BT).flatten(0, 1))
    assert found_NV.dtype == torch.float32
    assert expected_BTV.std() > 0.05
    torch.testing.assert_close(found_NV.view(3, 20, REAL), expected_BTV, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("name", CONFIGS)
def test_padding_on_the_right_changes_nothing(name: str, tmp_path: Path) -> None:
    teacher = load(save(CONFIGS[name], tmp_path))
    ids_BT = token_ids(3, 20)
    ids_BT[1, 13:] = 0
    alone_1TD = teacher.hidden(ids_BT[1:2, :13])
    torch.testing.assert_close(teacher.hidden(ids_BT)[1:2, :13], alone_1TD, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_head_is_exact_in_float32_after_a_bfloat16_forward(tmp_path: Path) -> None:
    teacher = load(save(CONFIGS["llama"], tmp_path), dtype=torch.bfloat16)
    assert isinstance(teacher.head, Head)  # type: ignore[attr-defined]
    before = torch.backends.mkldnn.matmul.fp32_precision
    hidden_ND = teacher.hidden(token_ids(2, 30)).flatten(0, 1)
    assert hidden_ND.dtype == torch.bfloat16
    weight_VD = teacher.model.lm_head.weight[:REAL]  # type: ignore[attr-defined]
    exact_NV = hidden_ND.double() @ weight_VD.double().T
    torch.testing.assert_close(teacher.logits(hidden_ND).double(), exact_NV, rtol=1e-6, atol=1e-5)
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_identity_needs_no_weights_and_no_path(tmp_path: Path) -> None:
    config = CONFIGS["granite: divisor"]
    here = save(config, tmp_path / "here")
    shutil.copytree(here, tmp_path / "there")
    identities = []
    for directory in (here, tmp_path / "there"):
        model = find_model(str(directory))
        identities.append(
            teacher_identity(model, load_config(model), backend="hf", dtype=torch.bfloat16, attention="sdpa")
        )
    assert identities[0] == identities[1]
    assert identities[0]["logit_scale"] == 0.25
    assert identities[0]["dtype"] == "bfloat16"
    assert set(identities[0]["files"]) == {"config.json", "model.safetensors"}
    assert str(tmp_path) not in json.dumps(identities[0])


def test_a_head_that_is_not_understood_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save(CONFIGS["granite: divisor"], tmp_path)
    monkeypatch.delitem(SCALES, "granite")
    with pytest.raises(UsageError, match="GraniteForCausalLM treats its logits in a way"):
        load(directory)


def test_a_head_smaller_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="104 rows for 105 tokens"):
        load(save(CONFIGS["llama"], tmp_path), vocab_size=105)


def test_missing_model(tmp_path: Path) -> None:
    for name in (str(tmp_path / "absent"), "./absent"):
        with pytest.raises(UsageError, match="no model directory"):
            find_model(name)
    with pytest.raises(UsageError, match=r"no directory 'nobody/nothing'.*not in the cache"):
        find_model("nobody/nothing")
    with pytest.raises(UsageError, match=r"no config\.json"):
        find_model(str(tmp_path))
    with pytest.raises(UsageError, match="no home directory is known for '~nouser/x'"):
        find_model("~nouser/x")
    with pytest.raises(UsageError, match="too long for the system") as caught:
        find_model("x" * 5000, key="student.path")
    assert caught.value.where == "student.path"


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    directory = save(CONFIGS["llama"], tmp_path)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(UsageError, match="no safetensors weights"):
        find_model(str(directory))
    assert find_model(str(directory), weights=False).directory == directory


@pytest.mark.parametrize("content", ["{", '{"model_type": "nonsense"}', '{"auto_map": {"AutoConfig": "evil.Config"}}'])
def test_broken_or_foreign_configuration(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match="cannot read the model's configuration"):
        load_config(find_model(str(tmp_path), weights=False))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            {"hidden_size": 64},
            r"weights have other shapes .* lm_head\.weight: \[104, 32\] in the file, \[104, 64\] asked",
        ),
        ({"num_attention_heads": "four"}, "Validation error for field 'num_attention_heads': TypeError"),
        ({"num_attention_heads": 0}, "by zero"),
        ({"num_key_value_heads": 0}, "cannot load the model: .*by zero"),
        ({"hidden_act": "nope"}, "cannot load the model: .*KeyError 'nope'"),
    ],
    ids=str,
)
def test_a_configuration_with_a_broken_value(change: dict[str, object], what: str, tmp_path: Path) -> None:
    directory = save(CONFIGS["llama"], tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UsageError, match=what) as caught:
        load(directory)
    assert caught.value.where is not None
    assert caught.value.where.startswith(str(directory))


def test_a_teacher_larger_than_the_memory(tmp_path: Path) -> None:
    directory = save(CONFIGS["llama"], tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 2**50}))
    with pytest.raises(OutOfSpaceError, match="does not fit into memory"):
        load(directory)


def test_truncated_weights(tmp_path: Path) -> None:
    directory = save(CONFIGS["llama"], tmp_path)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UsageError, match="cannot load the model"):
        load(directory)


def test_weights_that_do_not_fit_the_configuration(tmp_path: Path) -> None:
    directory = save(CONFIGS["llama"], tmp_path)
    config = json.loads((directory / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="lack"):
        load(directory)


def test_unsupported_attention_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot load the model") as caught:
        load(save(CONFIGS["gemma2: softcap"], tmp_path), attention="sdpa")
    assert "teacher.attention: eager" in str(caught.value)


def test_head_rule_without_anything_special() -> None:
    assert HeadRule.of(CONFIGS["llama"]) == HeadRule()
    assert HeadRule.of(GraniteConfig(**SIZES)) == HeadRule()


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="unknown device 'abacus'"):
        resolve_device("abacus")
    with pytest.raises(UsageError, match="unknown dtype 'int8'"):
        resolve_dtype("int8", torch.device("cpu"))
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="not available"):
            resolve_device("cuda")
    expected = torch.bfloat16 if has_native_bfloat16(torch.device("cpu")) else torch.float32
    assert resolve_dtype("auto", torch.device("cpu")) == expected
    assert resolve_dtype("float16", torch.device("cpu")) == torch.float16
