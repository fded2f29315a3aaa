#!/usr/bin/env python3
"""A real Slurm of several virtual nodes on this machine, for tests and for trying a run out. Needs no installation of this project.

    apt-get install -y --no-install-recommends slurm-wlm munge
    python tools/slurm_local.py up            # again: starts what is missing; returns when all nodes are usable
    eval "$(python tools/slurm_local.py env)" # SLURM_CONF for sbatch, squeue, ...
    python tools/slurm_local.py status
    python tools/slurm_local.py node-kill n2  # a crash: slurmd, step daemons and tasks
    python tools/slurm_local.py node-start n2
    python tools/slurm_local.py down --wipe   # ends only what it started

Everything stands below one private folder, listens on loopback only and needs no systemd. As root each node has its own host
name. Exit codes: 0 fine, 1 failed or degraded, 2 usage or a missing program, 3 (status) down. Checked with Slurm 22.05.
"""

import argparse
import fcntl
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.local_slurm.cluster import Cluster


def main() -> int:
    """Entry point; returns the exit code."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tools.local_slurm.processes import SlurmLocalError

    arguments = _parser().parse_args()
    try:
        return _run(arguments)
    except SlurmLocalError as error:
        print(f"slurm_local: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    default = os.environ.get("SLURM_LOCAL_DIR") or Path(tempfile.gettempdir()) / f"slurm-local-{os.geteuid()}"
    shared.add_argument("--dir", type=Path, default=Path(default), help="private folder (default %(default)s, or $SLURM_LOCAL_DIR)")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    up = verbs.add_parser("up", help="start, and wait until every node is usable", parents=[shared])
    up.add_argument("--nodes", type=int, default=4)
    up.add_argument("--cpus", type=int, default=8, help="CPUs each node claims, whatever the machine has")
    up.add_argument("--memory-mb", type=int, default=16000, help="memory each node claims")
    up.add_argument("--gpus", type=int, default=8, help="GPUs each node claims; devices stand in for them (0: none)")
    up.add_argument("--tracking", choices=("linuxproc", "cgroup", "pgid"), default="linuxproc", help="how a step's processes are found")
    up.add_argument("--requeue-delay", type=int, default=8, help="seconds a requeued job waits")
    up.add_argument("--node-timeout", type=int, default=60, help="seconds of silence until a node is down")
    up.add_argument("--kill-wait", type=int, default=5, help="seconds from SIGTERM to SIGKILL")
    up.add_argument("--fresh", action="store_true", help="forget old jobs, job numbers and logs")
    up.add_argument("--no-namespaces", action="store_true", help="nodes share this machine's host name")
    down = verbs.add_parser("down", help="cancel jobs and end what `up` started", parents=[shared])
    down.add_argument("--wipe", action="store_true", help="remove the private folder too")
    status = verbs.add_parser("status", help="exit 0 usable, 1 degraded, 3 down", parents=[shared])
    status.add_argument("--json", action="store_true")
    verbs.add_parser("env", help="print the export line", parents=[shared])
    execute = verbs.add_parser("exec", help="run a command as on a login node", parents=[shared])
    execute.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    for verb, text in (("node-kill", "kill a node's slurmd, step daemons and tasks"), ("node-start", "start a node's slurmd again")):
        verbs.add_parser(verb, help=text, parents=[shared]).add_argument("node")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from tools.local_slurm.cluster import Cluster

    cluster = Cluster(arguments.dir)
    if arguments.verb == "env":
        print(f"export SLURM_CONF={shlex.quote(str(cluster.conf))}")
        return 0
    if arguments.verb == "status":
        return _status(cluster, as_json=arguments.json)
    if arguments.verb == "exec":
        words = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
        command = cluster.login_command(words or [os.environ.get("SHELL", "/bin/sh")])
        return subprocess.run(command, env={**os.environ, "SLURM_CONF": str(cluster.conf)}, check=False).returncode
    with open(f"{cluster.root}.lock", "w", encoding="utf-8") as lock:  # one change at a time
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _change(Cluster(arguments.dir), arguments)  # read again: another one may have written meanwhile


def _change(cluster: "Cluster", arguments: argparse.Namespace) -> int:
    from tools.local_slurm.configuration import Options

    if arguments.verb == "up":
        names = ("nodes", "cpus", "memory_mb", "gpus", "tracking", "requeue_delay", "node_timeout", "kill_wait")
        options = Options(**{name: getattr(arguments, name) for name in names})
        started = cluster.up(options, fresh=arguments.fresh, use_namespaces=not arguments.no_namespaces)
        print(f"up: {options.nodes} nodes, {len(started)} daemons started; logs in {cluster.root / 'log'}")
        print(f"export SLURM_CONF={shlex.quote(str(cluster.conf))}")
    elif arguments.verb == "down":
        print(f"down: {cluster.down(wipe=arguments.wipe)} processes ended")
    elif arguments.verb == "node-kill":
        print(f"{arguments.node}: {cluster.kill_node(arguments.node)} processes killed")
        print(f"Slurm notices by its node timeout, or at once by: scontrol update nodename={arguments.node} state=down reason=test")
    else:
        cluster.start_node(arguments.node)
        print(f"{arguments.node}: back")
    return 0


def _status(cluster: "Cluster", *, as_json: bool) -> int:
    pids = {daemon.name: cluster.pid(daemon) for daemon in cluster.daemons()}
    is_up = bool(pids.get("munged") and pids.get("slurmctld"))
    states = cluster.node_states() if is_up else {}
    is_usable = is_up and all(pids.values()) and cluster.is_usable()
    if as_json:
        print(json.dumps({"up": is_up, "usable": is_usable, "SLURM_CONF": str(cluster.conf), "pids": pids, "nodes": states}, indent=1))
    else:
        print("usable" if is_usable else "degraded" if any(pids.values()) else "down", f"({cluster.root})")
        for name, pid in pids.items():
            state = states.get(name.removeprefix("slurmd-"), "")
            print(f"  {name:<12} {pid or 'not running':<12} {state}")
    return 0 if is_usable else 1 if any(pids.values()) else 3


if __name__ == "__main__":
    sys.exit(main())
