"""The launcher: exit codes, signals, logs, and no orphans."""

import os
import pty
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from spin_megatron.launch import allocator, local


def rank_program(tmp_path: Path, body: str) -> tuple[str, ...]:
    """A stand-in for the command line: `body` runs with `rank` and `out` (a folder) defined."""
    path = tmp_path / "rank.py"
    head = "import os, sys, time, signal, pathlib\nfrom spin_megatron.launch.local import end_with_parent\n"
    setup = f"end_with_parent()\nrank = int(os.environ['RANK'])\nout = pathlib.Path({str(tmp_path)!r})\n"
    path.write_text(head + setup + textwrap.dedent(body), encoding="utf-8")
    return (sys.executable, str(path))


def launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, world_size: int = 2) -> int:
    monkeypatch.setattr(local, "PROGRAM", rank_program(tmp_path, body))
    monkeypatch.setattr(local, "GRACE_SECONDS", 0.5)
    with local.Launcher() as launcher:
        return launcher.launch(["train"], world_size=world_size, threads=1, log_folder=tmp_path / "logs")


def test_all_ranks_done_is_zero_and_each_has_its_coordinates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "OMP_NUM_THREADS")
    body = f"(out / f'env{{rank}}').write_text(' '.join(os.environ[key] for key in {keys!r}))"
    assert launch(monkeypatch, tmp_path, body) == 0
    assert [(tmp_path / f"env{rank}").read_text() for rank in (0, 1)] == ["0 2 0 127.0.0.1 1", "1 2 1 127.0.0.1 1"]


def test_ranks_on_a_cpu_get_tcmalloc_where_it_is_and_the_user_has_not_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("LD_PRELOAD", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocator, "visible_gpus", list)
    monkeypatch.setattr(allocator, "find_tcmalloc", lambda: "libc.so.6")  # any library that each machine has
    body = "(out / 'preload').write_text(os.environ.get('LD_PRELOAD', 'none'))"

    def preloaded() -> str:
        assert launch(monkeypatch, tmp_path, body, world_size=1) == 0
        return (tmp_path / "preload").read_text()

    assert preloaded() == "libc.so.6"
    monkeypatch.setattr(allocator, "visible_gpus", lambda: [("0", "NVIDIA H100")])
    assert preloaded() == "none"
    monkeypatch.setattr(allocator, "visible_gpus", list)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")
    assert preloaded() == "none"
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_")
    monkeypatch.setattr(allocator, "find_tcmalloc", lambda: None)
    assert preloaded() == "none"


def test_a_rank_under_srun_starts_itself_anew_with_the_allocator_of_its_node(tmp_path: Path) -> None:
    code = """
        import os
        from spin_megatron.launch import allocator, rank
        allocator.find_tcmalloc, allocator.visible_gpus = lambda: "libc.so.6", list
        print(os.getpid(), os.environ.get("LD_PRELOAD"), flush=True)
        raise SystemExit(rank.main())
    """
    variables = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "MALLOC_MMAP_THRESHOLD_")}
    variables |= {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}
    words = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "the logs"), "train", "--run-dir", str(tmp_path)]
    result = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=60, check=False)
    first, second = result.stdout.splitlines()
    pid = first.split()[0]
    assert (first, second) == (f"{pid} None", f"{pid} libc.so.6"), "one process, as srun sees it"
    assert result.returncode == 2, result.stderr
    assert "is not a run directory" in (tmp_path / "the logs" / f"rank_0_{socket.gethostname()}.log").read_text(encoding="utf-8")


@pytest.mark.skipif(allocator.find_tcmalloc() is None, reason="tcmalloc is not installed (apt-get install libtcmalloc-minimal4)")
def test_the_tcmalloc_that_is_found_is_what_a_rank_runs_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("LD_PRELOAD", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocator, "visible_gpus", list)
    assert launch(monkeypatch, tmp_path, "(out / 'maps').write_text(pathlib.Path('/proc/self/maps').read_text())", world_size=1) == 0
    assert "tcmalloc" in (tmp_path / "maps").read_text()


