"""The log of a process: losing its reader must not cost more than the lines."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SPEAKER = """
import logging, sys, structlog
from config import logs
logs.configure("info")
for line in sys.stdin:
    for _ in range(int(line)):
        structlog.get_logger("engine").warning("nobody hears this " + "x" * 5000)
        logging.getLogger("journal").warning("nor this")
    print("alive", flush=True)
"""


def speaker(stderr: int) -> "subprocess.Popen[str]":
    child = subprocess.Popen(
        [sys.executable, "-c", SPEAKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, cwd=ROOT, text=True
    )
    os.close(stderr)
    return child


def speak(child: "subprocess.Popen[str]", lines: int) -> str:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(f"{lines}\n")
    child.stdin.flush()
    return child.stdout.readline()


def test_lines_that_nobody_reads_any_more_end_nothing() -> None:
    reading, writing = os.pipe()
    child = speaker(writing)
    os.close(reading)  # as when the supervisor was killed
    assert speak(child, 3) == "alive\n"
    assert child.communicate(timeout=30)[0] == ""
    assert child.returncode == 0


def test_a_reader_that_stands_still_stops_nothing_and_is_told_what_it_missed() -> None:
    reading, writing = os.pipe()
    child = speaker(writing)
    assert speak(child, 100) == "alive\n"  # 500 kB into a pipe that holds 64
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        heard = pipe.read(1 << 20)
        assert 10_000 < len(heard) <= 1 << 16
        assert speak(child, 1) == "alive\n"
        later = pipe.read(1 << 20).decode()
    lost, _, rest = later.partition(" lines were lost: nobody read them\n")
    assert heard.count(b"\n") + int(lost) in (200, 201)  # the line the pipe became full in is there in part
    assert rest.count("\n") == 2
    assert child.communicate(timeout=30)[0] == ""
