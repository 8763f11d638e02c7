"""Faults of delivery servers played to a real engine by real sinks, many at once, and the verdict on each.

Every fault has a delivery server and a campaign of its own, once for each way of speaking (BDAT, DATA, lock-step), all in one engine.
Of the recipients of a campaign every seventh is *picked*: the sink treats it by the fault's rule, the others as usual. The verdict
compares what the sink logged as accepted, before it replied, with what the ledger says.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from email import message_from_bytes
from pathlib import Path
from typing import Any, Final

import aiohttp
import asyncpg

from store import accounting, batch_queue, status
from store.postgres import Pool, open_pool
from tests import machine as machines
from tests.machine import Machine
from tests.peers import Peer

MODES: Final[dict[str, dict[str, object]]] = {"bdat": {}, "data": {"chunking": False}, "lock-step": {"pipelining": False}}
RECIPIENTS = 70
PICK_EVERY = 7
PATIENCE_SECONDS: Final = 4.0  # of the engine with a silent server: an honest one that six hundred connections keep busy answers sooner
LIMITS: Final[dict[str, object]] = {
    "max_connections": 4, "command_timeout_seconds": PATIENCE_SECONDS, "final_dot_timeout_seconds": PATIENCE_SECONDS,
    "retry_schedule_seconds": [1.0],
}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What the sink does to picked recipients. `times`: to the first so many tries of each; 0 = always."""

    name: str
    stage: str = "rcpt"
    action: str = "reply"
    reply: str = ""
    times: int = 1
    rule: dict[str, object] = field(default_factory=dict)
    limits: dict[str, object] = field(default_factory=dict)
    recipients: int = RECIPIENTS
    picked: int = RECIPIENTS // PICK_EVERY
    modes: Sequence[str] = tuple(MODES)

    def rules(self) -> list[dict[str, object]]:
        """The sink's rule for it."""
        rule = {
            "stage": self.stage,
            "action": self.action,
            "times": self.times,
            "recipient": f"*@*.{self.name}.picked.example",
            **self.rule,
        }
        if self.reply:
            rule["reply"] = self.reply
        return [rule]


@dataclass
class Verdict:
    """What became of one campaign. Recipients are addresses; `kinds` are the letters of their records in order.

    `ids`: recipient -> Message-ID -> copies the sinks took.
    """

    state: str
    clean: bool
    audit: str
    kinds: dict[str, str]
    ids: dict[str, Counter[str]]
    diagnostics: dict[str, list[str]]
    sentences: list[str]
    seconds: float

    @property
    def copies(self) -> Counter[str]:
        """How many copies each recipient has got."""
        return Counter({email: sum(ids.values()) for email, ids in self.ids.items()})

    @property
    def picked(self) -> dict[str, str]:
        """Records of the picked recipients."""
        return {email: kinds for email, kinds in self.kinds.items() if email.endswith(".picked.example")}

    @property
    def others(self) -> dict[str, str]:
        """Records of everybody else."""
        return {email: kinds for email, kinds in self.kinds.items() if not email.endswith(".picked.example")}

    @property
    def lost(self) -> list[str]:
        """Who has no end."""
        return [email for email, kinds in self.kinds.items() if not set(kinds) & set("dbxs")]

    @property
    def false_delivered(self) -> list[str]:
        """Delivered in the ledger, and the sink never took a copy."""
        return [email for email, kinds in self.kinds.items() if "d" in kinds and not self.copies[email]]

    @property
    def unexplained(self) -> list[str]:
        """More copies than the ledger announced, or copies that a receiver could not tell to be the same message (P4)."""
        return [
            email
            for email, ids in self.ids.items()
            if len(ids) > 1 or "" in ids or sum(ids.values()) - 1 > self.kinds.get(email, "").count("u")
        ]

    def must_hold(self, *, bounced: bool = False, expired: bool = False) -> None:
        """P1, P2, P4, P5, and that nobody suffers for another's fault.

        `bounced`: the picked ones are refused for good. `expired`: who is in doubt may end as expired.
        """
        assert self.state == "completed", (self.state, self.sentences)
        assert self.clean, self.audit
        assert not self.lost
        assert not self.false_delivered
        assert not self.unexplained
        wrong = {email: kinds for email, kinds in self.others.items() if kinds[-1:] != "d" and not (expired and kinds[-1:] == "x")}
        assert not wrong, f"others than the picked ones: {wrong}"
        assert {email: kinds for email, kinds in self.kinds.items() if "b" in kinds and email not in (self.picked if bounced else {})} == {}

    def none_uncertain(self) -> None:
        """The fault is before the end of the content: no `u` record for anybody."""
        assert {email: kinds for email, kinds in self.kinds.items() if "u" in kinds} == {}


