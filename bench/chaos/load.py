"""The mail of one run: four campaigns with addresses nobody else uses, and what the sinks say they accepted of it.

An address names its load, its delivery server and its number (`l7.2.1234@people.example`), so copies that arrive late are still
known, and a script of a sink can pick its victims by pattern.
"""

import asyncio
import os
import re
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from domain import states

if TYPE_CHECKING:
    from bench.chaos.fleet import Fleet
    from store.postgres import Pool

DOMAIN: Final = "people.example"
_BODY_OCTETS: Final = 3300  # with headers and its HTML twin a message is about 5 kB
_SENTENCE: Final = "The ferry leaves at nine from the second pier, and whoever has a letter for the island gives it to the steersman. "
_ADDRESS: Final = re.compile(r"l(\d+)\.\d+\.\d+@")
_HISTORY_SECONDS: Final = 120.0


class Accepted(msgspec.Struct):
    """One line of a sink's accepted log."""

    message_id: str
    recipient: str


_decode = msgspec.json.Decoder(Accepted).decode


class AcceptedLog:
    """Follows one accepted log from its present end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = path.stat().st_size if path.exists() else 0
        self._rest = b""

    def read(self) -> list[Accepted]:
        """What has been appended since the last call, whole lines only."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(data)
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        return [_decode(line) for line in lines if line]


class Copies:
    """Everything the sinks accepted, by load and recipient, and when."""

    def __init__(self, logs: Iterable[AcceptedLog]) -> None:
        self._logs = list(logs)
        self.by_load: dict[int, dict[str, list[str]]] = {}  # load -> recipient -> Message-ID of each copy
        self.total = 0
        self._history: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Follow the logs until `stop`."""
        self._task = asyncio.create_task(self._follow(), name="accepted logs")

    async def stop(self) -> None:
        """Read the rest and stop."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self.read()

    async def _follow(self) -> None:
        while True:
            self.read()
            await asyncio.sleep(0.05)

    def read(self) -> None:
        """Take in what is new."""
        for log in self._logs:
            for line in log.read():
                found = _ADDRESS.match(line.recipient)
                if found is not None:
                    self.by_load.setdefault(int(found[1]), {}).setdefault(line.recipient, []).append(line.message_id)
                    self.total += 1
        now = time.monotonic()
        self._history.append((now, self.total))
        while now - self._history[0][0] > _HISTORY_SECONDS and len(self._history) > 2:
            self._history.popleft()

    def of(self, load: int) -> dict[str, list[str]]:
        """Copies of one load."""
        return self.by_load.get(load, {})

    def at(self, moment: float) -> int:
        """How many copies had been accepted by then."""
        count = 0
        for at, total in self._history:
            if at > moment:
                break
            count = total
        return count

    def rate(self, start: float, end: float) -> float:
        """Copies a second between two moments."""
        return (self.at(end) - self.at(start)) / (end - start) if end > start else 0.0

    def back_at(self, since: float, until: float, wanted: float) -> float | None:
        """The first moment after `since` from which a whole second ran at `wanted` copies a second; None: never before `until`."""
        moments = [at for at, _ in self._history if since <= at <= until - 1.0]
        return next((at for at in moments if self.rate(at, at + 1.0) >= wanted), None)

    def next_after(self, since: float) -> float | None:
        """The first moment after `since` at which a copy more was there."""
        before = self.at(since)
        return next((at for at, total in self._history if at > since and total > before), None)


class Load:
    """Four campaigns, one per delivery server."""

    def __init__(self, number: int, recipients: int) -> None:
        self.number = number
        self.recipients = recipients
        self.campaigns: list[int] = []

    def addresses(self, servers: int) -> list[str]:
        """Everybody who must come to an end."""
        return [f"l{self.number}.{server}.{n}@{DOMAIN}" for server in range(servers) for n in range(1, self._share(server, servers) + 1)]

    def _share(self, server: int, servers: int) -> int:
        whole, rest = divmod(self.recipients, servers)
        return whole + (1 if server < rest else 0)

    async def seed(self, fleet: "Fleet", *, state: str = states.PREPARING) -> None:
        """Put lists, subscribers and campaigns into the tables; in state `draft` they wait to be started over the API."""
        text = "Dear {{ subscriber.first_name }},\n\n" + "\n".join(_lines(_BODY_OCTETS // 3))
        html = "<p>Dear {{ subscriber.first_name }},</p>\n" + "\n".join(f"<p>{line}</p>" for line in _lines(_BODY_OCTETS * 2 // 3))
        for index, server in enumerate(fleet.server_ids):
            name = f"load {self.number} by {fleet.directory.name} {index}"
            listing = await fleet.pool.fetchval("insert into lists (user_id, name) values ($1, $2) returning id", fleet.user_id, name)
            await fleet.pool.execute(
                "insert into subscribers (user_id, list_id, email, email_key, data) "
                "select $1, $2, a, a, json_build_object('first_name', 'Ada ' || n) "
                "from (select n, 'l' || $4::text || n || '@' || $5::text as a from generate_series(1, $3::int) n) s",
                fleet.user_id, listing, self._share(index, len(fleet.server_ids)), f"{self.number}.{index}.", DOMAIN, timeout=120,
            )  # fmt: skip
            self.campaigns.append(
                await fleet.pool.fetchval(
                    "insert into campaigns "
                    "(user_id, name, state, list_id, delivery_server_id, subject, from_email, text, html, started_at) "
                    "values ($1, $2, $3, $4, $5, 'Letters from the island', 'news@sender.example', $6, $7, "
                    "case when $3 = 'draft' then null else now() end) returning id",
                    fleet.user_id, name, state, listing, server, text, html,
                )
            )  # fmt: skip

    async def completed(self, pool: "Pool") -> bool:
        """Whether all four have ended."""
        return bool(await pool.fetchval("select bool_and(state = 'completed') from campaigns where id = any($1)", self.campaigns))

    async def records(self, pool: "Pool") -> list[tuple[str, str, str]]:
        """Every accounting record: kind, address, diagnostic."""
        rows = await pool.fetch(
            "select kind::text, recipient, diagnostic from accounting where campaign_id = any($1)", self.campaigns, timeout=120
        )
        return [(row[0], row[1], row[2]) for row in rows]


def _lines(octets: int) -> list[str]:
    return [_SENTENCE] * max(1, octets // len(_SENTENCE))


def free_octets(directory: Path) -> int:
    """What is left on a file system."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize
