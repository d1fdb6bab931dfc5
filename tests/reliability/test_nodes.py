"""A job on two hosts: network namespaces joined by a cable, or else two torchruns on this host."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from diffusion_nft.distributed.ranks import Distributed, check_shared
from diffusion_nft.runs.checkpoint import load_checkpoint
from tests.launch import ROOT, environment, train_command, train_here
from tests.reliability.compare import differences
from tests.reliability.experiments import FP64_WITHIN, SETTINGS, kill_all

pytestmark = pytest.mark.multiproc

TIMEOUT_S = 30
TRAINING = SETTINGS | {
    "num_epochs": 8,
    "save_freq": 1,
    "mixed_precision": "fp64",
    "distributed.timeout_minutes": TIMEOUT_S / 60,
}
LINE = re.compile(
    r"rank (\d) of 2 on host (\S+) lost contact with the others after waiting (\d+) s: .+ "
    r"\(distributed\.timeout_minutes = 0\.5\); the same command continues the run in \S+"
)


@dataclass
class Host:
    """A network namespace, or this machine."""

    name: str
    namespace: str = ""
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, line: list[str], log: Path, prepare: str = "true") -> subprocess.Popen[bytes]:
        """Starts ``line`` with its output in ``log``, after ``prepare``, a shell command."""
        env = environment()
        if self.namespace:
            env |= {"GLOO_SOCKET_IFNAME": "cable"}
            names = log.with_suffix(".hosts")
            names.write_text("127.0.0.1 localhost\n10.0.0.1 host-a\n10.0.0.2 host-b\n")
            known = f"hostname {self.name} && mount --bind {names} /etc/hosts"
            inside = f'{known} && {prepare} && exec "$@"'
            enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts"]
            line = [*enter, "sh", "-c", inside, "sh", *line]
        with log.open("ab") as file:
            process = subprocess.Popen(line, cwd=ROOT, env=env, stdout=file, stderr=file)
        self.started.append(process)
        return process

    def kill(self) -> None:
        for process in self.started:
            if process.poll() is None:
                kill_all(process)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def cabled() -> Iterator[list[Host]]:
    """Two hosts that reach only each other.

    Their kernels drop a dead connection after about 50 s instead of 15 minutes, as a torchrun that
    has lost the rendezvous' host waits for it.
    """
    hosts = [Host(f"host-{x}", f"nodes-{os.getpid()}-{x}") for x in "ab"]
    one, other = (host.namespace for host in hosts)
    try:
        for host in hosts:
            ip("netns", "add", host.namespace)
        cable = ("type", "veth", "peer", "name", "cable", "netns", other)
        ip("-n", one, "link", "add", "cable", *cable)
        for number, host in enumerate(hosts, start=1):
            ip("-n", host.namespace, "address", "add", f"10.0.0.{number}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", host.namespace, "link", "set", device, "up")
            ip("netns", "exec", host.namespace, "sysctl", "-qw", "net.ipv4.tcp_retries2=7")
        yield hosts
    finally:
        for host in hosts:
            host.kill()
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True)


@contextmanager
def loopback() -> Iterator[list[Host]]:
    hosts = [Host(socket.gethostname()) for _ in range(2)]
    try:
        yield hosts
    finally:
        for host in hosts:
            host.kill()


def reason_against_namespaces() -> str:
    try:
        with cabled():
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespaces here: {error}"


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    with loopback() if reason_against_namespaces() else cabled() as pair:
        yield pair


@pytest.fixture
def cabled_hosts() -> Iterator[list[Host]]:
    if reason := reason_against_namespaces():
        pytest.skip(reason)
    with cabled() as pair:
        yield pair


def torchrun(endpoint: str, *script: str) -> list[str]:
    """One process of a job on two hosts."""
    return [
        sys.executable,
        *("-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"),
        *("--rdzv_backend=c10d", "--rdzv_id=nodes", f"--rdzv_endpoint={endpoint}"),
        "--monitor_interval=0.1",
        *script,
    ]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(
    hosts: list[Host], logs: Path, *script: str, prepare: str = "true"
) -> list[subprocess.Popen[bytes]]:
    """Starts the job; ``prepare`` runs on the second host."""
    name = hosts[0].name if hosts[0].namespace else "localhost"
    line = torchrun(f"{name}:{free_port()}", *script)
    each = zip(hosts, "ab", ("true", prepare), strict=True)
    return [host.start(line, logs / f"{x}.log", first) for host, x, first in each]


def start_training(hosts: list[Host], logs: Path, run_dir: Path, prepare: str = "true"):
    overrides = [f"{key}={value}" for key, value in TRAINING.items()]
    return start(hosts, logs, *train_command(run_dir, *overrides)[1:], prepare=prepare)


def wait(processes: list[subprocess.Popen[bytes]], seconds: float = 240) -> list[int]:
    end = time.monotonic() + seconds
    return [process.wait(max(0.1, end - time.monotonic())) for process in processes]


def wait_for(pattern: str, run_dir: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    while not list(run_dir.glob(pattern)):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)


PROBE = """
import os, signal, sys
from pathlib import Path
from diffusion_nft.distributed.ranks import LostContact, check_shared, distributed
folder = Path(sys.argv[1])
try:
    with distributed(timeout_minutes=1) as dist:
        places = dist.gather_objects((int(os.environ["GROUP_RANK"]), dist.local_rank))
        dist.print_once(f"nodes and local ranks {places}")
        with dist.main_first():
            (folder / f"first-{dist.rank}").touch()
        check_shared("save_dir", folder / "shared", dist)
        try:
            check_shared("save_dir", folder / f"disk-{dist.rank}", dist, patience_s=0.5)
        except OSError as error:
            print(error, flush=True)
        dist.barrier()
        if dist.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.gather_objects("still there?")
