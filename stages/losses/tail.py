"""What to do with the teacher's mass outside the head: tail policies, resolved into plain numbers per row.

Notation as in the literature on sparse distillation: H the head, r the teacher's mass outside it, p_hat the unbiased
estimate of the whole distribution that head and tail samples give (Anshumann et al. 2025, "Sparse Logit Sampling").

Shape suffixes: N rows, E entry slots per row.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stages.losses.divergences import Divergence
from stages.losses.targets import SparseTargets

TAIL_POLICIES: dict[str, str] = {
    "sampled": "head as it is, r spread over the tail samples: unbiased",
    "bucket": "head as it is, everything else one outcome: a lower bound of the full divergence",
    "renormalize": "head scaled up to 1 against the student over the whole vocabulary: biased, a baseline",
    "renormalize_both": "teacher and student both normalised over the head: biased, NeMo-Aligner's published form",
    "residual_to_label": "head as it is, r given to the label: biased",
}
# What float32 storage leaves of a sum of log-probabilities that were normalised.
_MASS_ROUNDING = 1e-6
_LINEAR_ONLY = ("sampled", "renormalize", "residual_to_label")


@dataclass(frozen=True, kw_only=True)
class TeacherEntries:
    """What the row kernel needs of the teacher, at the temperature of the loss.

    Exactly one of two forms. *Estimate* (estimate_NE is given): the loss is sum p_hat (log p_hat - log q), linear in
    p_hat, q over the whole vocabulary. *Outcomes* (log_p_NE is given): any divergence over the head entries and, if
    log_tail_N is given, one outcome more for the rest; without it the student too is normalised over the head.

    Attributes:
        ids_NE: token ids.
        used_NE: slots that take part.
        estimate_NE: p_hat, 0 on unused slots.
        label_mass_N: p_hat that the label receives on top.
        negentropy_N: the row's value of sum p log p.
        log_p_NE: teacher log-probability of head entries, -inf on unused slots.
        log_tail_N: log r.
    """

    ids_NE: Tensor
    used_NE: Tensor
    estimate_NE: Tensor | None = None
    label_mass_N: Tensor | None = None
    negentropy_N: Tensor | None = None
    log_p_NE: Tensor | None = None
    log_tail_N: Tensor | None = None

    @cached_property
    def unit_mass(self) -> bool:
        """Whether every row's p_hat sums to one, but for the rounding of what is stored."""
        if self.estimate_NE is None:
            return False
        mass_N = self.estimate_NE.sum(-1)
        if self.label_mass_N is not None:
            mass_N = mass_N + self.label_mass_N
        return bool(((mass_N - 1.0).abs() <= _MASS_ROUNDING).all())


def check_tail(tail: str | None, divergence: Divergence) -> None:
    """Raise ValueError for an unknown policy, or one that the divergence does not admit."""
    if tail is None:
        return
    if tail not in TAIL_POLICIES:
        raise ValueError(f"tail policy {tail!r} is unknown; known are {', '.join(TAIL_POLICIES)}")
    if tail in _LINEAR_ONLY and not divergence.linear:
        raise ValueError(
            f"tail={tail!r} estimates the teacher's distribution, which is exact only for a loss that is linear in it "
            f"(forward_kl); {divergence} is not: use tail='bucket' or 'renormalize_both'"
        )
    if tail in ("renormalize", "residual_to_label"):
        warnings.warn(
            f"tail={tail!r} gives a biased gradient ({TAIL_POLICIES[tail]}); keep it for comparisons",
            stacklevel=3,
        )


def resolve_tail(tail: str | None, divergence: Divergence, *, draws: int, temperature: float) -> str:
    """Return the policy that applies: the one asked for, else `sampled` where samples and a linear loss allow it."""
    if tail is not None:
        return tail
    return "sampled" if divergence.linear and draws and temperature == 1.0 else "bucket"


def check_rows(
    policy: str,
    temperature: float,
    *,
    headless: int | None,
    draws: int,
    temperatures: Iterable[float],
    sample_logprob: bool = False,
) -> None:
    """Check that rows can feed a policy, by what they hold.

    Args:
        policy: a key of TAIL_POLICIES.
        temperature: the teacher's effective temperature, T / target_logits_scale.
        headless: number of a row without an exact head; None: all have one.
        draws: tail samples per row.
        temperatures: at which tail mass and entropy are stored, besides 1.
        sample_logprob: whether the samples' log-probabilities are stored.

    Raises:
        ValueError: what they lack.
    """
    if policy == "sampled" and draws == 0:
        raise ValueError("tail='sampled', but the rows hold no tail samples (draws is 0): use tail='bucket'")
    if policy == "sampled" and temperature != 1.0 and not sample_logprob:
        raise ValueError(
            f"tail='sampled' at temperature {temperature:g} needs sample_logprob, which these rows do not hold: "
            "use tail='bucket'"
        )
    if headless is not None and not (policy == "sampled" and temperature == 1.0):
        raise ValueError(f"row {headless} has no exact head; rows of samples only admit tail='sampled' with forward_kl")
    if "renormalize" not in policy and temperature != 1.0:
        _stored_key(temperatures, temperature, what="tail_logit")


def prepare_teacher(
    targets: SparseTargets, policy: str, *, temperature: float, labels_N: Tensor, dtype: torch.dtype
) -> TeacherEntries:
    """Turn stored rows into the numbers of one policy.

    Args:
        policy: a key of TAIL_POLICIES.
        temperature: the teacher's effective temperature, T / target_logits_scale.
        labels_N: [N], for residual_to_label; ignored rows must have been dropped.

    Raises:
        ValueError: rows that lack what the policy needs.
    """
    headless_N = targets.head_size_N == 0
    check_rows(
        policy,
        temperature,
        headless=int(headless_N.nonzero()[0]) if bool(headless_N.any()) else None,
        draws=targets.draws,
        temperatures=targets.tail_logit_by_temperature,
        sample_logprob=targets.sample_logprob_NE is not None,
    )
    if policy == "sampled":
        return _sampled(targets, temperature, dtype=dtype)
    head_NE, log_p_NE, log_tail_N = _head_at(targets, temperature, dtype=dtype, need_tail="renormalize" not in policy)
    if policy == "bucket":
        return TeacherEntries(ids_NE=targets.ids_NE, used_NE=head_NE, log_p_NE=log_p_NE, log_tail_N=log_tail_N)
    if policy == "residual_to_label":
        return _residual_to_label(targets, labels_N, p_NE=log_p_NE.exp(), r_N=log_tail_N.exp())
    log_p_NE = log_p_NE - log_p_NE.logsumexp(-1, keepdim=True)
    if policy == "renormalize_both":
        return TeacherEntries(ids_NE=targets.ids_NE, used_NE=head_NE, log_p_NE=log_p_NE)
    p_NE = log_p_NE.exp()
    return TeacherEntries(
        ids_NE=targets.ids_NE,
        used_NE=head_NE,
        estimate_NE=p_NE,
        negentropy_N=-torch.special.entr(p_NE).sum(-1),
    )


