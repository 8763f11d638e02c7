"""A campaign from the tables to the socket of a sink and back into the ledger, with real processes."""

import asyncio
import csv
import email
import email.policy
from collections import Counter
from pathlib import Path

from store import accounting, batch_queue
from store.postgres import Pool
from tests.machine import Machine, campaign_state, until
from tests.peers import Peer
from tests.store import seed

CLEAN = {"missing": 0, "multiple_terminal": 0, "disagreeing": 0}


async def audit(pool: Pool, campaign: int) -> dict[str, int]:
    found = await accounting.audit(pool, campaign)
    return {name: getattr(found, name) for name in found.__struct_fields__}


async def start(pool: Pool, campaign: int) -> None:
    """What the API's start does; what a test changes before is what is numbered."""
    await pool.execute("update campaigns set state = 'preparing' where id = $1", campaign)


async def completed(machine: Machine, pool: Pool, campaign: int, seconds: float = 60.0) -> None:
    async def is_completed() -> bool:
        return await campaign_state(pool, campaign) == "completed"

    await until(is_completed, f"campaign {campaign} completed", seconds, machine)


async def test_every_recipient_gets_one_personal_message_and_one_record(machine: Machine, pool: Pool) -> None:
    await machine.sink()
    await machine.engine()
    campaign = await seed.campaign(
        pool,
        recipients=1203,
        port=machine.sink_port,
        html="<p>Hello {{ subscriber.first_name }}</p>",
        subject="To {{ subscriber.first_name }}",
    )
    await completed(machine, pool, campaign)
    found = await audit(pool, campaign)
    assert found | CLEAN == found
    assert (found["input"], found["delivered"], found["queued"], found["possible_duplicates"]) == (1203, 1203, 0, 0)
    counters = await machine.sink_json("/api/v1/counters")
    assert counters["messages"] == 1203
    messages = (await machine.sink_json("/api/v1/messages?limit=500"))["messages"]
    source = await machine.sink_bytes(f"/api/v1/messages/{messages[0]['id']}/source")
    message = email.message_from_bytes(source, policy=email.policy.default)
    number = message["To"].removeprefix("p").partition("@")[0]
    assert message["Subject"] == f"To Ada {number}"
    text, html = message.get_body(("plain",)), message.get_body(("html",))
    assert text is not None
    assert text.get_content().strip() == f"Hello Ada {number}"
    assert html is not None
    assert html.get_content().strip() == f"<p>Hello Ada {number}</p>"
    assert message["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"


async def test_accounting_files_hold_one_line_per_record_with_the_23_columns(machine: Machine, pool: Pool) -> None:
    await machine.sink()
    engine = await machine.engine()
    campaign = await seed.campaign(pool, recipients=40, port=machine.sink_port, limits={"retry_schedule_seconds": [0.5]}, state="draft")
    await pool.execute("update subscribers set email = 'bounce+' || id || '@people.example' where id % 10 = 0")
    await pool.execute("update subscribers set email = 'defer1+' || id || '@people.example' where id % 10 = 1")
    await start(pool, campaign)
    await completed(machine, pool, campaign)
    assert await engine.stop() == 0, machine.words()
    files = sorted((machine.directory / "accounting").glob("acct-????-??-??-????.csv"))
    rows = [row for file in files for row in csv.DictReader(file.open(encoding="utf-8", newline=""))]
    assert len(next(csv.reader(files[0].open(encoding="utf-8", newline="")))) == 23
    assert Counter(row["type"] for row in rows) == {"d": 36, "b": 4, "t": 4}
    bounced = next(row for row in rows if row["type"] == "b")
    assert bounced["bounceCat"] == "bad-mailbox"
    assert bounced["dsnDiag"].startswith("smtp;550 5.1.1")
    assert bounced["dsnStatus"].startswith("5.1.1 (")
    delivered = next(row for row in rows if row["type"] == "d")
    assert delivered["dlvSourceIp"] == delivered["dlvDestinationIp"] == "127.0.0.1"
    assert int(delivered["dlvSize"]) > 300
    assert "PIPELINING" in delivered["dlvEsmtpAvailable"].split(",")


async def test_deferred_bounced_and_suppressed_recipients_end_as_they_should(machine: Machine, pool: Pool) -> None:
    await machine.sink()
    await machine.engine()
    campaign = await seed.campaign(
        pool, recipients=300, port=machine.sink_port, limits={"retry_schedule_seconds": [0.3, 0.5]}, state="draft"
    )
    await pool.execute("update subscribers set email = 'defer2+' || id || '@people.example' where id % 10 = 0")
    await pool.execute("update subscribers set email = 'bounce+' || id || '@people.example' where id % 10 = 1")
    await pool.execute(
        "insert into suppressions (user_id, email_key, reason) select user_id, lower(email), 'manual' from subscribers where id % 10 = 2"
    )
    await start(pool, campaign)
    await completed(machine, pool, campaign)
    found = await audit(pool, campaign)
    assert found | CLEAN == found
    assert (found["delivered"], found["bounced"], found["suppressed"]) == (240, 30, 30)
    deferrals = await pool.fetchval("select count(*) from accounting where campaign_id = $1 and kind = 't'", campaign)
    assert deferrals == 60
    assert (await machine.sink_json("/api/v1/counters"))["messages"] == 240


async def test_a_recipient_that_stays_deferred_expires(machine: Machine, pool: Pool) -> None:
    await machine.sink()
    await machine.engine()
    campaign = await seed.campaign(
        pool, recipients=5, port=machine.sink_port, limits={"retry_schedule_seconds": [0.5], "max_age_seconds": 1.2}, state="draft"
    )
    await pool.execute("update subscribers set email = 'defer99+' || id || '@people.example'")
    await start(pool, campaign)
    await completed(machine, pool, campaign)
    found = await audit(pool, campaign)
    assert (found["expired"], found["queued"]) == (5, 0)
    assert found | CLEAN == found


async def test_merge_data_that_could_break_a_header_stops_only_that_recipient(machine: Machine, pool: Pool) -> None:
    await machine.sink()
    await machine.engine()
    campaign = await seed.campaign(pool, recipients=20, port=machine.sink_port, subject="To {{ subscriber.first_name }}", state="draft")
    await pool.execute("""update subscribers set data = '{"first_name": "Eve\\r\\nBcc: victim@other.example"}' where id % 10 = 0""")
    await start(pool, campaign)
    await completed(machine, pool, campaign)
    found = await audit(pool, campaign)
    assert (found["delivered"], found["expired"]) == (18, 2)
    said = await pool.fetch("select diagnostic from accounting where campaign_id = $1 and kind = 'x'", campaign)
    assert all("subject" in row["diagnostic"] for row in said)


async def test_a_paused_campaign_stops_and_goes_on_when_resumed(machine: Machine, pool: Pool) -> None:
    await machine.sink()
    await machine.engine()
    campaign = await seed.campaign(pool, recipients=3000, port=machine.sink_port, limits={"max_messages_per_second": 600})

    async def sent() -> int:
        return int((await machine.sink_json("/api/v1/counters"))["messages"])

    async def begun() -> bool:
        return await sent() > 300

    await until(begun, "sending begun", 60.0, machine)
    await set_state(machine, pool, campaign, "paused")

    async def handed_back() -> bool:  # so another engine could go on
        return not await pool.fetchval("select count(*) from batches where campaign_id = $1 and owner is not null", campaign)

    await until(handed_back, "every batch is handed back", 10.0, machine)
    stopped_at = await sent()
    await asyncio.sleep(1.0)
    assert await sent() == stopped_at < 3000
    await set_state(machine, pool, campaign, "running")
    await completed(machine, pool, campaign)
    assert await sent() == 3000
    found = await audit(pool, campaign)
    assert found | CLEAN | {"delivered": 3000} == found


async def test_cancelling_ends_what_is_left_as_cancelled(machine: Machine, pool: Pool) -> None:
    await machine.sink()
    await machine.engine()
    campaign = await seed.campaign(pool, recipients=5000, port=machine.sink_port, limits={"max_messages_per_second": 500})

    async def begun() -> bool:
        return bool((await machine.sink_json("/api/v1/counters"))["messages"] > 200)

    await until(begun, "sending begun", 60.0, machine)
    await set_state(machine, pool, campaign, "cancelling")

    async def cancelled() -> bool:
        return await campaign_state(pool, campaign) == "cancelled"

    await until(cancelled, "campaign cancelled", 60.0, machine)
    found = await audit(pool, campaign)
    sent = (await machine.sink_json("/api/v1/counters"))["messages"]
    assert found | CLEAN | {"delivered": sent, "cancelled": 5000 - sent, "queued": 0} == found
    assert 200 < sent < 5000


async def set_state(machine: Machine, pool: Pool, campaign: int, state: str) -> None:
    """As the API does it: the table, then the word on the channel."""
    await pool.execute("update campaigns set state = $2 where id = $1", campaign, state)
    client = batch_queue.connect(machine.environment["SLUICE_REDIS_URL"], 5.0)
    await batch_queue.publish_change(client, "campaigns")
    await client.aclose()


async def test_sigterm_hands_everything_back_without_a_duplicate(machine: Machine, pool: Pool, tmp_path: Path) -> None:
    await machine.sink()
    engine = await machine.engine()
    campaign = await seed.campaign(pool, recipients=4000, port=machine.sink_port, limits={"max_messages_per_second": 800})

    async def begun() -> bool:
        return bool((await machine.sink_json("/api/v1/counters"))["messages"] > 500)

    await until(begun, "sending begun", 60.0, machine)
    assert await engine.stop() == 0, machine.words()
    assert await pool.fetchval("select count(*) from batches where campaign_id = $1 and owner is not null", campaign) == 0
    assert not list((machine.directory / "journal").glob("*.*.*"))  # everything is in the ledger
    before = (await machine.sink_json("/api/v1/counters"))["messages"]
    assert 500 < before < 4000
    await machine.engine()
    await completed(machine, pool, campaign)
    counters = await machine.sink_json("/api/v1/counters")
    assert counters["messages"] == 4000
    found = await audit(pool, campaign)
    assert found | CLEAN | {"delivered": 4000, "possible_duplicates": 0} == found


async def test_redis_wiped_in_the_middle_costs_nothing(machine: Machine, pool: Pool) -> None:
    await machine.sink()
    await machine.engine()
    campaign = await seed.campaign(pool, recipients=20_000, port=machine.sink_port, limits={"max_messages_per_second": 4000})

    async def begun() -> bool:
        return bool((await machine.sink_json("/api/v1/counters"))["messages"] > 1000)

    await until(begun, "sending begun", 60.0, machine)
    client = batch_queue.connect(machine.environment["SLUICE_REDIS_URL"], 5.0)
    await client.flushall()
    await client.aclose()
    await completed(machine, pool, campaign)
    assert (await machine.sink_json("/api/v1/counters"))["messages"] == 20_000
    found = await audit(pool, campaign)
    assert found | CLEAN | {"delivered": 20_000} == found


async def test_a_campaign_of_one_batch_gets_the_connections_that_its_work_is_worth(machine: Machine, pool: Pool) -> None:
    """Nothing but the end of the first connecting tells the path that it may open others: no further batch comes."""
    async with Peer(reply_delay=0.05) as peer:
        campaign = await seed.campaign(pool, recipients=200, port=peer.port, limits={"max_connections": 4})
        await machine.engine()

        async def completed() -> bool:
            return await campaign_state(pool, campaign) == "completed"

        await until(completed, "the campaign", 60, machine)
    assert {each.connection for each in peer.accepted} == {0, 1, 2, 3}
    assert len(peer.accepted) == 200
