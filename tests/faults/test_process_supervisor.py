"""`sluice up` whose private stores die, and which dies itself (row 6)."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from control.supervise import free_ports

ROOT = Path(__file__).resolve().parents[2]


class Up:
    """One `sluice up` on a state directory."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.output = state.with_suffix(".out")
        control, smtp, http = free_ports(3)
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("SLUICE_")},
            "SLUICE_NODE__STATE_DIRECTORY": str(state),
            "SLUICE_CONTROL__PORT": str(control),
            "SLUICE_INBOUND__SMTP_PORT": str(smtp),
            "SLUICE_INBOUND__HTTP_PORT": str(http),
        }
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from control.cli import main; main()", "up", "--engines", "1"],
                cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.until(lambda: "ready: 1 engine" in self.said())

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.said()[-4000:]
            time.sleep(0.05)

    def children(self) -> list[int]:
        """Every process it has started."""
        return [int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()]

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(60)


@pytest.fixture
def state(short_temporary_directory: Path) -> Path:
    """An empty state directory the servers' user can reach."""
    return short_temporary_directory / f"up{time.monotonic_ns()}"


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_dead_stores_are_started_again_and_a_killed_supervisor_leaves_nothing_behind(state: Path) -> None:
    up = Up(state)
    second = None
    try:
        data = next(state.glob("pg*/postmaster.pid"))
        os.kill(int(data.read_text().split()[0]), signal.SIGKILL)
        os.kill(int((state / "valkey" / "valkey.pid").read_text()), signal.SIGKILL)
        up.until(lambda: "PostgreSQL answers again" in up.said() and "Valkey answers again" in up.said())
        up.until(lambda: up.said().count("this engine is the feeder") >= 2)  # it reached the new one
        assert "restart 1" not in up.said(), "the engine, control or inbound did not outlive its stores"

        children = up.children()
        journal = next((state / "journal").iterdir()).name
        assert len(children) == 5
        up.process.kill()
        up.process.wait()
        second = Up(state)
        second.until(lambda: not any(map(is_running, children)))
        second.until(lambda: not (state / "journal" / journal).exists())  # it ended in order, or was taken over
    finally:
        up.end()
        if second is not None:
            second.end()
            assert second.process.returncode == 0, second.said()[-4000:]