def _head_at(
    targets: SparseTargets, temperature: float, *, dtype: torch.dtype, need_tail: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the head mask, log p_T of the head (-inf elsewhere) and log r_T.

    p_T on the head is softmax_H(logprob / T) * (1 - r_T): a temperature scales ratios within the head, and the stored
    r_T says how much mass the head keeps.
    """
    head_NE = targets.head_NE
    log_p_NE = targets.logprob_NE.to(dtype).masked_fill(~head_NE, -torch.inf)
    if temperature == 1.0:
        logit_N = targets.tail_logit_N.to(dtype)
    elif need_tail:
        logit_N = _at(targets.tail_logit_by_temperature, temperature, what="tail_logit").to(dtype)
        _warn_heavy_tail(logit_N, temperature)
    else:
        logit_N = torch.zeros_like(targets.tail_logit_N, dtype=dtype)
    if temperature != 1.0:
        log_p_NE = (log_p_NE / temperature).log_softmax(-1) + torch.nn.functional.logsigmoid(-logit_N).unsqueeze(-1)
    return head_NE, log_p_NE, torch.nn.functional.logsigmoid(logit_N)


def _sampled(targets: SparseTargets, temperature: float, *, dtype: torch.dtype) -> TeacherEntries:
    """Estimate p_hat = p on the head, r * count / M on samples; at T != 1 samples also carry the weight p_T / p."""
    head_NE, sample_NE = targets.head_NE, targets.sample_NE
    share_NE = targets.count_NE.to(dtype) / targets.draws
    if temperature == 1.0:
        entropy_N = targets.entropy_N
        p_NE = targets.logprob_NE.to(dtype).exp().masked_fill(~head_NE, 0.0)
        estimate_NE = torch.addcmul(p_NE, share_NE, targets.tail_logit_N.to(dtype).sigmoid().unsqueeze(-1))
    else:
        assert targets.sample_logprob_NE is not None, "check_rows has seen it"
        warnings.warn(f"tail='sampled' at temperature {temperature:g}: its variance grows fast with T", stacklevel=5)
        entropy_N = _at(targets.entropy_by_temperature, temperature, what="entropy")
        _, log_p_NE, _ = _head_at(targets, temperature, dtype=dtype, need_tail=True)
        # log Z_T from the head: sum_H p^(1/T) / Z_T = 1 - r_T, and log p_T - (log p) / T is the same for every entry.
        shift_N1 = log_p_NE[:, :1] - targets.logprob_NE[:, :1].to(dtype) / temperature
        sampled_NE = targets.sample_logprob_NE.to(dtype).masked_fill(~sample_NE, 0.0)
        weight_NE = (sampled_NE * (1.0 / temperature - 1.0) + shift_N1).exp()
        r_N1 = targets.tail_logit_N.to(dtype).sigmoid().unsqueeze(-1)
        estimate_NE = torch.addcmul(log_p_NE.exp(), share_NE * r_N1, weight_NE)
    if entropy_N is None:
        raise ValueError(
            "tail='sampled' needs the rows' entropy: without it the value would be a cross-entropy, not a divergence"
        )
    return TeacherEntries(
        ids_NE=targets.ids_NE,
        used_NE=head_NE | sample_NE,
        estimate_NE=estimate_NE,
        negentropy_N=-entropy_N.to(dtype),
    )


def _residual_to_label(targets: SparseTargets, labels_N: Tensor, *, p_NE: Tensor, r_N: Tensor) -> TeacherEntries:
    """Give r to the label, in the head or not; the value is the KL of that p_hat, so p_hat's own entropy counts."""
    is_label_NE = targets.head_NE & (targets.ids_NE == labels_N.unsqueeze(-1))
    whole_NE = p_NE + is_label_NE * r_N.unsqueeze(-1)
    outside_N = torch.where(is_label_NE.any(-1), 0.0, r_N)
    negentropy_N = -torch.special.entr(whole_NE).sum(-1) - torch.special.entr(outside_N)
    return TeacherEntries(
        ids_NE=targets.ids_NE,
        used_NE=targets.head_NE,
        estimate_NE=whole_NE,
        label_mass_N=outside_N,
        negentropy_N=negentropy_N,
    )


def _at(stored: Mapping[float, Tensor], temperature: float, *, what: str) -> Tensor:
    """Return the stored column of that temperature."""
    return stored[_stored_key(stored, temperature, what=what)]


def _stored_key(stored: Iterable[float], temperature: float, *, what: str) -> float:
    """Return the stored temperature that this one is, but for rounding."""
    for key in stored:
        if math.isclose(key, temperature, rel_tol=1e-6):
            return key
    have = ", ".join(f"{key:g}" for key in sorted(stored)) or "none"
    raise ValueError(
        f"teacher temperature {temperature:g}: the rows hold no {what} for it (stored besides 1: {have}); "
        "what a store holds is chosen at extraction, by target.temperatures"
    )


def _warn_heavy_tail(logit_N: Tensor, temperature: float) -> None:
    mean = float(logit_N.sigmoid().mean()) if len(logit_N) else 0.0
    if mean > 0.5:
        warnings.warn(
            f"at temperature {temperature:g} the rows' mean tail mass is {mean:.2f}: most of the teacher is one "
            "bucket; store a larger head or use a lower temperature",
            stacklevel=6,
        )
