"""kill -9 of an engine in the middle of a campaign: nothing lost, duplicates bounded and named (P1-P4)."""

import asyncio
import json
import signal
from collections import Counter
from pathlib import Path

import pytest

from store import accounting
from store.postgres import Pool
from tests.machine import Machine, campaign_state, until
from tests.store import seed

CONNECTIONS = 10
WINDOW = 4  # the default BDAT window


def accepted(file: Path) -> Counter[tuple[str, str]]:
    """What the sink took: (Message-ID, recipient) -> copies."""
    lines = (json.loads(line) for line in file.read_text().splitlines())
    return Counter((line["message_id"], line["recipient"]) for line in lines)


async def begun(machine: Machine, messages: int) -> None:
    async def enough() -> bool:
        return bool((await machine.sink_json("/api/v1/counters"))["messages"] > messages)

    await until(enough, f"{messages} messages sent", 60.0, machine)


async def reconcile(machine: Machine, pool: Pool, campaign: int, recipients: int, most_duplicates: int) -> None:
    """The campaign ends, its ledger is clean, and the sink agrees: no message missing, every second copy announced."""

    async def is_completed() -> bool:
        return await campaign_state(pool, campaign) == "completed"

    await until(is_completed, "campaign completed", 120.0, machine)
    found = await accounting.audit(pool, campaign)
    assert found.clean, found
    assert (found.input, found.delivered, found.queued) == (recipients, recipients, 0), found
    copies = accepted(machine.directory / "accepted.jsonl")
    assert len(copies) == recipients, "lost"
    doubled = {recipient for (_, recipient), count in copies.items() if count > 1}
    assert sum(copies.values()) - len(copies) <= most_duplicates
    announced = await pool.fetch("select distinct recipient from accounting where campaign_id = $1 and kind = 'u'", campaign)
    assert doubled <= {row["recipient"] for row in announced}, "a second copy that no `u` record announced"


@pytest.mark.parametrize("chunking", [True, False], ids=["bdat", "data"])
async def test_the_other_engine_finishes_what_a_killed_one_began(machine: Machine, pool: Pool, chunking: bool) -> None:
    options = ["--accepted", str(machine.directory / "accepted.jsonl"), "--accepted-before-reply", "--reply-delay", "2"]
    await machine.sink(*options, *([] if chunking else ["--no-chunking"]))
    engines = [await machine.engine(0), await machine.engine(1)]
    campaign = await seed.campaign(pool, recipients=20_000, port=machine.sink_port, limits={"max_connections": CONNECTIONS})
    await begun(machine, 4000)
    engines[1].kill(signal.SIGKILL)
    await reconcile(machine, pool, campaign, 20_000, CONNECTIONS // 2 * (WINDOW if chunking else 1))
    assert await pool.fetchval("select count(*) from engines where stopped_at is not null") == 1


async def test_all_engines_killed_at_once_and_a_new_one_takes_over(machine: Machine, pool: Pool) -> None:
    await machine.sink("--accepted", str(machine.directory / "accepted.jsonl"), "--accepted-before-reply", "--reply-delay", "2")
    engines = [await machine.engine(0), await machine.engine(1)]
    campaign = await seed.campaign(pool, recipients=12_000, port=machine.sink_port, limits={"max_connections": CONNECTIONS})
    await begun(machine, 3000)
    for engine in engines:
        engine.kill(signal.SIGKILL)
    await asyncio.gather(*(engine.process.wait() for engine in engines))
    await machine.engine(2)
    await reconcile(machine, pool, campaign, 12_000, CONNECTIONS * WINDOW)
    assert [path.name for path in (machine.directory / "journal").iterdir() if ".2." not in path.name] == []


async def test_a_campaign_survives_five_kills(machine: Machine, pool: Pool) -> None:
    await machine.sink("--accepted", str(machine.directory / "accepted.jsonl"), "--accepted-before-reply", "--reply-delay", "2")
    campaign = await seed.campaign(pool, recipients=15_000, port=machine.sink_port, limits={"max_connections": CONNECTIONS})
    for kill in range(5):
        engine = await machine.engine(kill)
        await begun(machine, 2000 * (kill + 1))
        engine.kill(signal.SIGKILL)
        await engine.process.wait()
    await machine.engine(5)
    await reconcile(machine, pool, campaign, 15_000, 5 * CONNECTIONS * WINDOW)
