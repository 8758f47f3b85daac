"""The divergences: pure elementwise functions, one table.

Every divergence here is a sum over outcomes b, D = sum_b d(P_b, Q_b). The outcomes are the whole vocabulary (dense
targets) or the head entries and one bucket for the rest (sparse targets). A divergence gives d and h = Q * dd/dQ, up to
a constant times Q; the gradient for a logit v of outcome b is then

    dD/du_v = q(v | b) * (h_b - Q_b * sum_b h_b),

which stays finite where Q_b underflows although dd/dQ does not. This is the chain rule through softmax: a constant
times Q in h changes nothing, because the Q_b sum to one. It is chosen such that h vanishes with P: where student and
teacher are far apart, most outcomes then add nothing, instead of terms that cancel.

To add one: write a frozen dataclass below and one line in DIVERGENCES. Its fields are its parameters, numbers with a
default; a recipe spells them behind the name, or as keys beside it.
"""

from __future__ import annotations

import difflib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

# A log-ratio of probabilities beyond +-80 only ever multiplies a mass below exp(-80).
_LOG_RATIO_BOUND = 80.0
# Two float32 probabilities that come from equal logits differ by less than this, relatively.
_ROUNDING = 2.0**-18
# softplus(x) is x beyond this, to the last digit of float64.
_SOFTPLUS_THRESHOLD = 40.0


