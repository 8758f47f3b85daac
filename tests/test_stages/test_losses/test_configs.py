"""Typed loss configs: names, fields, defaults, dispatch and errors."""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch
from torch import nn

import stages.losses as losses
from stages.losses import (
    LOSS_CONFIG_REGISTRY,
    FusedLinearCEConfig,
    FusedLinearKDConfig,
    KDLossConfig,
    LossConfig,
    LossFromFactoryConfig,
    MaskedCrossEntropyConfig,
    TEParallelCEConfig,
    build_loss_config,
    build_loss_module,
)

# Fields and defaults of NeMo-AutoModel's configs, in their order; ours may only follow.
THEIRS: dict[type[LossConfig], dict[str, object]] = {
    KDLossConfig: {"ignore_index": -100, "temperature": 1.0, "fp32_upcast": True, "tp_group": None, "chunk_size": 0},
    MaskedCrossEntropyConfig: {"fp32_upcast": True, "ignore_index": -100, "reduction": "sum"},
    FusedLinearCEConfig: {"ignore_index": -100, "logit_softcapping": 0.0, "reduction": "sum"},
    TEParallelCEConfig: {"ignore_index": -100, "reduction": "sum", "tp_group": None},
    LossFromFactoryConfig: {"factory": None, "kwargs": {}},
}


@pytest.mark.parametrize("config_class", THEIRS)
def test_their_fields_come_first(config_class: type[LossConfig]) -> None:
    expected = THEIRS[config_class]
    found = {
        item.name: item.default if item.default_factory is MISSING else item.default_factory()
        for item in fields(config_class)
    }
    assert list(found.items())[: len(expected)] == list(expected.items())
    positional = list(expected.values())
    if config_class is not LossFromFactoryConfig:
        assert config_class(*positional) == config_class()


@pytest.mark.parametrize("name", LOSS_CONFIG_REGISTRY)
def test_every_registered_loss_builds_alike_by_name_class_and_config(name: str) -> None:
    loss_class = getattr(losses, name)
    by_name, by_class = build_loss_config(name, ignore_index=-7), build_loss_config(loss_class, ignore_index=-7)
    assert by_name == by_class == LOSS_CONFIG_REGISTRY[name](ignore_index=-7)  # type: ignore[call-arg]
    assert build_loss_config(by_name) is by_name
    for module in (build_loss_module(name), build_loss_module(loss_class), build_loss_module(by_name)):
        assert type(module) is loss_class


def test_a_config_has_every_parameter_of_its_loss() -> None:
    import inspect

    for name, config_class in LOSS_CONFIG_REGISTRY.items():
        parameters = inspect.signature(getattr(losses, name).__init__).parameters
        mine = {item.name: item.default for item in fields(config_class)}
        assert mine == {key: value.default for key, value in parameters.items() if key != "self"}


def test_a_recipe_selects_a_loss() -> None:
    """`loss: {name: KDLoss, divergence: jsd, temperature: 1.5}`, and its fused form for a stored teacher."""
    recipe = {"name": "KDLoss", "divergence": "jsd", "temperature": 1.5}
    config = build_loss_config(recipe.pop("name"), **recipe)  # type: ignore[arg-type]
    assert config == KDLossConfig(divergence="jsd", temperature=1.5)
    assert isinstance(config, KDLossConfig)
    fused = config.fused(kd_ratio=0.7, softcap=30.0)
    assert fused == FusedLinearKDConfig(divergence="jsd", temperature=1.5, kd_ratio=0.7, softcap=30.0)
    assert isinstance(fused.build(), losses.FusedLinearKDLoss)
    assert KDLossConfig(chunk_size=64).fused().chunk_size == 64


def test_the_base_does_not_build() -> None:
    with pytest.raises(NotImplementedError, match="LossConfig"):
        LossConfig().build()
    with pytest.raises(AssertionError, match="must be a callable"):
        LossFromFactoryConfig().build()


def test_dispatch_errors() -> None:
    with pytest.raises(ValueError, match="temperature must be set on the config"):
        build_loss_config(KDLossConfig(), temperature=2.0)
    with pytest.raises(TypeError, match="instance, not the class: KDLossConfig"):
        build_loss_config(KDLossConfig)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Unknown loss name 'KDLos', did you mean 'KDLoss'.*class/callable"):
        build_loss_config("KDLos")
    with pytest.raises(TypeError, match="known are MaskedCrossEntropy"):
        build_loss_config("zzz")
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        build_loss_config("KDLoss", temprature=2.0)
    with pytest.raises(TypeError, match=r"expected a LossConfig.*class/callable"):
        build_loss_config(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value", "error", "told"),
    [
        ("temperature", 0.0, ValueError, "temperature"),
        ("temperature", float("nan"), ValueError, "temperature"),
        ("temperature", "1.5", TypeError, "temperature"),
        ("temperature", True, TypeError, "temperature"),
        ("fp32_upcast", 1, TypeError, "fp32_upcast"),
        ("chunk_size", -1, ValueError, "chunk_size"),
        ("chunk_size", 2.5, TypeError, "chunk_size"),
        ("divergence", "forwrd_kl", ValueError, "did you mean 'forward_kl'"),
        ("divergence", "jsd(1.0)", ValueError, "jsd: beta is 1.0, allowed is 0 < beta < 1"),
        ("divergence", "jsd(a)", ValueError, "beta must be a number, found 'a'"),
        ("divergence", "forward_kl(0.5)", ValueError, "forward_kl takes no parameter"),
        ("divergence", "skew_forward_kl(1)", ValueError, "alpha is 1.0, allowed is 0 <= alpha < 1"),
        ("divergence", "mixed(1.1)", ValueError, "weight is 1.1, allowed is 0 <= weight <= 1"),
        ("divergence", None, TypeError, "divergence is None"),
        ("tail", "bukket", ValueError, "tail policy 'bukket' is unknown; known are sampled"),
        ("logits_scale", -1.0, ValueError, "logits_scale"),
        ("target_logits_scale", float("inf"), ValueError, "target_logits_scale"),
        ("vocab_size", "many", TypeError, "vocab_size"),
        ("vocab_size", 0, ValueError, "vocab_size"),
        ("vocab_size", -1, ValueError, "vocab_size"),
    ],
)
def test_values_are_checked_as_well_as_names(field: str, value: object, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=re.escape(told)):
        build_loss_config("KDLoss", **{field: value})


