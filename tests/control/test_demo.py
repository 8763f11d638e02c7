"""The demo as a real process: what it prints, that it counts right, and that it leaves nothing running."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from control import demo_content

ROOT = Path(__file__).parents[2]
KEYS = ["imported", "refused", "delivered", "bounced", "deferred_then_delivered", "suppressed", "expired", "sink_accepted", "lost",
        "duplicates", "messages_per_second", "engine_cpu_us_per_message", "seconds"]  # fmt: skip


@pytest.fixture
def state(short_temporary_directory: Path) -> Path:
    """A state directory short enough for sockets, which the servers' user can pass through."""
    directory = short_temporary_directory / f"demo{time.monotonic_ns() % 10**9}"
    directory.mkdir(mode=0o711)
    return directory


def command(state: Path, *words: str) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of a demo on embedded servers of its own."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("SLUICE_")}
    own |= {"PYTHONPATH": str(ROOT), "SLUICE_NODE__STATE_DIRECTORY": str(state)}
    return [sys.executable, "-m", "control.cli", "demo", *words], own


def processes_of(state: Path) -> list[int]:
    """Processes that know the state directory from their command line or environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                known = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            if str(state).encode() in known:
                found.append(int(entry.name))
    return found


def test_the_list_has_the_faults_it_says_and_its_tokens_only_where_it_says(tmp_path: Path) -> None:
    made = demo_content.write_list(tmp_path / "list.csv", 5000)
    with made.path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == list(demo_content.COLUMNS)
    assert len(rows) - 1 == made.rows == 5000 == made.good + sum(made.faulty.values())
    assert len(made.faulty) >= 10
    good = [row for row in rows[1:] if row[0].count("@") == 1]
    assert all(row[0].lower().endswith(".example") for row in good if not row[0].endswith("@"))
    assert 100 < made.deferring < 400
    assert 30 < made.bouncing < 150
    assert set(made.suppressed) <= {row[0] for row in good}
    assert demo_content.write_list(tmp_path / "again.csv", 5000).faulty == made.faulty
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "list.csv").read_bytes()


def test_a_demo_delivers_counts_and_leaves_nothing_behind(state: Path, tmp_path: Path) -> None:
    expected = demo_content.write_list(tmp_path / "list.csv", 600)
    words, environment = command(state, "--recipients", "600", "--engines", "2", "--json")
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result) == KEYS
    assert result["imported"] == expected.good
    assert result["refused"] == sum(expected.faulty.values())
    assert result["bounced"] == expected.bouncing
    assert result["suppressed"] == len(expected.suppressed)
    assert result["deferred_then_delivered"] == expected.deferring
    assert result["delivered"] == expected.good - expected.bouncing - len(expected.suppressed) == result["sink_accepted"]
    assert (result["expired"], result["lost"], result["duplicates"]) == (0, 0, 0)
    assert result["messages_per_second"] > 0
    assert result["engine_cpu_us_per_message"] > 0
    assert processes_of(state) == []
    accounting = sorted(state.glob("demo/*/accounting/acct-*.csv"))
    with_header = [line for path in accounting for line in path.read_text(encoding="utf-8").splitlines()]
    assert sum(line.startswith("d,") for line in with_header) == result["delivered"]
    assert sum(line.startswith("b,") for line in with_header) == result["bounced"]


def test_a_demo_that_stays_stops_in_order_at_ctrl_c_and_the_next_one_takes_its_place(state: Path, tmp_path: Path) -> None:
    words, environment = command(state, "--recipients", "20", "--engines", "1", "--stay")
    process = subprocess.Popen(words, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "Ctrl-C stops it" in line:
            break
    assert process.poll() is None, "".join(lines)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    for word in ("Imported", "Refused", "Delivered", "Bounced", "Suppressed", "Sink accepted", "Audit", "clean", "Messages/s", "Mailbox",
                 "API", "Accounting"):  # fmt: skip
        assert word in out
    assert processes_of(state) == []

    first = {path.name for path in (state / "demo").iterdir()}
    words, environment = command(state, "--recipients", "20", "--engines", "1", "--json")
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert len({path.name for path in (state / "demo").iterdir()} - first) == 1
    assert not {path.name for path in (state / "demo").iterdir()} & first
