"""A model cut between processes: tensor parallelism through DTensor, by the plan that the architecture states.

Data path: whole model on every process -> **its part of each layer and of the head** -> student or live teacher. Layers
compute on whole hidden states and a share of the heads and of the inner width (Shoeybi et al. 2019); the head is cut by
vocabulary and only ever used by the losses, which never gather it.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from transformers import PreTrainedModel

from stages.models.packed import probe_hidden
from stages.models.probe import change_of
from stages.parallel.processes import is_peer_lost
from stages.parallel.tensors import like
from storage.errors import UsageError

_REPLICATED = "replicated_with_grad_allreduce"
# How the plans of transformers name what torch does.
_STYLES: Mapping[str, ParallelStyle] = {
    "colwise": ColwiseParallel(),
    "rowwise": RowwiseParallel(),
    "colwise_gather_output": ColwiseParallel(output_layouts=Replicate()),
    "rowwise_split_input": RowwiseParallel(input_layouts=Replicate()),
}
_ROUNDING_OF_GRADIENT, _ROUNDING_IN_HALF = 1e-2, 0.25  # relative; sound architectures stay below 1e-5 in float32


def cut_model(model: PreTrainedModel, tp: DeviceMesh, *, role: str = "student") -> None:
    """Keep this process's part of a model that every process holds whole, and prove that it still computes the same.

    Embeddings stay whole unless they are tied to the head.

    Args:
        model: with packed attention; changed in place.
        tp: the processes that share it, a mesh of the one dimension `tp`.
        role: what messages call the model.

    Raises:
        UsageError: the architecture states no plan that is known here, or does not divide by the number of processes.
    """
    plan = _plan_of(model, role)
    _check_division(model, plan, tp.size(), role)
    _check_dropout(model, role)
    expected_TD, expected = _probe(model)
    body = model.base_model
    styles = {name: _STYLES[style] for name, style in plan.items() if style in _STYLES}
    try:
        parallelize_module(body, tp, styles, src_data_rank=None)
        _sum_partial_gradients(body, [name for name, style in plan.items() if style == _REPLICATED], tp)
        if model is not body:
            _cut_head(model, tp)
        found_TD, found = _probe(model)
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, RuntimeError) and is_peer_lost(error):  # not the model's fault
            raise
        raise _cannot_be_cut(model, role, str(error).splitlines()[0]) from error
    change = change_of(model, found_TD, expected_TD)
    if change is not None:
        raise _cannot_be_cut(model, role, f"hidden states change by {change:.1%}")
    wrong = _largest_change(model, expected, found, tp)
    if wrong is not None:
        raise _cannot_be_cut(model, role, f"the gradient of {wrong} changes")


def _cannot_be_cut(model: PreTrainedModel, role: str, why: str) -> UsageError:
    return UsageError(
        f"{type(model).__name__} computes something else when it is cut ({why})",
        where=f"tp, {role}",
        fix="train without tensor parallelism, and report the architecture",
    )


def _probe(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Return hidden states [T, D] of a few tokens, and this process's gradient of each weight that learns, for a
    fixed gradient of the hidden states."""
    learns = any(parameter.requires_grad for parameter in model.base_model.parameters())
    with torch.set_grad_enabled(learns):
        hidden_TD = probe_hidden(model)
    if learns:
        given_TD = torch.randn(hidden_TD.shape, generator=torch.Generator().manual_seed(0))
        torch.autograd.backward(hidden_TD, given_TD.to(hidden_TD))
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return hidden_TD.detach(), gradients


