"""`sluice demo`: everything at work on one machine, from an empty directory to a counted campaign.

It runs what `sluice up` runs, plus the mail sink, on free ports and with data of its own; imports by the code of `sluice import`;
creates and starts its campaign over the HTTP API; and compares what was recorded with what the sink accepted. Each run has a
directory of its own, so a run that is still stopping can never disturb the next; older ones are removed.
"""

import asyncio
import contextlib
import fcntl
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from config import load
from config.settings import Settings
from control import cli_lists, demo_content, machine
from control.cli_base import FAILED, INTERRUPTED, OK, Stores, open_stores, say, write_json
from control.demo_client import ApiClient
from control.demo_view import Line, Progress, summary
from control.supervise import Supervisor, free_ports
from control.up import keep_stores, stop_on_signals
from domain import states
from domain.errors import Unavailable
from store import accounting, embedded, migrate, status
from store.imports import ImportReport

_POLL_SECONDS: Final = 0.25
_QUIET_SECONDS: Final = 120.0  # no recipient got anywhere for that long: something is wrong
_RETRY_SCHEDULE_SECONDS: Final = (1.0, 2.0)
_CONNECTIONS: Final = 20
_HEARTBEAT_SECONDS: Final = 1.0


class Result(msgspec.Struct, kw_only=True):
    """What `--json` prints; the fields are part of the command's contract."""

    imported: int = 0
    refused: int = 0
    delivered: int = 0
    bounced: int = 0
    deferred_then_delivered: int = 0
    suppressed: int = 0
    expired: int = 0
    sink_accepted: int = 0
    lost: int = 0
    duplicates: int = 0
    messages_per_second: float = 0.0
    engine_cpu_us_per_message: float = 0.0
    seconds: float = 0.0


def main(config: Path | None, *, recipients: int, engines: int | None, stay: bool, as_json: bool) -> int:
    """Run the demo; the exit code is 0 only if the audit is clean and the sink accepted what was recorded as delivered."""
    began = time.monotonic()
    with _run_directory(load.state_directory(load.load(config, os.environ)) / "demo") as directory:
        ports = dict(zip(("control", "smtp", "http"), free_ports(3), strict=True))
        # Variables win over any settings file, so a demo beside a configured installation stays on its own ground.
        own = {
            "SLUICE_NODE__STATE_DIRECTORY": str(directory),
            "SLUICE_JOURNAL__DIRECTORY": str(directory / "journal"),
            "SLUICE_ACCOUNTING__PATH": str(directory / "accounting" / "acct.csv"),
            "SLUICE_SECRETS__KEY_FILE": str(directory / "secret.key"),
            "SLUICE_CONTROL__HOST": "127.0.0.1",
            "SLUICE_CONTROL__PORT": str(ports["control"]),
            "SLUICE_INBOUND__SMTP_HOST": "127.0.0.1",
            "SLUICE_INBOUND__SMTP_PORT": str(ports["smtp"]),
            "SLUICE_INBOUND__HTTP_HOST": "127.0.0.1",
            "SLUICE_INBOUND__HTTP_PORT": str(ports["http"]),
            "SLUICE_INBOUND__PUBLIC_URL": f"http://127.0.0.1:{ports['http']}",
            "SLUICE_ENGINE__METRICS_PORT": "0",
        }
        settings = load.load(config, {**os.environ, **own})
        with embedded.resolve(settings.database.url, settings.redis.url, directory) as backends:
            say(f"stores: {backends.chosen}")
            demo = _Demo(settings, config, backends, own, directory, began)
            return asyncio.run(demo.run(recipients, machine.engine_count(settings, engines), stay=stay, as_json=as_json))


