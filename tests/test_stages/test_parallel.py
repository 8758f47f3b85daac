"""stages.parallel in a group of one process: what is refused, what comes back whole, and whose errors are told.

Two processes are in tests/test_pipeline/test_train_parallel.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from stages.models.packed import use_packed_attention
from stages.parallel.processes import ALONE, Processes, is_peer_lost
from stages.parallel.tensor_parallel import cut_model, cut_rows
from stages.parallel.tensors import clip_gradients, is_finite, like, whole
from storage.errors import CorruptionError, DistillError, UsageError

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    place = tmp_path_factory.mktemp("group") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    dist.destroy_process_group()


def test_architectures_without_a_plan_or_with_experts_are_refused(mesh: DeviceMesh) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40))
    with pytest.raises(UsageError, match="GPT2LMHeadModel has no plan for tensor parallelism"):
        cut_model(gpt2, mesh)
    mixtral = MixtralForCausalLM(MixtralConfig(**SHAPE, num_key_value_heads=1, vocab_size=40, num_local_experts=2))
    with pytest.raises(UsageError, match=r"MixtralForCausalLM has a plan with .*expert") as caught:
        cut_model(mixtral, mesh, role="teacher")
    assert caught.value.where == "tp, teacher"


def test_dropout_is_refused_in_a_student_only(mesh: DeviceMesh) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=1, vocab_size=41, attention_dropout=0.1))
    use_packed_attention(model, "sdpa")
    with pytest.raises(UsageError, match=r"the student has dropout \(layers.0.self_attn.attention_dropout = 0.1\)"):
        cut_model(model, mesh)
    cut_model(model.requires_grad_(False), mesh, role="teacher")


def test_a_cut_model_has_whole_tensors_under_the_same_names(mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=1, vocab_size=41, tie_word_embeddings=True))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    use_packed_attention(model, "sdpa")
    cut_model(model, mesh)
    assert isinstance(model.lm_head.weight, DTensor)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    after = whole(model.state_dict())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert after["lm_head.weight"].data_ptr() == after["model.embed_tokens.weight"].data_ptr()
    assert whole(model.state_dict(), keep=False) == {}
    again = like(before["lm_head.weight"], model.lm_head.weight)
    assert isinstance(again, DTensor)
    assert again.placements == model.lm_head.weight.placements
    assert not isinstance(like(torch.ones(()), model.lm_head.weight), DTensor)  # a step counter


def test_a_head_is_cut_where_another_is(mesh: DeviceMesh) -> None:
    head = torch.arange(6.0).reshape(3, 2)
    assert cut_rows(head, 5, mesh).full_tensor().tolist() == [[0, 1], [2, 3], [4, 5], [0, 0], [0, 0]]
    assert cut_rows(head[:, 0], 2, mesh).full_tensor().tolist() == [0, 2]


@pytest.mark.parametrize("limit", [0.5, 100.0, float("inf")])
def test_gradients_are_clipped_as_torch_clips_them(limit: float, mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(4, 3), torch.randn(5)]
    plain = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    mixed = [nn.Parameter(distribute_tensor(plain[0].detach(), mesh, [Shard(0)])), nn.Parameter(plain[1].detach())]
    for ours, theirs, gradient in zip(mixed, plain, gradients, strict=True):
        theirs.grad = gradient.clone()
        ours.grad = distribute_tensor(gradient, mesh, [Shard(0)]) if isinstance(ours, DTensor) else gradient.clone()
    assert clip_gradients(mixed, limit) == pytest.approx(clip_gradients(plain, limit), rel=1e-6)
    for ours, theirs in zip(mixed, plain, strict=True):
        assert ours.grad is not None
        found = ours.grad.full_tensor() if isinstance(ours.grad, DTensor) else ours.grad
        torch.testing.assert_close(found, theirs.grad)


def test_what_is_not_finite_is_seen_in_every_part(mesh: DeviceMesh) -> None:
    bad = torch.tensor([[1.0, 2.0], [3.0, float("nan")]])
    assert not is_finite(bad)
    assert not is_finite(distribute_tensor(bad, mesh, [Shard(0)]))
    assert is_finite(distribute_tensor(bad[:1], mesh, [Shard(0)]))


@pytest.mark.parametrize("several", [True, False])
def test_the_main_process_gives_its_result_or_its_error(several: bool, mesh: DeviceMesh, tmp_path: Path) -> None:
    processes = Processes(mesh=mesh) if several else ALONE
    assert processes.main
    assert processes.on_main(lambda: tmp_path) == tmp_path
    with pytest.raises(CorruptionError, match="a shard is damaged"):
        processes.on_main(lambda: fail(CorruptionError("a shard is damaged", where="here")))
    with pytest.raises(ZeroDivisionError, match="one over nothing"):
        processes.on_main(lambda: fail(ZeroDivisionError("one over nothing")))
    processes.require_same("a", "something")


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."), True),
        (dist.DistStoreError("Timed out after 31 seconds waiting for clients. 1/2 clients joined."), True),
        (dist.DistStoreError("wait timeout after 4000ms, keys: /default_pg/0//cpu//0/1"), True),
        (dist.DistNetworkError("The server socket has failed to listen, name: EADDRINUSE"), False),
        (dist.DistBackendError("ncclRemoteError: a network error or a remote process exiting prematurely."), True),
        (dist.DistBackendError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1)"), True),
        (dist.DistBackendError("ncclSystemError. Last error: Connection closed by remote peer"), True),
        (dist.DistBackendError("ncclInvalidUsage. Last error: Duplicate GPU detected"), False),
        (RuntimeError("[/x/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:61628."), True),
        (RuntimeError("[/x/gloo/transport/tcp/pair.cc:537] Read error [::1]:4: Connection reset by peer."), True),
        (RuntimeError("[enforce fail at /x/gloo/transport/tcp/pair.cc:446] length <= op.nbytes. 20 vs 8"), False),
        (RuntimeError("the connection between two layers is broken"), False),
    ],
)
def test_a_lost_process_is_told_from_other_errors(error: RuntimeError, lost: bool) -> None:
    assert is_peer_lost(error) == lost


def fail(error: Exception) -> DistillError:
    raise error
