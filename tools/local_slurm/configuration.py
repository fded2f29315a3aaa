"""The configuration files of a Slurm whose nodes all live on this machine, and why each unusual line stands there.

Facts are from Slurm 22.05: a build with MULTIPLE_SLURMD starts any number of slurmd by name (`slurmd -N`).
"""

import contextlib
import getpass
import os
import re
import socket
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tools.local_slurm.processes import SlurmLocalError, program

Tracking = Literal["linuxproc", "cgroup", "pgid"]
FREEZER = Path("/sys/fs/cgroup/freezer")
NULL_DEVICE = os.makedev(1, 3)
FIRST_PORTS = range(17000, 20000, 64)


@dataclass(frozen=True)
class Options:
    """What `up` was asked for. cpus, memory_mb and gpus are what each node claims, whatever the machine has.

    tracking: cgroup (v1, root) signals only a step's direct tasks, as production clusters do.
    requeue_delay: seconds a requeued job waits (least 5; Slurm's default is 120).
    node_timeout: silence after which a node is down. kill_wait: from SIGTERM to SIGKILL.
    """

    nodes: int = 4
    cpus: int = 8
    memory_mb: int = 16000
    gpus: int = 8
    tracking: Tracking = "linuxproc"
    requeue_delay: int = 8
    node_timeout: int = 60
    kill_wait: int = 5

    def check(self) -> None:
        """Raise SlurmLocalError for what Slurm would not start with."""
        positive = self.cpus > 0 and self.memory_mb > 0 and self.gpus >= 0 and self.node_timeout > 0 and self.kill_wait > 0
        if not (1 <= self.nodes <= 60 and positive and self.requeue_delay >= 5):
            raise SlurmLocalError("use --nodes 1 to 60, --requeue-delay 5 or more, and positive numbers elsewhere (--gpus may be 0)", 2)
        if self.tracking == "cgroup" and not (os.geteuid() == 0 and os.access(FREEZER, os.W_OK)):
            raise SlurmLocalError(f"--tracking cgroup needs root and a cgroup v1 freezer at {FREEZER}", 2)

    @property
    def node_names(self) -> list[str]:
        return [f"n{number}" for number in range(1, self.nodes + 1)]


@dataclass(frozen=True)
class Network:
    """Where the daemons listen. is_private: each has a host name and /etc/hosts of its own (a UTS and a mount namespace).

    binds_one_address: daemons keep to the address their host name resolves to. NodeAddr does not decide that, and peers call back
    the address a connection came from: on loopback always 127.0.0.1, or srun hangs without a word.
    """

    controller: str
    address: str
    binds_one_address: bool
    is_private: bool


def choose_network(*, is_private: bool) -> Network:
    """Loopback where names can be made to resolve to it, else what this machine's name resolves to."""
    if is_private:
        return Network("ctl", "127.0.0.1", binds_one_address=True, is_private=True)
    host = socket.gethostname().split(".")[0]
    own = ""
    with contextlib.suppress(OSError):
        own = socket.gethostbyname(host)
    usable = own == "127.0.0.1" or (own != "" and not own.startswith("127."))
    return Network(host, own if usable else "127.0.0.1", binds_one_address=usable, is_private=False)


def free_ports(count: int) -> int:
    """The first of `count` free ports in a row."""
    for first in FIRST_PORTS:
        try:
            for port in range(first, first + count):
                with socket.socket() as listener:
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    listener.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise SlurmLocalError("no free ports on 127.0.0.1 between 17000 and 20000")


