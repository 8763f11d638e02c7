"""The supervisor against real processes: small Python scripts that get ready, die, hang or talk too much."""

import asyncio
import io
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from control import supervise
from control.supervise import Child, ChildFailed, LogFile, Supervisor
from domain.errors import ConfigurationError

GOOD = "import time; print('thing ready http=http://127.0.0.1:1 smtp=127.0.0.1:2', flush=True); time.sleep(60)"
DYING = "import sys; print('cannot open the vault', file=sys.stderr); sys.exit(3)"
SILENT = "import time; time.sleep(60)"
DEAF = "import signal, time; signal.signal(15, signal.SIG_IGN); print('thing ready', flush=True); time.sleep(60)"


def child(name: str, code: str, **more: object) -> Child:
    return Child(name=name, argv=(sys.executable, "-c", code), ready="thing ready", **more)  # type: ignore[arg-type]


def supervisor(*children: Child, said: list[str] | None = None, log_directory: Path | None = None) -> Supervisor:
    say = (said if said is not None else []).append
    return Supervisor(children, environment=dict(os.environ), say=say, log_directory=log_directory, stderr=io.StringIO())


async def until(condition: object, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.02)


async def test_start_returns_what_each_child_said_when_it_was_ready() -> None:
    machine = supervisor(child("one", GOOD), child("two", GOOD))
    words = await machine.start()
    try:
        assert words["one"] == {"http": "http://127.0.0.1:1", "smtp": "127.0.0.1:2"}
        assert set(machine.pids()) == {"one", "two"}
    finally:
        await machine.stop()
    assert machine.pids() == {}


async def test_a_child_that_ends_before_it_is_ready_stops_the_start_with_its_last_words() -> None:
    machine = supervisor(child("one", GOOD), child("two", DYING))
    with pytest.raises(ChildFailed, match="two ended with code 3 .*cannot open the vault"):
        await machine.start()
    assert machine.pids() == {}


async def test_a_silent_child_is_named_when_the_time_is_up(tmp_path: Path) -> None:
    machine = supervisor(child("mute", SILENT), log_directory=tmp_path)
    with pytest.raises(ChildFailed, match="mute did not get ready within 0.3 s; it said nothing .*mute.log"):
        await machine.start(timeout_seconds=0.3)
    assert machine.pids() == {}


async def test_a_command_that_does_not_exist_is_said_in_a_sentence() -> None:
    machine = supervisor(Child(name="gone", argv=("/nonexistent/program",), ready="gone ready"))
    with pytest.raises(ChildFailed, match="gone could not be started .*No such file"):
        await machine.start()


async def test_a_killed_child_is_started_again_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "PAUSE_FIRST_SECONDS", 0.05)
    said: list[str] = []
    machine = supervisor(child("one", GOOD), said=said)
    await machine.start()
    try:
        first = machine.pids()["one"]
        os.kill(first, signal.SIGKILL)
        await until(lambda: machine.pids().get("one", first) != first)
        assert machine.restarts() == 1
        assert said == ["one was ended by SIGKILL; starting it again in 0.05 s (restart 1)"]
    finally:
        await machine.stop()


async def test_the_pause_before_a_restart_doubles_and_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "PAUSE_FIRST_SECONDS", 0.01)
    monkeypatch.setattr(supervise, "PAUSE_LAST_SECONDS", 0.04)
    said: list[str] = []
    machine = supervisor(child("one", "print('thing ready', flush=True)"), said=said)
    await machine.start()
    await until(lambda: len(said) >= 5)
    await machine.stop()
    assert [line.split(" in ")[1].split(" ")[0] for line in said[:5]] == ["0.01", "0.02", "0.04", "0.04", "0.04"]


async def test_children_stop_in_order_and_a_deaf_one_is_killed() -> None:
    said: list[str] = []
    machine = supervisor(child("first", DEAF, stop_order=0, stop_timeout_seconds=0.2), child("last", GOOD, stop_order=1), said=said)
    await machine.start()
    last = machine.pids()["last"]
    stopping = asyncio.create_task(machine.stop())
    await asyncio.sleep(0.05)
    os.kill(last, 0)  # still there while the first is being waited for
    await stopping
    assert said == ["first did not stop within 0.2 s and was killed"]
    assert machine.pids() == {}


def test_children_die_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    script = f"""
import asyncio, os, sys
from control.supervise import Child, Supervisor
async def main():
    child = Child(name="one", argv=(sys.executable, "-c", {GOOD!r}), ready="thing ready")
    machine = Supervisor([child], environment=dict(os.environ), say=print)
    await machine.start()
    print(machine.pids()["one"], flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    root = Path(supervise.__file__).parents[1]
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 10
    while _is_running(pid):
        assert time.monotonic() < end, "the child outlived its supervisor"
        time.sleep(0.02)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_standard_error_goes_to_a_log_file_or_to_ours_with_the_name_in_front(tmp_path: Path) -> None:
    talking = "import sys, time; print('héllo\\nagain', file=sys.stderr, flush=True); print('thing ready', flush=True); time.sleep(60)"
    machine = supervisor(child("talker", talking), log_directory=tmp_path)
    await machine.start()
    await until(lambda: b"again" in (tmp_path / "talker.log").read_bytes())
    await machine.stop()
    assert "héllo\nagain\n" in (tmp_path / "talker.log").read_text()

    ours = io.StringIO()
    machine = Supervisor([child("talker", talking)], environment=dict(os.environ), say=print, stderr=ours)
    await machine.start()
    await until(lambda: "talker     | again\n" in ours.getvalue())
    await machine.stop()


def test_a_log_file_is_rotated_by_size_and_old_ones_are_dropped(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "x.log", limit=30)
    for number in range(20):
        log.write(b"line %02d of ten\n" % number)
    log.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.log", "x.log.1", "x.log.2", "x.log.3"]
    assert (tmp_path / "x.log").read_text().endswith("line 19 of ten\n")
    assert all(path.stat().st_size <= 30 for path in tmp_path.iterdir())


def test_a_port_in_use_is_refused_with_the_setting_to_change() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError) as refused:
            supervise.check_ports({"control.port": ("127.0.0.1", port), "inbound.smtp_port": ("127.0.0.1", supervise.free_ports(1)[0])})
    assert refused.value.problems == [
        f"control.port: cannot listen on 127.0.0.1:{port} (Address already in use); stop what uses it or set SLUICE_CONTROL__PORT"
    ]
