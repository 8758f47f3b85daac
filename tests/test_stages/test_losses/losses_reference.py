"""What the losses are, written from their definitions: float64, one row at a time, differentiated by autograd.

Nothing here is shared with the implementation but the container of the teacher's rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stages.losses import MaskedCrossEntropy, SparseTargets

IGNORE = -100


def _plogp(p: Tensor, log_ratio: Tensor) -> Tensor:
    return torch.where(p > 0, p * torch.where(p > 0, log_ratio, 0.0), 0.0).sum()


def forward_kl(p: Tensor, q: Tensor) -> Tensor:
    return _plogp(p, p.log() - q.log())


def reverse_kl(p: Tensor, q: Tensor) -> Tensor:
    return forward_kl(q, p)


def jsd(beta: float) -> Callable[[Tensor, Tensor], Tensor]:
    def measure(p: Tensor, q: Tensor) -> Tensor:
        m = beta * p + (1 - beta) * q
        return beta * forward_kl(p, m) + (1 - beta) * forward_kl(q, m)

    return measure


def skew_forward_kl(alpha: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda p, q: forward_kl(p, alpha * p + (1 - alpha) * q)


def skew_reverse_kl(alpha: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda p, q: forward_kl(q, (1 - alpha) * p + alpha * q)


def mixed(weight: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda p, q: weight * forward_kl(p, q) + (1 - weight) * reverse_kl(p, q)


def tvd(p: Tensor, q: Tensor) -> Tensor:
    return 0.5 * (p - q).abs().sum()


MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "backward_kl": reverse_kl,
    "jsd": jsd(0.5),
    "jsd(0.1)": jsd(0.1),
    "jsd(0.9)": jsd(0.9),
    "skew_forward_kl": skew_forward_kl(0.1),
    "skew_forward_kl(0.6)": skew_forward_kl(0.6),
    "skew_reverse_kl": skew_reverse_kl(0.1),
    "skew_reverse_kl(0.6)": skew_reverse_kl(0.6),
    "mixed": mixed(0.5),
    "mixed(0.2)": mixed(0.2),
    "tvd": tvd,
}


def dense_kd(
    name: str,
    student_NV: Tensor,
    teacher_NV: Tensor,
    temperature: float = 1.0,
    scales: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Divergence of each row [N], times T^2."""
    q_NV = (student_NV * scales[0] / temperature).softmax(-1)
    p_NV = (teacher_NV * scales[1] / temperature).softmax(-1)
    return torch.stack([MEASURES[name](p, q) for p, q in zip(p_NV, q_NV, strict=True)]) * temperature**2


def sparse_kd(
    name: str,
    student_NV: Tensor,
    targets: SparseTargets,
    labels_N: Tensor,
    policy: str,
    temperature: float = 1.0,
    scales: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Divergence of each row [N] under a tail policy, times T^2; from what the rows hold, nothing else."""
    teacher_t = temperature / scales[1]
    q_NV = (student_NV * scales[0] / temperature).softmax(-1)
    rows = [
        _sparse_row(name, q_NV[n], targets, n, max(int(labels_N[n]), 0), policy, teacher_t) for n in range(len(targets))
    ]
    return torch.stack(rows) * temperature**2


def _sparse_row(
    name: str, q: Tensor, targets: SparseTargets, n: int, label: int, policy: str, teacher_t: float
) -> Tensor:
    size = int(targets.head_size_N[n])
    ids = targets.ids_NE[n, :size].tolist()
    p1 = targets.logprob_NE[n, :size].double().exp()
    r1 = targets.tail_logit_N[n].double().sigmoid()
    p, r = p1, r1
    entropy = None if targets.entropy_N is None else targets.entropy_N[n].double()
    if teacher_t != 1.0:
        powered = p1 ** (1 / teacher_t)
        r = torch.zeros(())
        if policy in ("bucket", "sampled", "residual_to_label"):
            r = targets.tail_logit_by_temperature[teacher_t][n].double().sigmoid()
            entropy = targets.entropy_by_temperature[teacher_t][n].double()
        p = powered / powered.sum() * (1 - r)
    if policy == "bucket":
        q_head = torch.stack([q[v] for v in ids])
        q_tail = sum((q[v] for v in range(len(q)) if v not in ids), torch.zeros((), dtype=q.dtype))
        return MEASURES[name](torch.cat([p, r[None]]), torch.cat([q_head, q_tail[None]]))
    if policy == "renormalize_both":
        q_head = torch.stack([q[v] for v in ids])
        return MEASURES[name](p / p.sum(), q_head / q_head.sum())
    estimate = torch.zeros_like(q)
    for v, mass in zip(ids, p / p.sum() if policy == "renormalize" else p, strict=True):
        estimate[v] += mass
    if policy == "residual_to_label":
        estimate[label] += r
    if policy != "sampled":
        return forward_kl(estimate, q)
    assert entropy is not None
    for slot in range(targets.ids_NE.shape[1]):
        count = int(targets.count_NE[n, slot])
        if count:
            weight = torch.ones((), dtype=q.dtype)
            if teacher_t != 1.0:
                assert targets.sample_logprob_NE is not None
                raw = targets.sample_logprob_NE[n, slot].double()
                # p_T(v) / p(v), with the normaliser read off the head's first entry
                weight = (raw / teacher_t - raw).exp() * p[0] / p1[0] ** (1 / teacher_t)
            estimate[targets.ids_NE[n, slot]] += weight * r1 * count / targets.draws
    return -entropy - _plogp(estimate, q.log())


def cross_entropy(student_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Cross-entropy of each row [N]; 0 where ignored."""
    kept_N = labels_N.clamp_min(0)
    return torch.where(labels_N == IGNORE, 0.0, -student_NV.log_softmax(-1).gather(-1, kept_N[:, None]).squeeze(-1))


def mean_over(values_N: Tensor, labels_N: Tensor, total: float | None = None) -> Tensor:
    """Sum over valid rows, divided by their number or by `total`."""
    valid_N = labels_N != IGNORE
    return values_N[valid_N].sum() / (int(valid_N.sum()) if total is None else total)


def error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))


def cross_entropy_error(logits_NV: Tensor, labels_N: Tensor) -> float:
    """Of the gradient of our cross-entropy for float32 logits, against torch's in float64."""
    mine_NV, exact_NV = logits_NV.clone().requires_grad_(), logits_NV.double().requires_grad_()
    MaskedCrossEntropy(reduction="mean")(mine_NV, labels_N).backward()
    torch.nn.functional.cross_entropy(exact_NV, labels_N).backward()  # type: ignore[no-untyped-call]
    assert mine_NV.grad is not None
    assert exact_NV.grad is not None
    return error(mine_NV.grad, exact_NV.grad)