def slurm_version() -> tuple[int, int]:
    text = subprocess.run([program("slurmctld"), "-V"], capture_output=True, text=True, timeout=30, check=False).stdout
    found = re.search(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def slurm_conf(options: Options, network: Network, root: Path, *, port: int) -> str:
    """The text of slurm.conf."""
    user = getpass.getuser()
    return "\n".join(
        (
            "ClusterName=local",
            f"SlurmctldHost={network.controller}({network.address})",
            f"SlurmctldPort={port}",
            f"SlurmUser={user}",
            f"SlurmdUser={user}",
            "AuthType=auth/munge",
            # cred_expire is also how long a requeued job waits before it may start again.
            f"AuthInfo=socket={root}/run/munge.sock,cred_expire={options.requeue_delay}",
            "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny" if network.binds_one_address else "",
            "MpiDefault=none",
            "MailProg=/bin/true",
            f"ProctrackType=proctrack/{options.tracking}",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU_Memory",
            # Without a default a job takes all the memory of its nodes, and so a whole node.
            f"DefMemPerCPU={max(1, options.memory_mb // options.cpus)}",
            "SlurmdParameters=config_overrides",
            "SchedulerType=sched/backfill",
            "SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=10000,bf_interval=1",
            # Without an epilog, which clusters have, a job that waited for another starts at the scheduler's next round, not at once.
            f"Epilog={program('true')}",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            "JobRequeue=1",
            # Finished jobs stay visible to scontrol and `squeue -t all` for a day.
            "MinJobAge=86400",
            "JobCompType=jobcomp/filetxt",
            f"JobCompLoc={root}/log/jobcomp.log",
            "ReturnToService=2",
            f"SlurmdTimeout={options.node_timeout}",
            f"KillWait={options.kill_wait}",
            "MessageTimeout=30",
            "BatchStartTimeout=30",
            f"StateSaveLocation={root}/state",
            f"SlurmdSpoolDir={root}/spool/%n",
            f"SlurmctldPidFile={root}/run/slurmctld.pid",
            f"SlurmdPidFile={root}/run/slurmd-%n.pid",
            f"SlurmctldLogFile={root}/log/slurmctld.log",
            f"SlurmdLogFile={root}/log/slurmd-%n.log",
            "SlurmctldDebug=verbose",
            "SlurmdDebug=verbose",
            "GresTypes=gpu" if options.gpus else "",
            *_nodes(options, network, port),
            "PartitionName=main Nodes=ALL Default=YES PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP",
            f"PartitionName=preempt Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime={options.kill_wait} MaxTime=INFINITE State=UP",
            "",
        )
    )


def _nodes(options: Options, network: Network, port: int) -> list[str]:
    gres = f" Gres=gpu:{options.gpus}" if options.gpus else ""
    claims = f"NodeAddr={network.address} CPUs={options.cpus} RealMemory={options.memory_mb}{gres} State=UNKNOWN"
    return [
        f"NodeName={name} NodeHostname={name if network.is_private else network.controller} Port={port + number} {claims}"
        for number, name in enumerate(options.node_names, start=1)
    ]


def cgroup_conf(options: Options, root: Path) -> str:
    """The text of cgroup.conf: the plugin is kept from touching anything it is not asked for."""
    if options.tracking == "cgroup":
        return f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={FREEZER.parent}\nCgroupAutomount=no\n"
    if slurm_version() >= (24, 5):
        return "CgroupPlugin=disabled\n"
    # Earlier versions do not know "disabled"; their v1 plugin needs no more than a mount point it never uses.
    return f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={root}/run/no-cgroup\n"


def gres_conf(options: Options, root: Path) -> str:
    """The text of gres.conf. Slurm wants character devices, which need not be GPUs.

    Raises:
        SlurmLocalError: there are no such devices and none can be made.
    """
    if not options.gpus:
        return ""
    numbers = range(options.gpus)
    base = Path("/dev/nvidia")
    if not all(Path(f"{base}{number}").exists() for number in numbers):
        base = root / "dev" / "gpu"
        for number in numbers:
            device = Path(f"{base}{number}")
            if device.exists():
                continue
            try:
                os.mknod(device, 0o666 | stat.S_IFCHR, NULL_DEVICE)
            except OSError as error:
                raise SlurmLocalError(f"{device} cannot be made ({error.strerror}), so no GPUs can be claimed; use --gpus 0", 2) from error
    return f"Name=gpu File={base}" + (f"[0-{options.gpus - 1}]\n" if options.gpus > 1 else "0\n")