async def add_campaign(
    pool: Pool, fault: Fault, mode: str, port: int, *, host: str = "127.0.0.1", state: str = "preparing", text: str = "Hello",
) -> int:  # fmt: skip
    """A delivery server and a campaign for it."""
    user = await pool.fetchval("select id from users limit 1") or await pool.fetchval("insert into users (name) values ('u') returning id")
    name = f"{fault.name} {mode}"
    server = await pool.fetchval(
        "insert into delivery_servers (user_id, name, host, port, security, mfrom, limits, connect_timeout_seconds) "
        "values ($1, $2, $3, $4, 'none', $5, $6::text::jsonb, $7) returning id",
        user, name, host, port, f"{fault.name}.sender.example", json.dumps({**LIMITS, **MODES[mode], **fault.limits}), PATIENCE_SECONDS,
    )  # fmt: skip
    await pool.execute("update egress_version set version = version + 1")
    mailing_list = await pool.fetchval("insert into lists (user_id, name) values ($1, $2) returning id", user, name)
    await pool.execute(
        "insert into subscribers (user_id, list_id, email, email_key, data) select $1, $2, e, e, '{}' from ("
        "select 'p' || n || '@' || $4 || case when n % $5 = 3 and n / $5 < $6 then '.picked.example' else '.other.example' end as e "
        "from generate_series(1, $3::int) n) as made",
        user, mailing_list, fault.recipients, f"{mode}.{fault.name}", max(1, fault.recipients // max(1, fault.picked)), fault.picked,
    )  # fmt: skip
    return int(await pool.fetchval(
        "insert into campaigns (user_id, name, state, list_id, delivery_server_id, subject, from_email, text, html, started_at) "
        "values ($1, $2, $3, $4, $5, 'Hello', 'news@sender.example', $6, '', now()) returning id",
        user, name, state, mailing_list, server, text,
    ))  # fmt: skip


async def end_of(pool: Pool, campaigns: Sequence[int], seconds: float) -> None:
    """Wait until all of them have ended, or the time is over: `seconds`, or a minute and a half on a busy machine."""
    limit = asyncio.get_running_loop().time() + max(seconds, machines.PATIENCE_SECONDS)
    while asyncio.get_running_loop().time() < limit:
        if not await pool.fetchval("select count(*) from campaigns where id = any($1) and state <> 'completed'", list(campaigns)):
            return
        await asyncio.sleep(0.1)


async def verdict(pool: Pool, campaign: int, copies: Counter[tuple[str, str]], sentences: Sequence[str] = ()) -> Verdict:
    """Read the ledger of one campaign. `copies`: accepted by the sinks, (recipient, Message-ID), for any recipient."""
    rows = await pool.fetch(
        "select recipient, kind::text as kind, diagnostic from accounting where campaign_id = $1 order by at, kind = 'u' desc", campaign
    )
    emails = await pool.fetch("select s.email from subscribers s join campaigns c using (list_id) where c.id = $1", campaign)
    kinds = {row["email"]: "" for row in emails}
    diagnostics: dict[str, list[str]] = {}
    for row in rows:
        kinds[row["recipient"]] += row["kind"]
        diagnostics.setdefault(row["recipient"], []).append(row["diagnostic"])
    audit = await accounting.audit(pool, campaign)
    campaign_row = await pool.fetchrow(
        "select state, extract(epoch from coalesce(finished_at, now()) - started_at)::float as seconds from campaigns where id = $1",
        campaign,
    )
    assert campaign_row is not None
    ids: dict[str, Counter[str]] = {email: Counter() for email in kinds}
    for (email, message_id), count in copies.items():
        if email in ids:
            ids[email][message_id] += count
    every = [message_id for found in ids.values() for message_id in found]
    assert len(every) == len(set(every)), "two recipients have the same Message-ID"
    state, seconds = campaign_row["state"], campaign_row["seconds"]
    return Verdict(state, audit.clean, str(audit), kinds, ids, diagnostics, list(sentences), seconds)


def accepted(*logs: Path) -> Counter[tuple[str, str]]:
    """How many copies the sinks took: (recipient, Message-ID)."""
    lines = [json.loads(line) for log in logs if log.exists() for line in log.read_text().splitlines()]
    return Counter((line["recipient"], line["message_id"]) for line in lines)


def taken(peer: Peer) -> Counter[tuple[str, str]]:
    """The same of a scripted peer."""
    return Counter((message.rcpt, message_id(message.content)) for message in peer.accepted)


def message_id(content: bytes) -> str:
    """Of a message; empty when it has none."""
    return (message_from_bytes(content)["Message-ID"] or "").strip()


async def sentences(pool: Pool, redis_url: str, after: float = 0.0) -> dict[str, tuple[str, str]]:
    """What `sluice status` says of each delivery server: name -> (state, sentence); from heartbeats behind `after` (POSIX seconds)."""
    client = batch_queue.connect(redis_url, 5.0)
    try:
        async with asyncio.timeout(machines.PATIENCE_SECONDS):
            while True:
                found = await status.gather(pool, client)
                if all(engine.at > after for engine in found.engines):
                    return {server.name: (server.state, server.sentence) for server in found.delivery_servers}
                await asyncio.sleep(0.1)
    finally:
        await client.aclose()


class Sink:
    """A sink of its own log, with rules."""

    def __init__(self, port: int, http: str, log: Path) -> None:
        self.port = port
        self.http = http
        self.log = log

    async def rules(self, rules: Sequence[dict[str, Any]]) -> None:
        """Replace the rules while it runs."""
        async with aiohttp.ClientSession() as session, session.put(self.http + "/api/v1/script", json={"rule": list(rules)}) as answer:
            assert answer.status == 200, await answer.text()


async def start_sink(machine: Machine, name: str, rules: Sequence[dict[str, Any]] = (), *options: str) -> Sink:
    """Start one; words in addresses mean nothing to it."""
    log = machine.directory / f"{name}.jsonl"
    process = await machine.start(
        name, "bench.sink", "--port", "0", "--http-port", "0", "--no-tokens", "--keep", "1", "--accepted", str(log),
        "--accepted-before-reply", *options,
    )  # fmt: skip
    sink = Sink(int(process.ready["smtp"].rpartition(":")[2]), "http://" + process.ready["http"], log)
    if rules:
        await sink.rules(rules)
    return sink


async def play(machine: Machine, database_url: str, faults: Sequence[Fault], seconds: float) -> dict[tuple[str, str], Verdict]:
    """Play all faults in all their modes to one engine; (name, mode) -> verdict."""
    rules = [rule for fault in faults for rule in fault.rules()]
    sink, _ = await asyncio.gather(start_sink(machine, "sink", rules), machine.engine())
    pool = await open_pool(database_url, 4)
    try:
        campaigns = {(fault.name, mode): await add_campaign(pool, fault, mode, sink.port) for fault in faults for mode in fault.modes}
        await end_of(pool, list(campaigns.values()), seconds)
        words = await sentences(pool, machine.environment["SLUICE_REDIS_URL"], time.time())  # the last ones may be of before the end
        copies = accepted(sink.log)
        return {key: await verdict(pool, campaign, copies, words.get(" ".join(key), ("no", "word"))) for key, campaign in campaigns.items()}
    except (AssertionError, OSError, asyncpg.PostgresError) as error:
        raise AssertionError(f"{error}\n{machine.words()}") from error
    finally:
        await pool.close()
