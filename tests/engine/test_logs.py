"""An engine's log: losing its reader must not cost more than the lines."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SPEAKER = """
import logging, sys, structlog
from engine import logs
logs.configure("info")
sys.stdin.readline()
for _ in range(3):
    structlog.get_logger("engine").warning("nobody hears this")
    logging.getLogger("journal").warning("nor this")
print("alive")
"""


def test_lines_that_nobody_reads_any_more_end_nothing() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", SPEAKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert child.stderr is not None
    child.stderr.close()  # as when the supervisor was killed
    child.stderr = None
    said, _ = child.communicate("go on\n", timeout=30)
    assert said == "alive\n"
