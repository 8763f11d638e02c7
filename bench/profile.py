"""`python -m bench.profile` (`make profile`): where the CPU of an engine goes while it sends the newsletter.

Writes to build/profile: `engine.svg`, a flame graph of Python and native frames (py-spy), and `engine.txt`, shares by library and by
function (perf). Either program is optional; what is missing is said and skipped. Both slow the engine down, so read shares, not times.
"""

import argparse
import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

from bench import end_to_end
from bench.end_to_end import Case
from store import embedded

ROOT: Final = Path(__file__).resolve().parents[1]


def _py_spy(pid: int, out: Path, seconds: int) -> subprocess.Popen[bytes] | None:
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if not program:
        print("flame graph skipped: py-spy is not installed (pip install py-spy)")
        return None
    command = [program, "record", "--native", "-r", "100", "-d", str(seconds), "-o", str(out), "--pid", str(pid)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _perf(pid: int, data: Path) -> subprocess.Popen[bytes] | None:
    if not shutil.which("perf"):
        print("shares by function skipped: perf is not installed (Debian: apt install linux-perf)")
        return None
    command = ["perf", "record", "-q", "-F", "999", "-o", str(data), "-p", str(pid)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _report(data: Path, text: Path) -> None:
    """Two tables out of perf's data: by library, then by function."""
    parts = []
    for what in ("dso", "dso,symbol"):
        command = ["perf", "report", "-i", str(data), "--stdio", "--sort", what, "--percent-limit", "0.3"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        parts.append("\n".join(row for row in done.stdout.splitlines() if row.strip() and not row.startswith("#")))
    text.write_text("\n\n".join(parts) + "\n")


async def _load(backends: embedded.Backends, directory: Path, out: Path, window: int) -> None:
    case = Case(name="profile", recipients=60_000, window=window)
    async with end_to_end.opened(backends, directory) as bench:
        await bench.engines(1)
        server = await bench.prepare(case)
        await bench.once(case, server)
        for tool in ("perf", "py-spy"):  # one after the other: each would see the other's interruptions
            data = out / "perf.data"
            pid = bench.engine_pids()[0]
            watcher = _perf(pid, data) if tool == "perf" else _py_spy(pid, out / "engine.svg", 120)
            if watcher is None:
                continue
            await asyncio.sleep(0.5)
            sample = await bench.once(case, server)
            with contextlib.suppress(ProcessLookupError):
                watcher.send_signal(signal.SIGINT)
            await asyncio.to_thread(watcher.wait, 60)
            print(f"{tool}: {sample.cpu_seconds / sample.messages * 1e6:.1f} us of CPU per message while it watched")
            if tool == "perf" and data.exists():
                await asyncio.to_thread(_report, data, out / "engine.txt")
                data.unlink()
            if watcher.returncode not in (0, -signal.SIGINT):
                print(f"{tool} ended with code {watcher.returncode}; it may not be allowed to look into other processes here")


def main() -> int:
    """Load an engine and watch it."""
    parser = argparse.ArgumentParser(prog="bench.profile", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--window", type=int, default=0, help="0: DATA; else BDAT with so many messages in flight")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "profile")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    with end_to_end.private() as (backends, directory):
        asyncio.run(_load(backends, directory, chosen.out, chosen.window))
    for name in sorted(os.listdir(chosen.out)):  # noqa: PTH208 - names are all that is wanted
        print(chosen.out / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