@pytest.mark.parametrize(
    "values",
    [
        {"kd_ratio": 1.5},
        {"kd_coef": -0.1},
        {"kd_loss_weight": -1.0},
        {"kd_loss_weight": float("nan")},
        {"kd_loss_weight": float("inf")},
        {"kd_loss_weight": 0.0},
        {"kd_loss_weight": 0.0, "sft_loss_weight": 0.0},
        {"sft_loss_weight": float("nan")},
        {"sft_loss_weight": float("inf")},
        {"kd_ratio": 0.3, "kd_coef": 0.4},
        {"kd_ratio": 0.3, "kd_loss_weight": 1.0},
        {"kd_coef": 0.4, "sft_loss_weight": 1.0},
        {"softcap": 0.0},
        {"softcap": -30.0},
        {"softcap": float("inf")},
        {"softcap": float("nan")},
        {"logit_multiplier": 0.0},
        {"logit_multiplier": float("inf")},
        {"chunk_size": 0},
        {"vocab_size": 0},
    ],
)
def test_fused_values_are_checked(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        build_loss_config("FusedLinearKDLoss", **values)
    if values.keys() <= {"softcap", "logit_multiplier"}:
        with pytest.raises(ValueError, match=next(iter(values))):
            losses.TeacherHead(hidden_ND=torch.zeros(1, 2), weight_VD=torch.zeros(3, 2), **values)


@pytest.mark.parametrize("name", ["MaskedCrossEntropy", "TEParallelCrossEntropy", "FusedLinearCrossEntropy"])
@pytest.mark.parametrize(
    ("field", "value"), [("reduction", "each"), ("chunk_size", -1), ("vocab_size", 0), ("vocab_size", -1)]
)
def test_values_of_cross_entropies_are_checked(name: str, field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value!r}, "):
        build_loss_config(name, **{field: value})


@pytest.mark.parametrize("cap", [-1.0, float("inf"), float("nan")])
def test_the_cap_of_fused_cross_entropy_is_checked(cap: float) -> None:
    with pytest.raises(ValueError, match="softcap"):
        build_loss_config("FusedLinearCrossEntropy", logit_softcapping=cap)


def test_integers_are_numbers_and_configs_are_not_shared() -> None:
    assert KDLossConfig(temperature=2).temperature == 2
    assert LossFromFactoryConfig().kwargs is not LossFromFactoryConfig().kwargs


def test_the_guide_runs_and_names_everything() -> None:
    guide = (Path(__file__).parents[3] / "docs" / "losses.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    assert len(blocks) == 1
    exec(blocks[0], {})
    for name in (*LOSS_CONFIG_REGISTRY, *losses.DIVERGENCES, *losses.TAIL_POLICIES):
        assert f"`{name}" in guide, name


class KDLoss(nn.Module):
    """Somebody's own loss that happens to have the name of ours."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature


def test_a_class_of_the_same_name_is_not_replaced() -> None:
    config = build_loss_config(KDLoss, temperature=2.0)
    assert config == LossFromFactoryConfig(factory=KDLoss, kwargs={"temperature": 2.0})
    assert type(build_loss_module(KDLoss, temperature=2.0)) is KDLoss


def test_other_callables_and_unfitting_arguments_are_wrapped() -> None:
    assert isinstance(build_loss_module(nn.CrossEntropyLoss, label_smoothing=0.1), nn.CrossEntropyLoss)
    assert build_loss_module(lambda size: nn.Linear(size, size), size=3).weight.shape == (3, 3)
    wrapped = build_loss_config(losses.KDLoss, colour="red")
    assert wrapped == LossFromFactoryConfig(factory=losses.KDLoss, kwargs={"colour": "red"})
    with pytest.raises(TypeError, match="colour"):
        wrapped.build()


def test_losses_import_torch_and_numpy_alone() -> None:
    """At the top of a file or inside of a function: no kernel library is needed, or taken where it happens to be."""
    imported = set()
    for path in Path(losses.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [item.name for item in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.partition(".")[0] for name in names}
    assert imported - set(sys.stdlib_module_names) == {"numpy", "stages", "storage", "torch"}