def _largest_change(
    model: PreTrainedModel, expected: Mapping[str, Tensor], found: Mapping[str, Tensor], tp: DeviceMesh
) -> str | None:
    """Return the weight whose gradient differs most on any process, if it differs by more than rounding.

    A gradient that is summed over a part of the heads only is off by at least half on one of two processes.
    """
    if not expected:
        return None
    names = sorted(expected)
    total = float(torch.stack([expected[name].float().norm() for name in names]).norm())
    changes = []
    for name in names:
        wanted = _local(like(expected[name], found[name])).float()
        change = (_local(found[name]).float() - wanted).norm() / (wanted.norm() + 1e-4 * total)
        changes.append(torch.nan_to_num(change, nan=torch.inf))
    worst = torch.stack(changes)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=tp.get_group("tp"))
    limit = _ROUNDING_OF_GRADIENT if model.dtype == torch.float32 else _ROUNDING_IN_HALF
    return names[int(worst.argmax())] if bool((worst > limit).any()) else None


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _check_dropout(model: PreTrainedModel, role: str) -> None:
    """Refuse a student with dropout: every process would draw the same mask for other heads."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return
    for name, module in model.base_model.named_modules():
        for key, value in vars(module).items():
            if (isinstance(module, nn.Dropout) or "drop" in key) and isinstance(value, float) and value > 0.0:
                raise UsageError(
                    f"the {role} has dropout ({name}.{key} = {value:g}), and processes that share heads draw one mask",
                    where=f"tp, {role}",
                    fix="set its dropout to 0 in its configuration, or train without tensor parallelism",
                )


def cut_rows(weight_VD: Tensor, rows: int, tp: DeviceMesh) -> Tensor:
    """Cut a head [V, D] where a head of `rows` rows is cut: zeros stand for rows that it lacks."""
    padded_VD = weight_VD.new_zeros(rows, *weight_VD.shape[1:])
    padded_VD[: len(weight_VD)] = weight_VD[:rows]
    return distribute_tensor(padded_VD, tp, [Shard(0)], src_data_rank=None)


def _plan_of(model: PreTrainedModel, role: str) -> dict[str, str]:
    """Return the style of each module of the body, by name with `*` for the number of the layer."""
    plan: dict[str, str] = dict(model.config.get_text_config().base_model_tp_plan or {})
    unknown = sorted(set(plan.values()) - _STYLES.keys() - {_REPLICATED})
    if not plan or unknown:
        what = f"a plan with {', '.join(unknown)}" if unknown else "no plan"
        raise UsageError(
            f"{type(model).__name__} has {what} for tensor parallelism",
            where=f"tp, {role}",
            fix="train without tensor parallelism, or choose another architecture, such as Llama, Qwen or Gemma",
        )
    return plan


def _check_division(model: PreTrainedModel, plan: Mapping[str, str], size: int, role: str) -> None:
    """Check that heads and inner widths divide; the vocabulary need not.

    Raises:
        UsageError: the first thing that does not divide by `size`.
    """
    config = model.config.get_text_config()
    counts = {"attention heads": config.num_attention_heads}
    counts["key-value heads"] = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for name, module in model.base_model.named_modules():
        style = next((plan[key] for key in plan if fnmatchcase(name, key)), "")
        if isinstance(module, nn.Linear) and style.startswith("colwise"):
            counts[f"outputs of {name}"] = module.out_features
        elif isinstance(module, nn.Linear) and style.startswith("rowwise"):
            counts[f"inputs of {name}"] = module.in_features
    for what, count in counts.items():
        if count % size:
            raise UsageError(
                f"the {role} has {count} {what}, which {size} processes cannot share evenly",
                where=f"tp, {role}",
                fix="choose a number of processes that divides them, or train without tensor parallelism",
            )


def _sum_partial_gradients(body: nn.Module, names: list[str], tp: DeviceMesh) -> None:
    """Sum the gradients of whole weights that each process applies to its own heads only (norms of query and key)."""

    def summed(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=tp.get_group("tp"))
        return gradient

    for name, module in body.named_modules():
        if any(fnmatchcase(name, pattern) for pattern in names):
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(summed)


def _cut_head(model: PreTrainedModel, tp: DeviceMesh) -> None:
    """Cut the head by vocabulary, and with it the embeddings that are tied to it."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[no-untyped-call]
    tied = head.weight is embeddings.weight
    parallelize_module(head, tp, ColwiseParallel(), src_data_rank=None)
    if tied:
        style = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
        parallelize_module(embeddings, tp, style, src_data_rank=None)
        head.weight = embeddings.weight