except LostContact as error:
    sys.exit(str(error))
"""


def test_two_nodes_on_loopback(tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    with loopback() as hosts:
        codes = wait(start(hosts, tmp_path, str(tmp_path / "probe.py"), str(tmp_path)))
    assert codes == [1, 1]
    # Either may become the first node.
    logs = sorted(
        ((tmp_path / f"{x}.log").read_text() for x in "ab"), key=lambda t: "nodes" not in t
    )
    assert "nodes and local ranks [(0, 0), (1, 0)]" in logs[0] and "nodes and" not in logs[1]
    name = socket.gethostname()
    blind = (
        f"save_dir = '{tmp_path}/disk-{{}}' is not the same folder on all nodes: what rank 0 "
        f"writes there does not appear in {tmp_path}/disk-1 on host {name} (rank 1); "
    )
    assert blind.format(0) in logs[0] and blind.format(1) in logs[1]
    assert f"rank 0 of 2 on host {name} lost contact with the others after" in logs[0]
    # Each node's first rank runs the block; check_shared leaves no files.
    assert {path.name for path in tmp_path.glob("first-*")} == {"first-0", "first-1"}
    assert not [*(tmp_path / "shared").iterdir(), *(tmp_path / "disk-0").iterdir()]
    assert not (tmp_path / "disk-1").exists()


RESTARTED = """
import os, signal, sys
from pathlib import Path
from diffusion_nft.distributed.ranks import distributed
with distributed(timeout_minutes=1) as dist:
    dist.barrier()
    if dist.rank == 1 and not Path(sys.argv[1]).exists():
        Path(sys.argv[1]).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    print("all here", dist.gather_objects(dist.rank), flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_restarted_ranks_of_two_nodes_find_one_another(monkeypatch, tmp_path):
    # See docs/operations.md; without it they connect to addresses of dead ranks.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    (tmp_path / "ranks.py").write_text(RESTARTED)
    script = ("--max-restarts=2", str(tmp_path / "ranks.py"), str(tmp_path / "struck"))
    with loopback() as hosts:
        assert wait(start(hosts, tmp_path, *script)) == [0, 0]
    assert all("all here [0, 1]" in (tmp_path / f"{x}.log").read_text() for x in "ab")


def test_a_shared_folder_that_rank_0_may_not_write(tmp_path):
    class Two(Distributed):
        def broadcast_object(self, value):
            return value

    (tmp_path / "file").touch()
    dist = Two(0, 2, 0, torch.device("cpu"))
    with pytest.raises(
        OSError, match=r"save_dir = '.*file/run' cannot be written: Not a directory"
    ):
        check_shared("save_dir", tmp_path / "file" / "run", dist)


@pytest.fixture(scope="module")
def one_host(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("one") / "run"
    train_here(run_dir, TRAINING)
    return run_dir


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_hosts_make_the_weights_of_one_and_only_the_first_writes(hosts, one_host, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    own = f"mount --bind {shared} {shared}"
    ranks = start_training(hosts, tmp_path, shared / "run", prepare=own)
    wait_for("config.json", shared / "run", ranks)
    if hosts[1].namespace:
        inside = ["nsenter", f"--target={ranks[1].pid}", "--mount"]
        read_only = ["mount", "-o", "remount,bind,ro", str(shared)]
        subprocess.run([*inside, *read_only], check=True)
        assert subprocess.run([*inside, "touch", str(shared / "x")]).returncode
    assert wait(ranks) == [0, 0], (tmp_path / "b.log").read_text()
    assert differences(shared / "run", one_host, FP64_WITHIN) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("lost", ["cable", "first host", "second host"])
def test_the_others_end_in_time_and_the_run_continues(lost, request, one_host, tmp_path):
    pair = request.getfixturevalue("cabled_hosts" if lost == "cable" else "hosts")
    run_dir, logs = tmp_path / "run", tmp_path
    processes = start_training(pair, logs, run_dir)
    # The first epoch's, of eight.
    wait_for("checkpoints/checkpoint-*", run_dir, processes)
    survivors = [0, 1]
    if lost == "cable":
        ip("-n", pair[0].namespace, "link", "set", "cable", "down")
    else:
        dead = ["first host", "second host"].index(lost)
        survivors.remove(dead)
        pair[dead].kill()
    struck = time.monotonic()
    texts = []
    for index in survivors:
        log = logs / f"{'ab'[index]}.log"
        while not (found := LINE.search(log.read_text())):
            assert time.monotonic() < struck + TIMEOUT_S + 15, log.read_text()
            time.sleep(0.1)
        texts.append(found)
    assert all(int(found[3]) <= TIMEOUT_S + 2 for found in texts)
    assert wait([processes[index] for index in survivors]) == [1] * len(survivors)
    last = max(run_dir.glob("checkpoints/checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert load_checkpoint(last).state["epoch"] < TRAINING["num_epochs"]
    if lost == "cable":
        ip("-n", pair[0].namespace, "link", "set", "cable", "up")
    (logs / "before").mkdir()
    for x in "ab":
        (logs / f"{x}.log").rename(logs / "before" / f"{x}.log")
    assert wait(start_training(pair, logs, run_dir)) == [0, 0], (logs / "a.log").read_text()
    output = (logs / "a.log").read_text() + (logs / "b.log").read_text()
    assert output.count("continuing from") == 1
    assert differences(run_dir, one_host, FP64_WITHIN) == []


# Replacements of Slurm's commands that record their arguments.
SLURM = {
    "srun": 'echo "$SRUN_CPUS_PER_TASK" "$@" >"$NOTES/srun"; echo $$ >"$NOTES/pid"; eval "$STEP"',
    "scancel": 'kill -TERM "$(cat "$NOTES/pid")"',
    "scontrol": 'case $1 in show) printf "n1\\nn2\\n";; *) echo "$@" >"$NOTES/requeue";; esac',
}


@pytest.mark.parametrize(
    ("step", "stop", "code", "requeued"),
    [("exit 0", False, 0, False), ("exit 3", False, 3, False), ("exec sleep 60", True, 0, True)],
)
def test_the_slurm_script(step, stop, code, requeued, tmp_path):
    for name, body in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "NOTES": str(tmp_path),
        "STEP": step,
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_CPUS_PER_TASK": "64",
    }
    line = ["bash", str(ROOT / "examples/slurm/train.sbatch"), "sd3_geneval", "--config.seed=1"]
    job = subprocess.Popen(line, env=env)
    if stop:
        wait_for("pid", tmp_path, [job])
        job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == code
    assert (tmp_path / "requeue").exists() == requeued
    assert (tmp_path / "srun").read_text().split() == [
        *("64", "--kill-on-bad-exit=1", "torchrun", "--nnodes=2", "--nproc_per_node=4"),
        *("--rdzv_backend=c10d", "--rdzv_endpoint=n1:23456", "--rdzv_id=123456-0"),
        *("--shutdown-timeout=120", "scripts/train_nft_sd3.py"),
        *("--config=config/nft.py:sd3_geneval", "--config.seed=1"),
    ]
