"""What is allocated: no operation makes a [tokens, vocab] tensor, and training memory falls with the chunk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.losses import DIVERGENCES, FusedLinearCrossEntropy, FusedLinearKDLoss, KDLoss, SparseTargets, TeacherHead

N, D, V, CHUNK = 64, 8, 211, 8


class Allocated(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sizes, in elements, of the storages that operations returned and that were not there before."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.sizes = {0}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.sizes.add(x.untyped_storage().nbytes() // x.element_size())
        return out


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LABELS = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))
LABELS[::7] = -100


def rows() -> SparseTargets:
    return SparseTargets.from_logits(rand(N, V, seed=1), 6, draws=4, temperatures=(2.0,))


TEACHERS: dict[str, Callable[[], SparseTargets | TeacherHead]] = {
    "sparse": rows,
    "head": lambda: TeacherHead(hidden_ND=rand(N, 5), weight_VD=rand(V, 5)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", [{}, {"temperature": 2.0}, {"softcap": 5.0, "kd_ratio": 1.0}])
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.filterwarnings("ignore:at temperature")
def test_fused_forms_never_hold_tokens_by_vocab(
    name: str, teacher: str, fields: dict[str, float], dtype: torch.dtype
) -> None:
    """Neither side: the largest new tensor, forward and backward, is a chunk of logits or the weight's gradient."""
    hidden_ND, weight_VD = rand(N, D).to(dtype).requires_grad_(), rand(V, D).to(dtype).requires_grad_()
    targets = TEACHERS[teacher]()
    if isinstance(targets, TeacherHead):
        targets = TeacherHead(hidden_ND=targets.hidden_ND.to(dtype), weight_VD=targets.weight_VD.to(dtype))
    loss = FusedLinearKDLoss(divergence=name, chunk_size=CHUNK, **fields)  # type: ignore[arg-type]
    with Allocated(hidden_ND, weight_VD) as seen:
        loss(hidden_ND, weight_VD, targets, LABELS).loss.backward()
    assert max(seen.sizes) <= max(CHUNK * V + 1, V * D)


def test_fused_cross_entropy_never_holds_tokens_by_vocab() -> None:
    hidden_ND, weight_VD = rand(N, D).requires_grad_(), rand(V, D).requires_grad_()
    with Allocated(hidden_ND, weight_VD) as seen:
        FusedLinearCrossEntropy(chunk_size=CHUNK)(hidden_ND, LABELS, weight_VD).backward()
    assert max(seen.sizes) <= max(CHUNK * V + 1, V * D)


@pytest.mark.parametrize(("hidden", "weight"), [(True, True), (True, False), (False, True), (False, False)])
def test_only_wanted_gradients_are_formed(hidden: bool, weight: bool) -> None:
    """Those of frozen hidden states or of a frozen head are not, and under no_grad none is."""
    hidden_ND, weight_VD = rand(N, D).requires_grad_(hidden), rand(V, D).requires_grad_(weight)
    logits_NV, targets = rand(N, V).requires_grad_(hidden), rows()

    def formed() -> tuple[bool, bool, bool]:
        with Allocated(hidden_ND, weight_VD) as fused:
            FusedLinearKDLoss(chunk_size=CHUNK)(hidden_ND, weight_VD, targets, LABELS)
        with Allocated(logits_NV) as plain:
            KDLoss(chunk_size=CHUNK)(logits_NV, targets, LABELS)
        return N * D in fused.sizes, V * D in fused.sizes, N * V in plain.sizes

    assert formed() == (hidden, weight, hidden)
    with torch.no_grad():
        assert formed() == (False, False, False)


def peak_bytes(step: Callable[[], None]) -> int:
    """The most that torch's allocator holds during `step` beyond what it held before: the running sum of its events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    kineto = profile.profiler
    assert kineto is not None
    assert kineto.kineto_results is not None
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_training_memory_of_logit_losses_is_their_gradient_and_a_chunk(name: str) -> None:
    """Forward and backward together: the gradient in the logits' precision, and chunks that chunk_size makes small.

    Autograd through log_softmax, as the peers do it, holds several float32 copies of the logits.
    """
    rows_, vocab = 256, 4000
    logits = rand(rows_, vocab).bfloat16().requires_grad_()
    teacher = rand(rows_, vocab, seed=1).bfloat16()
    labels = torch.randint(0, vocab, (rows_,))
    gradient = logits.nbytes

    def step(chunk_size: int) -> Callable[[], None]:
        return lambda: KDLoss(divergence=name, chunk_size=chunk_size)(logits, teacher, labels).backward()

    step(4)()
    logits.grad = None
    peaks = []
    for chunk_size in (4, 256):
        peaks.append(peak_bytes(step(chunk_size)))
        logits.grad = None
    assert peaks[0] < 1.4 * gradient
    assert peaks[0] < 0.6 * peaks[1]

    def naive() -> None:
        log_q = logits.float().log_softmax(-1)
        (teacher.float().softmax(-1) * (teacher.float().log_softmax(-1) - log_q)).sum(-1).mean().backward()  # type: ignore[no-untyped-call]

    assert peak_bytes(naive) > 4 * peaks[0]


@pytest.mark.parametrize("fields", [{}, {"temperature": 2.0}, {"softcap": 5.0, "kd_ratio": 1.0}])
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
@pytest.mark.filterwarnings("ignore:at temperature")
def test_fused_memory_is_a_chunk_and_flat_in_tokens(name: str, teacher: str, fields: dict[str, float]) -> None:
    """All student buffers together are one chunk, and a second chunk adds its rows' own numbers only."""
    chunk, vocab = 128, 1 << 14

    def peak(tokens: int) -> int:
        hidden, weight = rand(tokens, D).requires_grad_(), rand(vocab, D).requires_grad_()
        targets: SparseTargets | TeacherHead = TeacherHead(hidden_ND=rand(tokens, 5), weight_VD=rand(vocab, 5))
        if teacher == "sparse":
            targets = SparseTargets.from_logits(rand(tokens, V), 4, draws=2, temperatures=(2.0,))
        labels = torch.randint(0, vocab, (tokens,))
        loss = FusedLinearKDLoss(divergence=name, chunk_size=chunk, **fields)  # type: ignore[arg-type]
        return peak_bytes(lambda: loss(hidden, weight, targets, labels).loss.backward())

    small, large = peak(chunk), peak(2 * chunk)
    assert large - small <= chunk * 512
    # 1 MiB is a block of float32 numbers: the dense kernel has up to ten of them, the sparse one up to three
    buffers, blocks = (2, 10) if teacher == "head" else (1, 3)
    assert large <= buffers * chunk * vocab * 4 + vocab * D * 4 + blocks * 2**20
