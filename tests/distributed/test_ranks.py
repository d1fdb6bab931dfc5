"""Launch checks, and collectives on one and two processes."""

import pytest
import torch

from diffusion_nft.distributed.ranks import Distributed, LaunchError, check_launch, distributed
from tests.launch import on_ranks


def test_a_plain_process_needs_no_process_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with distributed(timeout_minutes=1) as dist:
        assert (dist.rank, dist.world_size, dist.is_main) == (0, 1, True)
        values = [torch.ones(3), torch.zeros(2, 2)]
        dist.all_reduce_sum(values)
        assert values[0].tolist() == [1, 1, 1]
        assert dist.gather_objects("x") == ["x"]
        with dist.main_first():
            dist.barrier()
    assert not torch.distributed.is_initialized()


TASKS = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("environment", "started"),
    [
        (TASKS | {"SLURM_STEP_NUM_TASKS": "8"}, "srun started 8"),
        # One process in the script of an allocation for 8 tasks, before any srun.
        (TASKS, ""),
        (TASKS | {"SLURM_PROCID": "1"}, "srun started 8"),
        (TASKS | {"SLURM_STEP_NUM_TASKS": "1"}, ""),
        # From torchrun, one per node, or a script that sets the ranks itself.
        (TASKS | {"SLURM_STEP_NUM_TASKS": "8", "RANK": "3"}, ""),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4"),
        ({"PMI_SIZE": "2"}, "mpiexec started 2"),
        ({}, ""),
    ],
)
def test_processes_that_a_launcher_left_without_ranks_are_refused(
    environment, started, monkeypatch
):
    for name in (*TASKS, "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if not started:
        check_launch()
    else:
        with pytest.raises(LaunchError, match=f"{started} processes without ranks"):
            check_launch()


def test_only_the_main_rank_prints(capsys):
    for rank in (0, 1):
        ranks = Distributed(rank, 2, rank, torch.device("cpu"))
        ranks.print_once(f"result of {rank}")
        ranks.log(f"message of {rank}")
    captured = capsys.readouterr()
    assert captured.out == "result of 0\n"
    assert captured.err.endswith(" INFO message of 0\n") and captured.err.count("\n") == 1


def collectives() -> None:
    calls = []
    real = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda *a, **k: calls.append(1) or real(*a, **k)
    with distributed(timeout_minutes=1) as dist:
        tensors = [
            torch.full((2, 3), float(dist.rank + 1)),
            torch.full((5,), 10.0 * (dist.rank + 1)),
        ]
        before = [t.data_ptr() for t in tensors]
        dist.all_reduce_sum(tensors)
        assert calls == [1], "one collective for all tensors"
        assert tensors[0].tolist() == [[3.0] * 3] * 2 and tensors[1].tolist() == [30.0] * 5
        assert [t.data_ptr() for t in tensors] == before
        gathered = dist.gather_objects({"rank": dist.rank, "x": torch.tensor([dist.rank])})
        assert [g["rank"] for g in gathered] == [0, 1]
        with dist.main_first():
            dist.log("first")
        dist.barrier()


@pytest.mark.multiproc
def test_collectives_on_two_processes():
    on_ranks(2, collectives)
