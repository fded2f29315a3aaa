"""A real Slurm (munged, slurmctld and one slurmd a node) below one private folder, on loopback, with no systemd and no database.

It ends only what it started: pid files are believed only if the process's command line names this folder, and step daemons are
found by the node log they hold open.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.local_slurm.configuration import (
    FREEZER,
    Network,
    Options,
    cgroup_conf,
    choose_network,
    free_ports,
    gres_conf,
    slurm_conf,
)
from tools.local_slurm.processes import SEARCH_PATH, SlurmLocalError, all_pids, descendants, is_alive, program, read_proc, send, stop

# Unix sockets stand below the folder, and their paths may have 107 characters.
MAX_ROOT_LENGTH = 60
USABLE = {"idle", "mix", "mixed", "alloc", "allocated", "comp", "plnd"}
FOLDERS = ("etc", "run", "log", "state", "dev", "spool")
_START_SECONDS = 10.0
_ENTER_NAMESPACE = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


@dataclass(frozen=True)
class Daemon:
    """word: what must stand among the arguments of its process."""

    name: str
    program: str
    pid_file: Path
    word: str
    node: str | None = None


class Cluster:
    """One Slurm below `root`; what it was started with is kept in state.json there."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        if len(str(self.root)) > MAX_ROOT_LENGTH:
            raise SlurmLocalError(f"--dir is too long for Unix sockets below it ({MAX_ROOT_LENGTH} characters at most): {self.root}", 2)
        self.conf = self.root / "etc" / "slurm.conf"
        self._hosts = self.root / "etc" / "hosts"
        self._state = self.root / "state.json"
        self.options: Options | None = None
        self._is_private = False
        with contextlib.suppress(FileNotFoundError):
            values = json.loads(self._state.read_text(encoding="utf-8"))
            self.options, self._is_private = Options(**values["options"]), values["is_private"]

    def up(self, options: Options, *, fresh: bool = False, use_namespaces: bool = True, wait_seconds: float = 60) -> list[str]:
        """Start what does not run, and wait until every node is usable; returns the names of the daemons started.

        Args:
            fresh: forget the jobs, job numbers and logs of an earlier life.

        Raises:
            SlurmLocalError: something is missing or did not start, or the cluster is up with other options.
        """
        for name in ("munged", "slurmctld", "slurmd", "sinfo", "scontrol"):
            program(name)
        running = [daemon.name for daemon in self.daemons() if self.pid(daemon)]
        if running and (fresh or options != self.options):
            raise SlurmLocalError("already up" + (" with other options" if not fresh else "") + ": run `down` first", 2)
        if not running:
            if fresh:
                for folder in ("state", "spool", "log", "run"):
                    shutil.rmtree(self.root / folder, ignore_errors=True)
            self._configure(options, use_namespaces=use_namespaces)
        started = [daemon.name for daemon in self.daemons() if self._boot(daemon)]
        self._wait_until_usable(wait_seconds)
        return started

    def down(self, *, wipe: bool = False) -> int:
        """Cancel all jobs and end every process of this cluster; returns how many there were. wipe: remove the folder too."""
        if self.options is None:
            return 0
        with contextlib.suppress(SlurmLocalError):  # a dead controller cancels nothing; its processes are ended below
            self._cancel_jobs()
        ended = 0
        daemons = list(self.daemons())
        for group in ([d for d in daemons if d.node], [d for d in daemons if d.name == "slurmctld"], daemons):
            # What outlived its job goes first: a slurmd waits for its step daemons.
            ended += stop(self.step_pids() + self._stray_pids(), wait_seconds=1)
            ended += stop([pid for daemon in group if (pid := self.pid(daemon))], wait_seconds=10)
        for name in self.options.node_names:
            for folder, _, _ in os.walk(FREEZER / f"slurm_{name}", topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)
        if wipe:
            shutil.rmtree(self.root, ignore_errors=True)
        return ended

    def daemons(self) -> Iterator[Daemon]:
        """In the order in which they start."""
        run, conf = self.root / "run", str(self.conf)
        yield Daemon("munged", "munged", run / "munged.pid", f"--socket={run / 'munge.sock'}")
        yield Daemon("slurmctld", "slurmctld", run / "slurmctld.pid", conf)
        for node in self.options.node_names if self.options else []:
            yield Daemon(f"slurmd-{node}", "slurmd", run / f"slurmd-{node}.pid", conf, node)

    def pid(self, daemon: Daemon) -> int | None:
        """The daemon's process, if the one its pid file names lives and is that daemon."""
        try:
            pid = int(daemon.pid_file.read_text(encoding="utf-8").split()[0])
        except (OSError, ValueError, IndexError):
            return None
        words = read_proc(pid, "cmdline").decode(errors="replace").split("\0")
        is_ours = daemon.word in words and Path(words[0]).name == daemon.program and (daemon.node is None or daemon.node in words)
        return pid if is_ours and is_alive(pid) else None

    def node_states(self) -> dict[str, str]:
        """Node -> state as sinfo prints it (idle, mix, alloc, down*, ...)."""
        rows = (line.split() for line in self.client("sinfo", "-h", "-N", "-p", "main", "-o", "%N %t").splitlines())
        return {row[0]: row[1] for row in rows if len(row) > 1}

    def is_usable(self) -> bool:
        states = self.node_states()
        return self.options is not None and set(states) >= set(self.options.node_names) and set(states.values()) <= USABLE

    def client(self, *words: str, timeout: float = 30) -> str:
        """Standard output of one of Slurm's programs; empty where it failed."""
        command = [program(words[0]), *words[1:]]
        try:
            result = subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            raise SlurmLocalError(f"{shlex.join(words)}: no answer in {timeout} seconds") from None
        return result.stdout if result.returncode == 0 else ""

    def environment(self) -> dict[str, str]:
        """What the daemons and clients need of the environment; jobs get their submitter's."""
        kept = {name: os.environ[name] for name in ("HOME", "USER", "LOGNAME", "TZ", "LANG") if name in os.environ}
        return {**kept, "PATH": os.environ.get("PATH", "") + ":" + SEARCH_PATH, "SLURM_CONF": str(self.conf)}

    def kill_node(self, node: str) -> int:
        """Kill a node's slurmd, step daemons and tasks with SIGKILL, as a crash would; returns how many processes."""
        daemon = self._daemon_of(node)
        pids = [pid for pid in (self.pid(daemon), *self.step_pids(node)) if pid]
        send(pids, signal.SIGKILL, wait_seconds=5)
        return len(pids)

    def start_node(self, node: str, *, forget_jobs: bool = True, wait_seconds: float = 60) -> None:
        """Start a node's slurmd again and wait until it is usable.

        Args:
            forget_jobs: say that the node was rebooted, so that Slurm gives its jobs up. Slurm knows a reboot by the boot time,
                which all nodes here share; without a word it goes on waiting for the tasks of a node that came back quickly.
        """
        daemon = self._daemon_of(node)
        if forget_jobs:
            self._boot(daemon)
        else:
            self._start(daemon)
        deadline = time.monotonic() + wait_seconds
        while self.node_states().get(node) not in USABLE:
            if time.monotonic() > deadline:
                raise SlurmLocalError(f"{node} is not usable after {wait_seconds} seconds\n" + self.log_tail(daemon))
            time.sleep(0.1)

    def login_command(self, words: Sequence[str]) -> list[str]:
        """A command as on a login node: where the daemons have namespaces of their own, so has it."""
        return [*(self._namespace("login") if self._is_private else []), *words]

    def step_pids(self, node: str | None = None) -> list[int]:
        """The step daemons of one node or of all, and all processes below them."""
        names = [node] if node else self.options.node_names if self.options else []
        logs = {str(self.root / "log" / f"slurmd-{name}.log") for name in names}
        roots = []
        for pid in all_pids():
            if read_proc(pid, "comm").strip() == b"slurmstepd" and logs & set(_open_files(pid)):
                roots.append(pid)
        return descendants(roots)

    def log_tail(self, daemon: Daemon, num_lines: int = 15) -> str:
        """The last lines a daemon wrote, without those of the absent PMIx."""
        text = ""
        for path in (self.root / "log" / f"{daemon.name}.start", self.root / "log" / f"{daemon.name}.log"):
            with contextlib.suppress(OSError):
                lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
                text += "\n".join([f"--- {path}", *[line for line in lines if "pmix" not in line and "MPI:" not in line][-num_lines:], ""])
        return text

    def _configure(self, options: Options, *, use_namespaces: bool) -> None:
        options.check()
        if self.root.exists() and self.root.stat().st_uid != os.geteuid():
            raise SlurmLocalError(f"{self.root} belongs to someone else", 2)
        for folder in (*FOLDERS, *(f"spool/{name}" for name in options.node_names)):
            (self.root / folder).mkdir(mode=0o755, parents=True, exist_ok=True)
        key = self.root / "munge" / "key"
        key.parent.mkdir(mode=0o700, exist_ok=True)
        if not key.exists():
            with open(os.open(key, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
                file.write(os.urandom(128))
        hosts = Path("/etc/hosts").read_text(encoding="utf-8") if Path("/etc/hosts").exists() else "127.0.0.1 localhost\n"
        names = ("ctl", "login", *options.node_names)
        self._hosts.write_text(hosts.rstrip("\n") + "\n" + "".join(f"127.0.0.1 {name}\n" for name in names), encoding="utf-8")
        self._is_private = use_namespaces and os.geteuid() == 0 and self._has_namespaces()
        network: Network = choose_network(is_private=self._is_private)
        self.conf.write_text(slurm_conf(options, network, self.root, port=free_ports(options.nodes + 1)), encoding="utf-8")
        (self.conf.parent / "cgroup.conf").write_text(cgroup_conf(options, self.root), encoding="utf-8")
        (self.conf.parent / "gres.conf").write_text(gres_conf(options, self.root), encoding="utf-8")
        self.options = options
        self._state.write_text(json.dumps({"options": asdict(options), "is_private": self._is_private}, indent=1), encoding="utf-8")

    def _has_namespaces(self) -> bool:
        if shutil.which("unshare") is None:
            return False
        return subprocess.run([*self._namespace("login"), "true"], capture_output=True, timeout=30, check=False).returncode == 0

    def _namespace(self, host: str) -> list[str]:
        enter = ["unshare", "--uts", "--mount", "--propagation", "private", "sh", "-c", _ENTER_NAMESPACE, "sh"]
        return [*enter, host, str(self._hosts)]

    def _boot(self, daemon: Daemon) -> bool:
        """Start a daemon unless it runs; a node that comes back has lost its jobs, as one that was rebooted."""
        if self.pid(daemon):
            return False
        if daemon.node is None:
            return self._start(daemon)
        has_lost_jobs = bool(self.client("squeue", "-h", "-t", "R,CG", "-w", daemon.node, "-o", "%A").split())
        if has_lost_jobs:
            self.client("scontrol", "update", f"nodename={daemon.node}", "state=down", "reason=restarted by slurm_local")
        self._start(daemon)
        if has_lost_jobs:
            self.client("scontrol", "update", f"nodename={daemon.node}", "state=resume")
        return True

    def _start(self, daemon: Daemon) -> bool:
        if self.pid(daemon):
            return False
        log = self.root / "log" / f"{daemon.name}.start"
        with open(log, "ab") as out:
            code = subprocess.run(
                self._daemon_command(daemon),
                env=self.environment(),
                cwd=log.parent,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                timeout=60,
                check=False,
            ).returncode
        deadline = time.monotonic() + _START_SECONDS
        while code == 0 and not self.pid(daemon):
            if time.monotonic() > deadline:
                code = -1
            time.sleep(0.02)
        if code:
            raise SlurmLocalError(f"{daemon.name} did not start (status {code})\n" + self.log_tail(daemon))
        return True

    def _daemon_command(self, daemon: Daemon) -> list[str]:
        path = program(daemon.program)
        if daemon.name == "munged":
            files = {"key-file": "munge/key", "pid-file": "run/munged.pid", "log-file": "log/munged.log", "seed-file": "munge/seed"}
            return [path, daemon.word, *(f"--{name}={self.root / file}" for name, file in files.items()), "--num-threads=4"]
        words = [path, "-f", str(self.conf), *(["-N", daemon.node] if daemon.node else ["-i"])]
        return [*self._namespace(daemon.node or "ctl"), *words] if self._is_private else words

    def _daemon_of(self, node: str) -> Daemon:
        for daemon in self.daemons():
            if daemon.node == node:
                return daemon
        raise SlurmLocalError(f"no such node: {node}; there are {', '.join(self.options.node_names) if self.options else 'none'}", 2)

    def _wait_until_usable(self, wait_seconds: float) -> None:
        began, resumed = time.monotonic(), False
        while not self.is_usable():
            gone = [daemon for daemon in self.daemons() if not self.pid(daemon)]
            if gone:
                raise SlurmLocalError(f"{gone[0].name} went away\n" + self.log_tail(gone[0]))
            waited = time.monotonic() - began
            if waited > 3 and not resumed:  # left drained or down by an earlier life
                resumed = True
                for name, state in self.node_states().items():
                    if state.rstrip("*") in ("drain", "down", "inval"):
                        self.client("scontrol", "update", f"nodename={name}", "state=resume")
            if waited > wait_seconds:
                tails = "".join(self.log_tail(daemon) for daemon in list(self.daemons())[1:3])
                raise SlurmLocalError(f"nodes are not usable after {wait_seconds} seconds: {self.node_states()}\n{tails}")
            time.sleep(0.1)

    def _cancel_jobs(self) -> None:
        listing = ("squeue", "-h", "-o", "%A")
        jobs = sorted(set(self.client(*listing, timeout=5).split()))
        if not jobs or self.options is None:
            return
        self.client("scancel", *jobs, timeout=10)
        deadline = time.monotonic() + self.options.kill_wait + 4
        while self.client(*listing, timeout=5).split() and time.monotonic() < deadline:
            time.sleep(0.2)

    def _stray_pids(self) -> list[int]:
        """Tasks whose step daemon is gone: our SLURM_CONF and a node's name stand in their environment."""
        ours = f"SLURM_CONF={self.conf}".encode()
        found = []
        for pid in all_pids():
            environment = read_proc(pid, "environ").split(b"\0")
            if pid != os.getpid() and ours in environment and any(word.startswith(b"SLURMD_NODENAME=") for word in environment):
                found.append(pid)
        return found


def _open_files(pid: int) -> Iterator[str]:
    folder = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):
                yield os.readlink(f"{folder}/{name}")
