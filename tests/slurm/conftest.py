"""A SLURM cluster of virtual nodes on this machine.

Every node is a set of namespaces with its own address, host name, `/etc/hosts`, `/dev/shm` and process table. The file
system is shared, as on a cluster. This machine is login node and controller. Nothing under /etc changes, and all
processes and the bridge end with the fixture. Bridge, addresses and ports belong to the machine, so only one cluster
runs at a time; other test processes wait for it.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.slurm.stand_ins import Stage, make_stage

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter", "setpriv")
NODES = 2
CPUS = 4
SUBNET = "10.213.57"
BRIDGE = "megavl0"
PORT = 17817
SYSTEM_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"


@dataclass
class Cluster:
    """A running cluster."""

    state: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a user on the login node."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        return {**inherited, "SLURM_CONF": str(self.state / "slurm.conf")}

    def run(self, *command: str, **settings: str) -> str:
        """Output of a command on the login node."""
        done = subprocess.run(
            command, env={**self.environment, **settings}, capture_output=True, text=True, timeout=1800, check=False
        )
        assert done.returncode == 0, f"{command} gave {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        words = self.run("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job_id: str, *states: str, seconds: float = 1800) -> dict[str, str]:
        """The job's fields once its state is one of `states`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            fields = self.job(job_id)
            if fields["JobState"] in states:
                return fields
            time.sleep(0.3)
        raise AssertionError(f"job {job_id} is {fields['JobState']} after {seconds} s: {fields}\n{self.logs()}")

    def logs(self) -> str:
        """Last lines of every daemon's log."""
        tails = (f"--- {log.name}\n" + "\n".join(log.read_text().splitlines()[-8:]) for log in self.state.glob("*.log"))
        return "\n".join(tails)

    def spawn(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start a daemon that dies with this process."""
        with (self.state / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**self.environment, "PATH": SYSTEM_PATH},
            )
        self.processes.append(process)
        return process

    def stop(self) -> None:
        """End every process and remove the bridge."""
        for process in reversed(self.processes):
            process.kill()
            process.wait()
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)


def _missing() -> str | None:
    """Why this machine cannot run a cluster, or None."""
    if os.geteuid() != 0:
        return "needs root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: slurm-wlm munge iproute2)"
    probe = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc", "true"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        return "namespaces are not permitted here"
    probe = ["ip", "link", "add", BRIDGE, "type", "bridge"]
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)  # left by a killed run
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        return "a network bridge cannot be made here"
    return None


def _write_configuration(state: Path) -> None:
    controller = os.uname().nodename.split(".")[0]
    nodes = [f"vnode{i}" for i in range(1, NODES + 1)]
    hosts = ["127.0.0.1 localhost", f"{SUBNET}.254 {controller}"]
    hosts += [f"{SUBNET}.{i} {name}" for i, name in enumerate(nodes, start=1)]
    (state / "hosts").write_text("\n".join(hosts) + "\n")
    (state / "munge.key").write_bytes(secrets.token_bytes(128))
    (state / "munge.key").chmod(0o600)
    for folder in ("munge", "controller", "spool"):
        (state / folder).mkdir()
    # Without this file slurmd looks for a cgroup file system, which a container lacks, and does not start.
    (state / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (state / "slurm.conf").write_text(f"""
ClusterName=megavl
SlurmctldHost={controller}({SUBNET}.254)
SlurmctldPort={PORT}
SlurmdPort={PORT + 1}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also the wait of a requeued job before it may start again
AuthInfo=socket={state}/munge/socket,cred_expire=6
StateSaveLocation={state}/controller
SlurmdSpoolDir={state}/spool/%n
SlurmctldPidFile={state}/controller/pid
SlurmdPidFile={state}/spool/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
JobRequeue=1
SchedulerParameters=bf_interval=2,sched_interval=2
NodeName=vnode[1-{NODES}] NodeAddr={SUBNET}.[1-{NODES}] CPUs={CPUS} RealMemory=16000 State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
""")
    # Runs as pid 1 of a node. One munged per node: a shared one would take a repeated credential for a replay.
    (state / "node.sh").write_text(f"""
set -eu
hostname "$1"
mount --bind '{state}/hosts' /etc/hosts
mount -t sysfs sysfs /sys
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=0755 tmpfs '{state}/munge'
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip link set lo up
ip addr add "$2/24" dev eth0
ip link set eth0 up
{_munged(state)} &
until [ -S '{state}/munge/socket' ]; do sleep 0.05; done
slurmd -D -N "$1" &
while :; do wait || :; sleep 1; done
""")


def _munged(state: Path) -> str:
    folder = state / "munge"
    return (
        f"munged --foreground --force --key-file={state}/munge.key --socket={folder}/socket "
        f"--pid-file={folder}/pid --seed-file={folder}/seed"
    )


def _until(condition: Callable[[], bool], cluster: Cluster, what: str, *, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen in {seconds} s\n{cluster.logs()}"
        time.sleep(0.1)


def _start(cluster: Cluster) -> None:
    state = cluster.state
    _write_configuration(state)
    cluster.run("ip", "addr", "add", f"{SUBNET}.254/24", "dev", BRIDGE)
    cluster.run("ip", "link", "set", BRIDGE, "up")
    cluster.spawn("munged", *_munged(state).split())
    _until((state / "munge" / "socket").exists, cluster, "start of munged")
    cluster.spawn("slurmctld", "slurmctld", "-D")
    own = os.readlink("/proc/self/ns/net")
    spaces = ("--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")
    for i in range(1, NODES + 1):
        holder = cluster.spawn(
            f"vnode{i}", "unshare", *spaces, "bash", f"{state}/node.sh", f"vnode{i}", f"{SUBNET}.{i}"
        )
        space = Path(f"/proc/{holder.pid}/ns/net")
        _until(lambda space=space: os.readlink(space) != own, cluster, f"network of vnode{i}")  # type: ignore[misc]
        cluster.run(
            "ip", "link", "add", f"{BRIDGE}-{i}", "type", "veth", "peer", "name", "eth0", "netns", str(holder.pid)
        )
        cluster.run("ip", "link", "set", f"{BRIDGE}-{i}", "master", BRIDGE, "up")

    def ready() -> bool:
        shown = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%T"], env=cluster.environment, capture_output=True, text=True, check=False
        )
        return shown.stdout.split() == ["idle"] * NODES

    _until(ready, cluster, "start of the nodes")


@pytest.fixture
def cluster_login(tmp_path: Path) -> Stage:
    """A login node, with stand-ins for SLURM's programs."""
    return make_stage(tmp_path, slurm=True)


@pytest.fixture
def plain_machine(tmp_path: Path) -> Stage:
    """A machine without SLURM and without GPUs."""
    return make_stage(tmp_path, slurm=False)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A two-node cluster, or a skip that says why there is none."""
    # Root's file is not for others to open; they only learn here that a cluster needs root.
    with (Path(tempfile.gettempdir()) / f"megavl-slurm-{os.geteuid()}.lock").open("a") as only_one:
        fcntl.flock(only_one, fcntl.LOCK_EX)
        reason = _missing()
        if reason:
            print(f"no SLURM cluster: {reason}")
            pytest.skip(f"no SLURM cluster: {reason}")
        running = Cluster(state=tmp_path_factory.mktemp("slurm"))
        try:
            _start(running)
            yield running
        finally:
            running.stop()