@pytest.mark.timeout(90)
def test_the_port_the_ranks_meet_at_is_never_free_to_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    body = """
    import socket
    address = ("127.0.0.1", int(os.environ["MASTER_PORT"]))
    try:
        socket.create_server(address)
    except OSError as error:
        (out / f"taken{rank}").write_text(str(error))
    from spin_megatron.mcore.runtime import running
    from spin_megatron.plan.shape import ParallelLayout
    with running(ParallelLayout(data=2), device="cpu", seed=1) as runtime:
        (out / f"met{rank}").write_text(f"{runtime.data_rank} {os.environ.get('SPIN_MEGATRON_MEETING_SOCKET')}")
    """
    assert launch(monkeypatch, tmp_path, body) == 0
    assert [(tmp_path / f"met{rank}").read_text() for rank in (0, 1)] == ["0 None", "1 None"], "rank 0 took the socket"
    assert all("in use" in (tmp_path / f"taken{rank}").read_text() for rank in (0, 1))


def test_a_failing_rank_ends_the_others_and_its_code_is_returned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = time.monotonic()
    assert launch(monkeypatch, tmp_path, "sys.exit(7) if rank == 1 else time.sleep(60)") == 7
    assert time.monotonic() - started < 30


def test_the_rank_that_explains_a_refusal_decides_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert launch(monkeypatch, tmp_path, "time.sleep(0.2 * rank)\nsys.exit(2 if rank == 1 else 1)") == 2


def test_a_rank_killed_from_outside_is_a_failure_and_no_stop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert launch(monkeypatch, tmp_path, "os.kill(os.getpid(), signal.SIGKILL)") == 1


def test_every_attempt_keeps_its_logs_and_latest_points_at_the_newest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for attempt in (1, 2):
        assert launch(monkeypatch, tmp_path, f"print('attempt {attempt} of rank', rank)") == 0
    assert (tmp_path / "logs/attempt_1/rank_1.log").read_text() == "attempt 1 of rank 1\n"
    assert (tmp_path / "logs/latest/rank_1.log").read_text() == "attempt 2 of rank 1\n"


def test_modules_of_the_current_folder_do_not_stand_in_for_libraries(tmp_path: Path) -> None:
    folder = tmp_path / "my project"
    folder.mkdir()
    for name in ("pydantic", "rich", "logging"):
        (folder / f"{name}.py").write_text("raise RuntimeError('not the library')\n", encoding="utf-8")
    words = ["train", "--run-dir", str(folder)]
    code = f"""
        import sys
        from pathlib import Path
        from spin_megatron.launch.local import Launcher
        with Launcher() as launcher:
            sys.exit(launcher.launch({words!r}, world_size=1, threads=1, log_folder=Path({str(tmp_path / "logs")!r})))
    """
    script = tmp_path / "bin" / "spin-megatron"  # as pip installs it, in a folder of its own
    script.parent.mkdir()
    script.write_text(textwrap.dedent(code), encoding="utf-8")
    result = subprocess.run([sys.executable, str(script)], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, "is not a run directory" in result.stderr) == (2, True), result.stderr


WAITS_FOR_A_STOP = """
    stop = []
    signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
    (out / f'up{rank}').touch()
    for _ in range(600):
        if stop:
            sys.exit(75)
        time.sleep(0.05)
"""


def launcher_code(tmp_path: Path, body: str) -> str:
    """The source of a process that is a launcher of two ranks."""
    program = rank_program(tmp_path, body)
    code = f"""
        from pathlib import Path
        from spin_megatron.launch import allocator, local
        from spin_megatron.run.telemetry import configure_logging
        configure_logging(None)
        local.PROGRAM = {program!r}
        with local.Launcher() as launcher:
            raise SystemExit(launcher.launch(["train"], world_size=2, threads=1, log_folder=Path({str(tmp_path / "logs")!r})))
    """
    return textwrap.dedent(code)


def wait_for_ranks(tmp_path: Path) -> None:
    for _ in range(600):
        if (tmp_path / "up0").exists() and (tmp_path / "up1").exists():
            return
        time.sleep(0.05)
    raise AssertionError("the ranks did not start")


