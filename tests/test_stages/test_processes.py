"""Who a process is in a mesh of 2 x 2 x 2: torch's fake group gives one process a rank, and communicates nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from stages.parallel.processes import ALONE, DIMENSIONS, Processes


@pytest.fixture
def processes(request: pytest.FixtureRequest) -> Iterator[Processes]:
    rank, sizes = request.param
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)
    yield Processes(mesh=init_device_mesh("cpu", sizes, mesh_dim_names=DIMENSIONS))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("processes", "dp_rank"),
    [((rank, (2, 2, 2)), rank // 2) for rank in range(8)],
    indirect=["processes"],
)
def test_only_global_rank_0_is_main_and_neighbours_share_a_model(processes: Processes, dp_rank: int) -> None:
    assert processes.main == (dist.get_rank() == 0)
    assert (processes.dp_rank, processes.dp_size) == (dp_rank, 4)
    assert processes.tp is not None
    assert processes.tp.mesh_dim_names == ("tp",)
    assert processes.tp.mesh.tolist() == [2 * dp_rank, 2 * dp_rank + 1]


@pytest.mark.parametrize("processes", [(5, (2, 4, 1))], indirect=True)
def test_without_tensor_parallelism_nothing_is_cut(processes: Processes) -> None:
    assert (processes.main, processes.dp_rank, processes.dp_size, processes.tp) == (False, 5, 8, None)
    assert (ALONE.main, ALONE.dp_rank, ALONE.dp_size, ALONE.tp) == (True, 0, 1, None)