class Divergence(ABC):
    """D(P, Q) between teacher P and student Q.

    Attributes:
        linear: whether D is linear in P up to the teacher's entropy, so that an unbiased estimate of P gives an
            unbiased D.
    """

    linear: ClassVar[bool] = False

    @abstractmethod
    def terms(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return d and h per outcome, each of the inputs' shape.

        Args:
            log_p: teacher log-probabilities; -inf where p is 0.
            log_q: student log-probabilities.
            p: exp(log_p).
            q: exp(log_q).

        An outcome without mass on either side gives zero; where log_p - log_q is undefined for another reason, p or q
        is NaN too, and the caller looks for that once per row. (Masks cost more than arithmetic here: a comparison
        and a masked_fill take as long as an exponential on CPU.)
        """


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(P, Q) = sum P log(P / Q). Hinton et al. 2015."""

    linear: ClassVar[bool] = True

    def terms(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return d = P log(P/Q), h = -P."""
        return (log_p - log_q).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=0.0).mul_(p), -p


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(Q, P) = sum Q log(Q / P). Gu et al. 2023 (MiniLLM). Infinite where the student has mass and P is 0."""

    def terms(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return d = h = Q log(Q/P)."""
        d = (log_q - log_p).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=0.0).mul_(q)
        return d, d


@dataclass(frozen=True)
class JSD(Divergence):
    """beta KL(P, M) + (1 - beta) KL(Q, M) with M = beta P + (1 - beta) Q. Agarwal et al. 2023 (GKD).

    Attributes:
        beta: weight of the teacher, 0 < beta < 1.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"jsd: beta is {self.beta}, allowed is 0 < beta < 1; its limits are forward_kl (0) and reverse_kl (1)"
            )

    def terms(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return d = beta P log(P/M) + (1 - beta) Q log(Q/M), h = (1 - beta) Q log((1 - beta) Q/M)."""
        beta, rest = self.beta, 1.0 - self.beta
        ratio = _log_ratio(log_p, log_q)
        log_m_q = _softplus(ratio + math.log(beta / rest))  # log(M / Q) - log(1 - beta)
        h = (log_m_q * q).mul_(-rest)
        teacher = ratio.sub_(log_m_q).sub_(math.log(rest)).mul_(p).mul_(beta)
        return teacher.add_(h).sub_(q, alpha=rest * math.log(rest)), h


@dataclass(frozen=True)
class SkewForwardKL(Divergence):
    """KL(P, S) with S = alpha P + (1 - alpha) Q. Ko et al. 2024 (DistiLLM).

    Attributes:
        alpha: share of the teacher in S, 0 <= alpha < 1.
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_skew("skew_forward_kl", self.alpha)

    def terms(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return d = P log(P/S), h = -(1 - alpha) P Q/S."""
        if self.alpha == 0.0:
            return ForwardKL().terms(log_p, log_q, p, q)
        x = _log_ratio(log_p, log_q).add_(math.log(self.alpha / (1.0 - self.alpha)))
        h = torch.sigmoid(-x).mul_(p).neg_()
        return _softplus(-x).add_(math.log(self.alpha)).mul_(p).neg_(), h


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(Q, S) with S = (1 - alpha) P + alpha Q. Ko et al. 2024 (DistiLLM).

    Attributes:
        alpha: share of the student in S, 0 <= alpha < 1.
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_skew("skew_reverse_kl", self.alpha)

    def terms(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return d = Q log(Q/S), h = Q (log(alpha Q/S) + 1 - alpha Q/S)."""
        if self.alpha == 0.0:
            return ReverseKL().terms(log_p, log_q, p, q)
        x = _log_ratio(log_p, log_q).add_(math.log((1.0 - self.alpha) / self.alpha))
        log_s_q = _softplus(x)  # log(S / Q) - log(alpha)
        h = (torch.sigmoid(x) - log_s_q).mul_(q)
        # Both terms of h agree in all their digits where x is very negative: its series in y = exp(x) there.
        y = torch.exp(x)
        series = y * y * (y * (2 / 3 + y * (-3 / 4 + y * (4 / 5 - y * (5 / 6)))) - 0.5) * q
        h = torch.where(x < math.log(0.01), series, h)
        return log_s_q.add_(math.log(self.alpha)).mul_(q).neg_(), h


@dataclass(frozen=True)
class Mixed(Divergence):
    """weight KL(P, Q) + (1 - weight) KL(Q, P).

    Attributes:
        weight: share of the forward KL, 0 <= weight <= 1.
    """

    weight: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.weight <= 1.0:
            raise ValueError(f"mixed: weight is {self.weight}, allowed is 0 <= weight <= 1")

    def terms(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted terms of both."""
        if self.weight in (0.0, 1.0):  # a weight of 0 must not meet an infinite term
            return (ForwardKL() if self.weight else ReverseKL()).terms(log_p, log_q, p, q)
        forward_d, forward_h = ForwardKL().terms(log_p, log_q, p, q)
        reverse_d, reverse_h = ReverseKL().terms(log_p, log_q, p, q)
        # not lerp, which takes differences: infinite terms would make it NaN
        forward_d.mul_(self.weight).add_(reverse_d, alpha=1.0 - self.weight)
        return forward_d, forward_h.mul_(self.weight).add_(reverse_h, alpha=1.0 - self.weight)


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """Half the sum of |P - Q|. One minus it is the acceptance rate of speculative decoding (Leviathan et al. 2023)."""

    def terms(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return d = |P - Q| / 2, h = Q (sign(Q - P) - 1) / 2, where a difference within rounding has no sign."""
        difference = q - p
        sign = difference.sign().masked_fill_(difference.abs() <= _ROUNDING * (p + q), 0.0)
        return difference.abs_().mul_(0.5), sign.sub_(1.0).mul_(q).mul_(0.5)


DIVERGENCES: dict[str, type[Divergence]] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "backward_kl": ReverseKL,
    "jsd": JSD,
    "skew_forward_kl": SkewForwardKL,
    "skew_reverse_kl": SkewReverseKL,
    "mixed": Mixed,
    "tvd": TotalVariation,
}


def make_divergence(divergence: str | Divergence) -> Divergence:
    """Return the divergence of that name, with its parameters if they are written behind it: "jsd", "jsd(0.9)".

    The parameters are the fields of its class, in their order: beta of `jsd`, alpha of the skewed KLs, weight of
    `mixed`. Those left out take their defaults. A ready object is returned as it is.

    Raises:
        ValueError: unknown name, a value that is not a number or out of range, or more of them than it takes.
    """
    if isinstance(divergence, Divergence):
        return divergence
    name, written = _split(divergence)
    texts = [] if written is None else written.split(",")
    names = list(parameters(divergence))
    if len(texts) > len(names):
        takes = f"takes {', '.join(names)}" if names else "takes no parameter"
        raise ValueError(f"divergence {divergence!r}: {name} {takes}")
    values = {}
    for key, text in zip(names, texts, strict=False):
        try:
            values[key] = float(text)
        except ValueError:
            raise ValueError(f"divergence {divergence!r}: {key} must be a number, found {text.strip()!r}") from None
    return DIVERGENCES[name](**values)


def with_parameters(divergence: str, values: Mapping[str, object]) -> Divergence:
    """Return the divergence of that name, with parameters by name.

    Raises:
        ValueError: the name or a parameter is unknown, parameters are also given in parentheses, or a value is not a
            number or out of range.
    """
    name, written = _split(divergence)
    for key, value in values.items():
        if key not in parameters(divergence):
            raise ValueError(f"{name} takes no parameter {key}")
        if written is not None:
            raise ValueError(f"{key} is given beside {divergence}: write all of its parameters in one way")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{key} must be a number, found {value!r}")
    return DIVERGENCES[name](**{key: float(value) for key, value in values.items()})  # type: ignore[arg-type]


def parameters(divergence: str) -> dict[str, float]:
    """Return the parameters that a divergence of the table takes, in order, with their defaults.

    Raises:
        ValueError: unknown name.
    """
    name, _ = _split(divergence)
    return vars(DIVERGENCES[name]())


def _split(divergence: str) -> tuple[str, str | None]:
    """Split into a name of the table and what is written in parentheses behind it."""
    parts = re.fullmatch(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*", divergence)
    name = parts[1] if parts else divergence
    if parts is None or name not in DIVERGENCES:
        near = difflib.get_close_matches(name, DIVERGENCES, n=1)
        raise ValueError(
            f"divergence {divergence!r} is unknown{f', did you mean {near[0]!r}?' if near else ''}; "
            f"known are {', '.join(DIVERGENCES)}"
        )
    return name, parts[2]


def spelled_out(divergence: str | Divergence) -> str:
    """Return the name under which a recipe selects it, with its parameters: "jsd" is "jsd(0.5)"."""
    made = make_divergence(divergence)
    name = next((name for name, kind in DIVERGENCES.items() if type(made) is kind), type(made).__name__)
    values = ", ".join(str(value) for value in vars(made).values())
    return f"{name}({values})" if values else name


def _check_skew(name: str, alpha: float) -> None:
    if not 0.0 <= alpha < 1.0:
        raise ValueError(f"{name}: alpha is {alpha}, allowed is 0 <= alpha < 1")


def _log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return log(P/Q), bounded; 0 where neither side has mass."""
    return (log_p - log_q).nan_to_num_(nan=0.0).clamp_(-_LOG_RATIO_BOUND, _LOG_RATIO_BOUND)


def _softplus(x: Tensor) -> Tensor:
    """Return log(1 + exp(x))."""
    return torch.nn.functional.softplus(x, threshold=_SOFTPLUS_THRESHOLD)