def start_launcher(tmp_path: Path, body: str, stderr: int | None = None) -> subprocess.Popen[bytes]:
    """A launcher in a process of its own, once both its ranks are up."""
    process = subprocess.Popen([sys.executable, "-c", launcher_code(tmp_path, body)], stderr=stderr)
    try:
        wait_for_ranks(tmp_path)
    except AssertionError:
        process.kill()
        raise
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_reaches_every_rank_and_is_reported_as_75(tmp_path: Path, number: signal.Signals) -> None:
    process = start_launcher(tmp_path, WAITS_FOR_A_STOP)
    process.send_signal(number)
    assert process.wait(timeout=30) == 75


SAVES_AFTER_A_STOP = """
    import logging
    from spin_megatron.launch.local import stop_signals
    from spin_megatron.run.telemetry import configure_logging, progress_bar
    configure_logging(None)
    stop = []
    for number in stop_signals():
        signal.signal(number, lambda number, frame: stop.append(number))
    (out / f"up{rank}").touch()
    with progress_bar("train (steps)", 100, show=rank == 0) as advance:
        while not stop:
            time.sleep(0.05)
            advance(1)
        for word in ("one more step", "stopped on request"):
            logging.getLogger("spin_megatron").info(word)
        (out / f"saved{rank}").touch()
    sys.exit(75)
"""


def test_a_stop_saves_although_whoever_read_the_messages_is_gone(tmp_path: Path) -> None:
    process = start_launcher(tmp_path, SAVES_AFTER_A_STOP, stderr=subprocess.PIPE)
    assert process.stderr is not None
    process.stderr.close()  # as tee leaves on Ctrl-C
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 75
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()


def test_the_end_of_the_terminal_is_a_stop(tmp_path: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:  # pragma: no cover (another process, which becomes the launcher)
        os.execv(sys.executable, [sys.executable, "-c", launcher_code(tmp_path, SAVES_AFTER_A_STOP)])
    wait_for_ranks(tmp_path)
    os.close(terminal)  # as a connection that breaks
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()


def test_the_end_of_the_terminal_is_none_under_nohup(monkeypatch: pytest.MonkeyPatch) -> None:
    assert signal.SIGHUP in local.stop_signals()
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    assert local.stop_signals() == [signal.SIGTERM, signal.SIGINT]


def test_a_second_ctrl_c_ends_ranks_that_do_not_leave(tmp_path: Path) -> None:
    body = """
    signal.signal(signal.SIGTERM, lambda *_: (out / f"asked{rank}").touch())
    (out / f"up{rank}").touch()
    while True:
        time.sleep(0.05)
    """
    process = start_launcher(tmp_path, body)
    process.send_signal(signal.SIGINT)
    for _ in range(200):
        if (tmp_path / "asked0").exists() and (tmp_path / "asked1").exists():
            break
        time.sleep(0.05)
    assert process.poll() is None, "they were asked to leave, not ended"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 75


@pytest.mark.parametrize(("times", "passed_on"), [(1, signal.SIGTERM), (2, signal.SIGKILL)])
def test_ctrl_c_while_ranks_are_started_reaches_them_as_often_as_it_came(
    times: int, passed_on: signal.Signals, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    signal_all, sent = local._signal_all, []

    def interrupted() -> dict[str, str]:  # what the launcher asks for just before it starts ranks
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
        return {}

    def record(processes: list[subprocess.Popen[bytes]], number: int) -> None:
        sent.extend([number] * len(processes))
        signal_all(processes, number)

    monkeypatch.setattr(local, "allocator_variables", interrupted)
    monkeypatch.setattr(local, "_signal_all", record)
    assert launch(monkeypatch, tmp_path, "time.sleep(60)") == 75
    assert sent[:2] == [passed_on, passed_on]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="parent-death signals are Linux's")
def test_killing_the_launcher_leaves_no_orphan(tmp_path: Path) -> None:
    body = "(out / f'pid{rank}').write_text(str(os.getpid()))\n(out / f'up{rank}').touch()\ntime.sleep(60)"
    process = start_launcher(tmp_path, body)
    process.kill()
    process.wait(timeout=30)
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)]
    for _ in range(200):
        if not any(is_alive(pid) for pid in pids):
            return
        time.sleep(0.05)
    raise AssertionError(f"still alive: {[pid for pid in pids if is_alive(pid)]}")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