@contextlib.contextmanager
def _run_directory(parent: Path) -> Iterator[Path]:
    """A fresh directory, locked while the demo runs. Those of runs that are over are removed first."""
    parent.mkdir(parents=True, exist_ok=True)
    for old in sorted(parent.iterdir()):
        with contextlib.suppress(OSError), (old / "demo.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old, ignore_errors=True)
    directory = parent / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    directory.mkdir(mode=0o711)
    with (directory / "demo.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield directory


class _Demo:
    def __init__(
        self, settings: Settings, config: Path | None, backends: embedded.Backends, own: dict[str, str], directory: Path, began: float
    ) -> None:
        self._settings = settings
        self._config = config
        self._backends = backends
        self._own = own
        self._directory = directory
        self._began = began

    async def run(self, recipients: int, engines: int, *, stay: bool, as_json: bool) -> int:
        """Start, send, count, stop. A signal on the way stops in order."""
        stop = stop_on_signals()
        stopped = asyncio.create_task(stop.wait())
        await migrate.apply(self._backends.database_url)
        supervisor = Supervisor(
            machine.children(
                self._settings, engines=engines, sink=("--port", "0", "--http-port", "0", "--max-tracked", str(recipients + 1000))
            ),
            environment=machine.environment(
                self._config, database_url=self._backends.database_url, redis_url=self._backends.redis_url, more=self._own
            ),
            say=say,
            log_directory=self._directory / "log",
        )
        keeping = keep_stores(self._backends)
        try:
            work = asyncio.create_task(self._work(supervisor, recipients, engines, stay=stay, as_json=as_json))
            await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
                return INTERRUPTED
            code = work.result()
            if stay:
                say("everything keeps running; Ctrl-C stops it")
                await stopped
            return code
        finally:
            stopped.cancel()
            await supervisor.stop()
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    async def _work(self, supervisor: Supervisor, recipients: int, engines: int, *, stay: bool, as_json: bool) -> int:
        writing = asyncio.to_thread(demo_content.write_list, self._directory / "recipients.csv", recipients)
        (self._directory / "newsletter.html").write_text(demo_content.HTML, encoding="utf-8")
        (self._directory / "newsletter.txt").write_text(demo_content.TEXT, encoding="utf-8")
        ready, listing = await asyncio.gather(supervisor.start(), writing)
        async with open_stores(self._settings, self._backends) as stores:
            sink = ApiClient(f"http://{ready['sink']['http']}/api/v1")
            api = ApiClient(f"http://127.0.0.1:{self._settings.control.port}/api/v1", stores.admin_key)
            say(f"ready after {time.monotonic() - self._began:.1f} s: {engines} engine{'s' if engines > 1 else ''}, API, sink")
            campaign = _Campaign(stores, api, sink, listing, ready["sink"]["smtp"])
            await campaign.prepare()
            await campaign.send()
            result, lines, clean = await campaign.count()
        if as_json:
            write_json(result)
        else:
            summary(lines)
            gone = "" if stay else "   (gone now; --stay keeps it)"
            control = f"http://127.0.0.1:{self._settings.control.port}"
            summary([
                ("", "", ""),
                ("Console", f"{control}/{gone or f'   (sign in with the key in {load.admin_key_path(self._settings)})'}", ""),
                ("Mailbox", f"http://{ready['sink']['http']}/{gone}", ""),
                ("API", f"{control}/docs{gone}", ""),
                ("Accounting", str(load.accounting_path(self._settings).parent), ""),
                ("Logs", str(self._directory / "log"), ""),
            ])  # fmt: skip
        return OK if clean else FAILED


class _Campaign:
    """One campaign from the list to the counts."""

    def __init__(self, stores: Stores, api: ApiClient, sink: ApiClient, listing: demo_content.DemoList, smtp: str) -> None:
        self._stores = stores
        self._api = api
        self._sink = sink
        self._listing = listing
        self._smtp_host, _, port = smtp.rpartition(":")
        self._smtp_port = int(port)
        self._id = 0
        self._before: dict[str, tuple[float, int]] = {}
        self._attempts_before = 0
        self._report: ImportReport
        self._progress: dict[str, Any] = {}

    async def prepare(self) -> None:
        """List, recipients, suppressions, delivery server and draft. Everything but the import goes through the HTTP API."""
        stamp = f"{datetime.now():%Y-%m-%d %H:%M:%S}"  # names are unique, and stores that are no demo's own may hold an earlier run
        made = await self._api.post(
            "/lists", {"name": f"Demo {stamp}", "sender_name": "Slow Post", "sender_email": "letter@slowpost.example"}
        )
        self._report = await cli_lists.import_file(self._stores, made["id"], self._listing.path, "csv")
        say(f"imported {self._report.imported:,} of {self._report.rows:,} rows, {self._report.refused:,} refused")
        gone = self._listing.suppressed
        for start in range(0, len(gone), 5000):
            wanted = {"emails": gone[start : start + 5000], "scope": "list", "list_id": made["id"], "note": "asked by telephone"}
            await self._api.post("/suppressions", wanted)
        server = await self._api.post(
            "/delivery-servers",
            {
                "name": f"Demo sink {stamp}",
                "host": self._smtp_host,
                "port": self._smtp_port,
                "security": "none",
                "mfrom": "bounces.slowpost.example",
                "limits": {"max_connections": _CONNECTIONS, "retry_schedule_seconds": _RETRY_SCHEDULE_SECONDS},
            },
        )
        campaign = await self._api.post(
            "/campaigns",
            {
                "name": f"Slow Post No. 12 ({stamp})",
                "list_id": made["id"],
                "delivery_server_id": server["id"],
                "subject": demo_content.SUBJECT,
                "from_name": "Slow Post",
                "from_email": "letter@slowpost.example",
                "html": demo_content.HTML,
                "text": demo_content.TEXT,
            },
        )
        self._id = campaign["id"]

    async def send(self) -> None:
        """Start the campaign and wait for its end. Raises Unavailable when nothing moves any more."""
        self._before = await self._engines()
        self._attempts_before = sum(messages for _, messages in self._before.values())
        await self._api.post(f"/campaigns/{self._id}/start")
        moved, last = time.monotonic(), -1
        with Progress() as progress:
            while True:
                self._progress = await self._api.get(f"/campaigns/{self._id}/progress")
                found = self._progress
                ended = found["recipients"] - found["queued"]
                progress.update(found["recipients"], ended, f"{found['delivered']:,} delivered, {found['deferrals']:,} deferrals")
                if found["state"] in (states.COMPLETED, states.CANCELLED):
                    return
                if ended + found["deferrals"] != last:
                    moved, last = time.monotonic(), ended + found["deferrals"]
                elif time.monotonic() - moved > _QUIET_SECONDS:
                    raise Unavailable(await self._why_stuck())
                await asyncio.sleep(_POLL_SECONDS)

    async def _why_stuck(self) -> str:
        found = await status.gather(self._stores.pool, self._stores.redis)
        said = "; ".join(found.trouble) or "nothing reports trouble"
        return f"no recipient got anywhere for {_QUIET_SECONDS:g} s ({said}); the logs of the processes say more"

    async def _engines(self) -> dict[str, tuple[float, int]]:
        """CPU seconds and attempts of each engine so far, from its heartbeat."""
        found = await status.gather(self._stores.pool, self._stores.redis)
        return {engine.id: (engine.cpu_seconds, engine.messages) for engine in found.engines}

    async def _cpu_us_per_message(self, attempts: int) -> float:
        """Engine CPU over the campaign divided by its attempts. Heartbeats come every second, so the last one is waited for."""
        end = time.monotonic() + 3 * _HEARTBEAT_SECONDS
        while True:
            after = await self._engines()
            messages = sum(count for _, count in after.values()) - self._attempts_before
            if messages >= attempts or time.monotonic() > end:
                break
            await asyncio.sleep(0.1)
        seconds = sum(cpu - self._before.get(name, (0.0, 0))[0] for name, (cpu, _) in after.items())
        return round(seconds * 1e6 / messages, 1) if messages > 0 else 0.0

    async def count(self) -> tuple[Result, list[Line], bool]:
        """What became of everybody, by the ledger and by the sink; whether the two agree and the audit is clean."""
        pool, found, report = self._stores.pool, self._progress, self._report
        audit = await accounting.audit(pool, self._id)
        counters = await self._sink.get("/counters")
        accepted, duplicates = counters["verdicts"]["accepted"], counters["duplicates"]
        started, finished = (datetime.fromisoformat(found[name]) for name in ("started_at", "finished_at"))
        seconds = max((finished - started).total_seconds(), 0.001)
        result = Result(
            imported=report.imported + report.updated,
            refused=report.refused,
            delivered=audit.delivered,
            bounced=audit.bounced,
            deferred_then_delivered=await accounting.delivered_after_deferral(pool, self._id),
            suppressed=audit.suppressed,
            expired=audit.expired,
            sink_accepted=accepted - duplicates,
            lost=max(0, audit.delivered - (accepted - duplicates)),
            duplicates=duplicates,
            messages_per_second=round(audit.delivered / seconds, 1),
            engine_cpu_us_per_message=await self._cpu_us_per_message(audit.delivered + audit.bounced + found["deferrals"]),
            seconds=round(seconds, 3),
        )
        lines: list[Line] = [("", "", ""), ("Imported", result.imported, f"of {report.rows:,} rows"), ("Refused", result.refused, "")]
        reasons = [(f"{refusal.field or 'row'}: {refusal.reason.split(' of row ')[0]}"[:70], refusal.row) for refusal in report.refusals]
        kinds = Counter(reason for reason, _ in reasons)
        first = dict(reversed(reasons))
        lines += [("", count, f"{reason} (first: row {first[reason]:,})") for reason, count in kinds.most_common()]
        agree = result.sink_accepted == result.delivered
        lines += [
            ("Delivered", result.delivered, ""),
            ("", result.deferred_then_delivered, "of them after one or two deferrals"),
            ("Bounced", result.bounced, ""),
            ("Suppressed", result.suppressed, ""),
            ("Expired", result.expired, ""),
            ("Sink accepted", result.sink_accepted, f"lost {result.lost:,}, duplicates {result.duplicates:,}"),
            ("Audit", "clean" if audit.clean else "NOT CLEAN", "every recipient has exactly one end" if audit.clean else repr(audit)),
            ("Messages/s", result.messages_per_second, f"over {seconds:.1f} s, the pauses before retries among them"),
            ("Engine CPU", result.engine_cpu_us_per_message, "µs per message, start and waiting included"),
        ]
        return result, lines, audit.clean and agree
