"""Bench of the inbound listener: messages stored, how long the reply to the dot takes, and what a campaign loses while it is attacked.

    python -m bench.bench_inbound [--seconds N] [--clients N] [--rate N] [--json]

Stores, engine, sink and inbound process are private and real. First the listener alone: so many connections deliver reports as fast as
they can. Then a campaign at `--rate` messages a second (0: as fast as it goes) alone, beside the attack kit, and alone again; meanwhile
honest peers deliver reports, and their replies are timed. The attackers run on the same machine and cost what attackers cost elsewhere,
so they run with lower priority than everything of ours.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import msgspec

from bench import end_to_end, measure, newsletter
from bench.end_to_end import Case
from config.keys import load_keyring
from config.settings import Node, Settings
from control import machine
from control.supervise import Child, Supervisor, free_ports
from domain import return_path
from store import embedded

HONEST_CONNECTIONS: Final = 4
GOAL: Final = 0.9
DOT_GOAL_SECONDS: Final = 1.0
_REPORT: Final = (
    b"From: MAILER-DAEMON@mx.example\r\nSubject: Undelivered Mail Returned to Sender\r\nMIME-Version: 1.0\r\n"
    b'Content-Type: multipart/report; report-type=delivery-status; boundary="x"\r\n\r\n--x\r\nContent-Type: text/plain\r\n\r\nfailed\r\n'
    b"--x\r\nContent-Type: message/delivery-status\r\n\r\nReporting-MTA: dns; mx.example\r\n\r\n"
    b"Final-Recipient: rfc822; a@b.example\r\nAction: failed\r\nStatus: 5.1.1\r\nDiagnostic-Code: smtp; 550 5.1.1 User unknown\r\n\r\n"
    b"--x\r\nContent-Type: text/plain\r\n\r\n" + b"a line of the returned message, of which there are some\r\n" * 70 + b"--x--\r\n.\r\n"
)


class Honest:
    """Peers that deliver reports one after the other, and time the reply to each dot."""

    def __init__(self, place: str, recipient: str) -> None:
        host, _, port = place.rpartition(":")
        self._place = (host, int(port))
        self._envelope = f"MAIL FROM:<>\r\nRCPT TO:<{recipient}>\r\nDATA\r\n".encode()
        self.waits: list[float] = []
        self.trouble = 0

    async def run(self, connections: int, seconds: float, pause: float = 0.0) -> None:
        """So many at once for so long."""
        end = time.monotonic() + seconds
        await asyncio.gather(*(self._peer(end, pause) for _ in range(connections)))

    async def _peer(self, end: float, pause: float) -> None:
        while time.monotonic() < end:
            try:
                async with asyncio.timeout(30):
                    await self._session(end, pause)
            except (OSError, EOFError, TimeoutError, ValueError):
                self.trouble += 1
                await asyncio.sleep(0.1)

    async def _session(self, end: float, pause: float) -> None:
        reader, writer = await asyncio.open_connection(*self._place)
        try:
            await self._expect(reader, b"220")
            writer.write(b"EHLO mx.example\r\n")
            while (await reader.readline())[3:4] == b"-":
                pass
            for _ in range(90):
                if time.monotonic() >= end:
                    return
                writer.write(self._envelope)
                for code in (b"250", b"250", b"354"):
                    await self._expect(reader, code)
                writer.write(_REPORT)
                began = time.monotonic()
                await self._expect(reader, b"250")
                self.waits.append(time.monotonic() - began)
                await asyncio.sleep(pause)
        finally:
            writer.transport.abort()

    async def _expect(self, reader: asyncio.StreamReader, code: bytes) -> None:
        line = await reader.readline()
        if not line.startswith(code):
            raise ValueError(line)

    def shown(self, seconds: float) -> dict[str, Any]:
        """Messages a second, median and 99th percentile of the wait for the reply to the dot, in milliseconds."""
        waits = sorted(self.waits)
        return {
            "stored": len(waits), "per_second": round(len(waits) / seconds, 1), "trouble": self.trouble,
            "dot_p50_ms": round(statistics.median(waits) * 1e3, 1), "dot_p99_ms": round(waits[int(len(waits) * 0.99)] * 1e3, 1),
        }  # fmt: skip


@contextlib.asynccontextmanager
async def _inbound(backends: embedded.Backends, directory: Path) -> AsyncIterator[tuple[str, int]]:
    """(SMTP address, process id) of an inbound process."""
    smtp, http = free_ports(2)
    own = {
        "SLUICE_NODE__STATE_DIRECTORY": str(directory), "SLUICE_INBOUND__SMTP_PORT": str(smtp), "SLUICE_INBOUND__HTTP_PORT": str(http),
        "SLUICE_NODE__LOG_LEVEL": "error",
    }  # fmt: skip
    environment = machine.environment(None, database_url=backends.database_url, redis_url=backends.redis_url, more=own)
    environment.pop("SLUICE_CONFIG", None)
    child = Child(name="inbound", argv=machine.python("inbound"), ready="inbound ready")
    supervisor = Supervisor([child], environment=environment, say=lambda sentence: None, log_directory=directory / "log")
    ready = await supervisor.start()
    try:
        yield ready["inbound"]["smtp"], supervisor.pids()["inbound"]
    finally:
        await supervisor.stop()


def _rate(sample: measure.Sample) -> float:
    return sample.messages / sample.seconds


def _peak_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


async def _attack(place: str, recipient: str, clients: int, seconds: float) -> asyncio.subprocess.Process:
    argv = [*machine.python("bench.attack_kit", place, "--seconds", str(seconds), "--clients", str(clients), "--recipient", recipient)]
    return await asyncio.create_subprocess_exec("nice", "-n", "10", *argv, stdout=asyncio.subprocess.PIPE)


async def run(backends: embedded.Backends, directory: Path, *, seconds: float, clients: int, rate: int) -> dict[str, Any]:
    """Everything; the figures."""
    keyring = load_keyring(msgspec.structs.replace(Settings(), node=Node(state_directory=str(directory))))
    found: dict[str, Any] = {}
    async with end_to_end.opened(backends, directory) as bench:
        await bench.engines(1)
        case = Case(name="campaign", recipients=int((rate or 4000) * seconds))
        server = await bench.prepare(case)
        await bench._pool.execute(
            "update delivery_servers set version = version + 1, "
            "limits = limits || jsonb_build_object('max_messages_per_second', $2::float8) where id = $1",
            server, float(rate),
        )  # fmt: skip
        await bench._pool.execute("update egress_version set version = version + 1")
        await asyncio.sleep(3.0)  # until the engine has seen it
        domain = newsletter.MFROM.rpartition("@")[2]
        path = return_path.ReturnPath(1, 1, 1, int(time.time() // 86400))
        recipient = return_path.build(keyring.derive("return-path"), domain, path)
        async with _inbound(backends, directory) as (place, pid):
            alone = Honest(place, recipient)
            cpu = measure.cpu_seconds(pid)
            await alone.run(20, seconds / 2)
            found["listener alone, 20 connections"] = alone.shown(seconds / 2) | {
                "cpu_us_per_message": round((measure.cpu_seconds(pid) - cpu) / max(len(alone.waits), 1) * 1e6)
            }
            await asyncio.sleep(2.0)
            rates = [_rate(await bench.once(case, server))]
            honest = Honest(place, recipient)
            attack = await _attack(place, recipient, clients, 3 * seconds)
            beside = asyncio.create_task(honest.run(HONEST_CONNECTIONS, 2.5 * seconds, 0.05))
            await asyncio.sleep(1.0)
            attacked = _rate(await bench.once(case, server))
            beside.cancel()
            await asyncio.gather(beside, return_exceptions=True)
            rss = _peak_bytes(pid)
            said, _ = await attack.communicate()
            found["attack kit"] = json.loads(said)
            found["listener under attack, honest peers"] = honest.shown(case.recipients / attacked + 1.0)
            await asyncio.sleep(2.0)
            rates.append(_rate(await bench.once(case, server)))
            found["campaign"] = {
                "rate_alone": [round(each) for each in rates], "rate_attacked": round(attacked),
                "kept": round(attacked / statistics.mean(rates), 3), "goal": GOAL, "inbound_peak_mib": round(rss / 2**20),
            }  # fmt: skip
    return found


def main() -> int:
    """Run it and print the figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.bench_inbound", description="The inbound listener, alone and under attack.")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each part (%(default)s)")
    parser.add_argument("--clients", type=int, default=20, help="attackers at once (%(default)s)")
    parser.add_argument("--rate", type=int, default=1500, help="messages a second of the campaign; 0: as fast as it goes (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args()
    with end_to_end.private() as (backends, directory):
        found = asyncio.run(run(backends, directory, seconds=options.seconds, clients=options.clients, rate=options.rate))
    if options.json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        for name, figures in found.items():
            sys.stdout.write(f"{name}: {', '.join(f'{key} {value}' for key, value in figures.items() if key != 'rounds')}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
