"""Typed loss configs: a loss by name and fields.

A recipe of the pipeline names KDLoss alone, whose fused form it trains with; the other names are for other callers.

Each config is a plain dataclass with one named field per constructor argument of its loss. The classes, their fields,
defaults and dispatch are those of NeMo-AutoModel's loss configs (their fields first, in their order), with one
difference: a class is recognised by identity, so that somebody's own class of the same name is not replaced by ours.
"""

from __future__ import annotations

import difflib
import types
import typing
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, cast

from torch import nn

from stages.losses.cross_entropy import MaskedCrossEntropy, TEParallelCrossEntropy
from stages.losses.divergences import Divergence
from stages.losses.fused import FusedLinearCrossEntropy, FusedLinearKDLoss
from stages.losses.kd import KDLoss


@dataclass
class LossConfig:
    """Base of all loss configs. Subclasses have one field per parameter of their loss and implement `build`."""

    def build(self) -> nn.Module:
        """Construct the loss module."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to build its loss")


@dataclass
class _LossClassConfig(LossConfig):
    """A config whose fields are exactly the arguments of one class."""

    loss_class: ClassVar[type[nn.Module]]

    def __post_init__(self) -> None:
        """Raise TypeError or ValueError for values that the loss would not take."""
        _check_types(self)
        with warnings.catch_warnings():
            # advice is given once, when the loss that is used is built
            warnings.simplefilter("ignore")
            self.build()

    def build(self) -> nn.Module:
        """Construct the loss module."""
        return self.loss_class(**{item.name: getattr(self, item.name) for item in fields(self)})


@dataclass
class KDLossConfig(_LossClassConfig):
    """`KDLoss` (knowledge distillation); KDLoss documents the fields."""

    loss_class: ClassVar[type[nn.Module]] = KDLoss

    ignore_index: int = -100
    temperature: float = 1.0
    fp32_upcast: bool = True
    tp_group: Any = None
    chunk_size: int = 0
    divergence: str | Divergence = "forward_kl"
    tail: str | None = None
    logits_scale: float = 1.0
    target_logits_scale: float = 1.0
    vocab_size: int | None = None
    check: bool = False
    reduction: str = "mean"

    def fused(self, **extra: Any) -> FusedLinearKDConfig:
        """Return the same divergence from hidden states, as a stored teacher is best compared with.

        Args:
            extra: further fields of FusedLinearKDConfig: the mix with cross-entropy, and what the model does to its
                logits.
        """
        own = {item.name: getattr(self, item.name) for item in fields(self)}
        del own["fp32_upcast"]  # products run in the precision of hidden, row sums in float32
        if own["chunk_size"] == 0:
            del own["chunk_size"]
        return FusedLinearKDConfig(**(own | extra))


@dataclass
class FusedLinearKDConfig(_LossClassConfig):
    """`FusedLinearKDLoss`, which documents the fields."""

    loss_class: ClassVar[type[nn.Module]] = FusedLinearKDLoss

    ignore_index: int = -100
    temperature: float = 1.0
    chunk_size: int = 256
    divergence: str | Divergence = "forward_kl"
    tail: str | None = None
    logits_scale: float = 1.0
    target_logits_scale: float = 1.0
    kd_ratio: float = 0.5
    kd_coef: float | None = None
    kd_loss_weight: float | None = None
    sft_loss_weight: float | None = None
    softcap: float | None = None
    logit_multiplier: float = 1.0
    vocab_size: int | None = None
    tp_group: Any = None
    check: bool = False
    reduction: str = "mean"


@dataclass
class MaskedCrossEntropyConfig(_LossClassConfig):
    """`MaskedCrossEntropy`, which documents the fields."""

    loss_class: ClassVar[type[nn.Module]] = MaskedCrossEntropy

    fp32_upcast: bool = True
    ignore_index: int = -100
    reduction: str = "sum"
    chunk_size: int = 0
    vocab_size: int | None = None


@dataclass
class FusedLinearCEConfig(_LossClassConfig):
    """`FusedLinearCrossEntropy`, which documents the fields."""

    loss_class: ClassVar[type[nn.Module]] = FusedLinearCrossEntropy

    ignore_index: int = -100
    logit_softcapping: float = 0.0
    reduction: str = "sum"
    chunk_size: int = 256
    vocab_size: int | None = None
    tp_group: Any = None


@dataclass
class TEParallelCEConfig(_LossClassConfig):
    """`TEParallelCrossEntropy`, which documents the fields."""

    loss_class: ClassVar[type[nn.Module]] = TEParallelCrossEntropy

    ignore_index: int = -100
    reduction: str = "sum"
    tp_group: Any = None
    chunk_size: int = 0
    vocab_size: int | None = None


@dataclass
class LossFromFactoryConfig(LossConfig):
    """Any loss class or callable with its keyword arguments: the way in for losses that are not ours.

    Attributes:
        factory: called as factory(**kwargs).
        kwargs: its arguments, unchecked.

    Raises:
        AssertionError: building without a factory, as NeMo-AutoModel has it.
    """

    factory: Callable[..., nn.Module] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """Construct the loss module."""
        if self.factory is None:
            raise AssertionError("LossFromFactoryConfig.factory is None; it must be a callable, such as a loss class")
        return self.factory(**self.kwargs)


LOSS_CONFIG_REGISTRY: dict[str, type[LossConfig]] = {
    "MaskedCrossEntropy": MaskedCrossEntropyConfig,
    "FusedLinearCrossEntropy": FusedLinearCEConfig,
    "TEParallelCrossEntropy": TEParallelCEConfig,
    "KDLoss": KDLossConfig,
    "FusedLinearKDLoss": FusedLinearKDConfig,
}


def build_loss_config(loss: LossConfig | str | Callable[..., nn.Module], **loss_kwargs: Any) -> LossConfig:
    """Return the LossConfig that `loss` stands for.

    Args:
        loss: a config, returned as it is; a name of LOSS_CONFIG_REGISTRY; one of its loss classes, which becomes its
            config if the arguments are fields of it; any other class or callable, which is wrapped.
        loss_kwargs: fields or arguments; none beside a ready config.

    Raises:
        TypeError: a config class instead of an instance, an unknown name or field, a value of the wrong type, or
            something that cannot be called.
        ValueError: arguments beside a config, or a value out of range.
    """
    if isinstance(loss, LossConfig):
        if loss_kwargs:
            raise ValueError(
                f"{type(loss).__name__} is complete: {', '.join(loss_kwargs)} must be set on the config itself"
            )
        return loss
    if isinstance(loss, type) and issubclass(loss, LossConfig):
        raise TypeError(f"pass an instance, not the class: {loss.__name__}(...)")
    if isinstance(loss, str):
        if loss not in LOSS_CONFIG_REGISTRY:
            near = _nearest(loss, LOSS_CONFIG_REGISTRY)
            raise TypeError(f"Unknown loss name {loss!r}{near}. Anything else is given as a loss class/callable")
        return _from_fields(loss, loss_kwargs)
    if not callable(loss):
        raise TypeError(f"loss is {loss!r}; expected a LossConfig, a registry name or a loss class/callable")
    for config_class in LOSS_CONFIG_REGISTRY.values():
        fitting = loss_kwargs.keys() <= {item.name for item in fields(config_class)}
        if getattr(config_class, "loss_class", None) is loss and fitting:
            return config_class(**loss_kwargs)
    return LossFromFactoryConfig(factory=cast("Callable[..., nn.Module]", loss), kwargs=loss_kwargs)


def build_loss_module(loss: LossConfig | str | Callable[..., nn.Module], **loss_kwargs: Any) -> nn.Module:
    """Build a loss: build_loss_config(loss, **loss_kwargs).build()."""
    return build_loss_config(loss, **loss_kwargs).build()


def _from_fields(name: str, values: dict[str, Any]) -> LossConfig:
    config_class = LOSS_CONFIG_REGISTRY[name]
    known = [item.name for item in fields(config_class)]
    for key in values:
        if key not in known:
            raise TypeError(f"loss {name!r} has no field {key!r}{_nearest(key, known)}")
    return config_class(**values)


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    """Say what to do about an unknown name."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f", did you mean {near[0]!r}? Known are {', '.join(names)}" if near else f"; known are {', '.join(names)}"


def _check_types(config: LossConfig) -> None:
    """Raise TypeError for a field whose value is not of its annotated type."""
    hints = typing.get_type_hints(type(config))
    for item in fields(config):
        value, hint = getattr(config, item.name), hints[item.name]
        allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if hint is not Any and not any(_is_a(value, kind) for kind in allowed):
            raise TypeError(
                f"{type(config).__name__}.{item.name} is {value!r} ({type(value).__name__}), expected {item.type}"
            )


def _is_a(value: object, kind: type) -> bool:
    """Tell whether a value is of a type; True and False are not numbers here, and an integer is a float."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
