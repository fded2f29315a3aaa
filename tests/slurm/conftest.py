"""A real Slurm of four virtual nodes for the tests of this folder, and a run on it that nothing disturbs."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from spin_megatron.run.layout import RunLayout
from tests.slurm.cluster_run import REPOSITORY, SETTINGS, ClusterRun
from tests.tiny_run import make_tiny_run
from tools.local_slurm.cluster import Cluster
from tools.local_slurm.configuration import FREEZER, Options, Tracking
from tools.local_slurm.processes import SlurmLocalError

# nodes: a training job takes two, so that it can move when one is down; GPUs are asked for and stood in for by devices.
NUM_NODES = 4
SMALL_DISK_BYTES = 48 * 2**20


def _reason_to_skip() -> str | None:
    if os.geteuid() != 0:
        return "the virtual nodes need root, for host names of their own"
    missing = [name for name in ("slurmctld", "slurmd", "munged", "unshare") if shutil.which(name) is None]
    return f"{', '.join(missing)} not installed: apt-get install --no-install-recommends slurm-wlm munge" if missing else None


@pytest.fixture(scope="session")
def private_folder() -> Iterator[Path]:
    """A folder whose path is short enough for Unix sockets; skips, or in CI fails, where the cluster cannot run."""
    reason = _reason_to_skip()
    if reason is not None and os.environ.get("SPIN_SLURM_REQUIRED"):
        pytest.fail(f"SPIN_SLURM_REQUIRED is set, and the tests of the real Slurm cannot run: {reason}")
    if reason is not None:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="spin-"))
    folder.chmod(0o755)  # the key service wants a way in for everyone
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class SmallDisk:
    """A run directory on a file system of a few MB, its log folder on one of its own: to be filled, or made read-only."""

    root: Path
    logs: Path


@pytest.fixture(scope="session")
def small_disk(private_folder: Path) -> Iterator[SmallDisk]:
    """Mounted before the nodes copy the mount table."""
    disk = SmallDisk(private_folder / "disk" / "run", private_folder / "disk" / "run" / "iter_0" / "logs")
    mounts = []
    try:
        for folder in (disk.root.parent, disk.logs):
            folder.mkdir(parents=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_BYTES}", "tmpfs", folder], check=True, timeout=30)
            mounts.append(folder)
        yield disk
    finally:
        for folder in reversed(mounts):
            subprocess.run(["umount", "--lazy", folder], check=True, timeout=30)


@pytest.fixture(scope="session")
def cluster(private_folder: Path, small_disk: SmallDisk) -> Iterator[Cluster]:
    """Four idle nodes; SLURM_CONF and the jobs' environment are set for the rest of the session."""
    cluster = Cluster(private_folder / "slurm")
    options = Options(nodes=NUM_NODES, cpus=8, gpus=0, tracking=_tracking(), requeue_delay=5, node_timeout=60, kill_wait=1)
    environment = pytest.MonkeyPatch()
    environment.setenv("SLURM_CONF", str(cluster.conf))
    environment.setenv("PYTHONPATH", str(REPOSITORY))
    environment.setenv("SPIN_PYTHON", sys.executable)
    environment.setenv("OMP_NUM_THREADS", "1")
    try:
        cluster.up(options, fresh=True, wait_seconds=180)
        yield cluster
    finally:
        try:
            cluster.down()
        except SlurmLocalError as error:
            print(f"the cluster was not ended in order: {error}")
        environment.undo()


def _tracking() -> Tracking:
    """Control groups, as clusters have them, where this machine offers them and no other cluster's nodes use ours' names."""
    used = [file for file in FREEZER.glob("slurm_n*/**/cgroup.procs") if file.read_text(encoding="utf-8").strip()]
    return "cgroup" if os.access(FREEZER, os.W_OK) and not used else "linuxproc"


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, private_folder: Path) -> RunLayout:
    """Two iterations through `sbatch slurm/spin_iter.sh CONFIG`, on two nodes of two ranks: what every disturbed run must end with."""
    folder = private_folder / "it's a \"50%\" run"
    config = make_tiny_run(folder)
    run = ClusterRun(cluster, RunLayout(folder / "undisturbed run"))
    run.layout.root.mkdir()
    settings = [option for setting in SETTINGS for option in ("--set", setting)]
    began = time.monotonic()
    run.submit("--run-dir", str(run.layout.root), *settings, target=config)
    run.finish()
    print(f"two iterations on two nodes: {time.monotonic() - began:.0f} s")
    return run.layout
