"""`sluice inbound list` and `show`: what came, how it was read, what was done."""

import asyncio
import base64
import json

from store import inbound, postgres, received
from store.inbound import Received
from store.received import Settled
from tests.control.test_cli import Sluice, answer, sluice

__all__ = ["sluice"]

RAW = b"Subject: Undelivered\r\n\r\n550 5.1.1 unknown\r\n\xff\x1b[2J\r\n"


async def given_up(url: str) -> None:
    """Three copies of unsubscribes, one of them given up."""
    pool = await postgres.open_pool(url, 2)
    try:
        await pool.execute(
            "insert into unsubscribe_copies (body, reason, given_up_at) values ('{}', '', null), ('{}', 'it answered 500', null), "
            "('{}', 'it answered 404', now())"
        )
    finally:
        await pool.close()


def test_copies_of_unsubscribes_are_counted_and_sent_once_more(sluice: Sluice, fresh_database_url: str) -> None:
    asyncio.run(given_up(fresh_database_url))
    shown = sluice("inbound", "copies").stdout
    assert "it answered 500" in shown
    found = answer(sluice("inbound", "copies", "--json", "--retry"))
    assert isinstance(found, dict)
    assert (found["waiting"], found["given_up"]) == (3, 0)
    secret = sluice("inbound", "copies", "--secret").stdout
    assert len(base64.b64decode(secret.strip().removeprefix("whsec_"), validate=True)) == 32


async def fill(url: str) -> None:
    """One message that was handled, one that waits."""
    pool = await postgres.open_pool(url, 2)
    try:
        for sender in ("", "ada@reader.example"):
            to = [Received(recipient="b-x@bounce.example")]
            await inbound.keep(pool, peer="192.0.2.1", mail_from=sender, recipients=to, raw=RAW, timeout_seconds=5)
        means = {"category": "bad-mailbox", "fault": "recipient", "hard": True, "rule": "unknown"}
        reading = {
            "kind": "dsn", "action": "failed", "subject": "Undelivered", "returned": {"X-FBLId": "abc"},
            "failed": [{"recipient": "a@x.example", "status": "5.1.1", "diagnostic": "550 5.1.1 unknown", "means": means}],
        }  # fmt: skip
        async with postgres.transaction(pool) as conn:
            settled = Settled(id=1, kind="dsn", outcome="unproven", reason="no token of ours verifies", reading=reading)
            await received.settle(conn, [settled], timeout_seconds=5)
    finally:
        await pool.close()


def test_received_mail_is_listed_and_shown(sluice: Sluice, fresh_database_url: str) -> None:
    asyncio.run(fill(fresh_database_url))
    listed = answer(sluice("inbound", "list", "--json"))
    assert isinstance(listed, list)
    assert [(each["id"], each["kind"], each["outcome"]) for each in listed] == [(2, "", ""), (1, "dsn", "unproven")]
    only = answer(sluice("inbound", "list", "--outcome", "unproven", "--json"))
    assert isinstance(only, list)
    assert [each["id"] for each in only] == [1]
    table = sluice("inbound", "list").stdout
    assert "waiting" in table
    assert "no token of ours verifies" in table
    shown = sluice("inbound", "show", "1").stdout
    for words in ("a@x.example", "5.1.1 550 5.1.1 unknown (bad-mailbox, hard, rule unknown)", "X-FBLId", "unproven"):
        assert words in shown, shown
    found = answer(sluice("inbound", "show", "1", "--json"))
    assert isinstance(found, dict)
    assert found["reading"]["failed"][0]["means"]["hard"] is True
    assert sluice("inbound", "show", "3").returncode == 2
    assert answer(sluice("inbound", "rates", "--json")) == []
    assert sluice("inbound", "rates", "--campaign", "7").returncode == 2
    status = json.loads(sluice("status", "--json").stdout)
    assert (status["received"]["waiting"], status["received"]["today"], status["received"]["unprocessed_today"]) == (1, {"unproven": 1}, 1)
    assert "1 waiting to be read" in sluice("status").stdout
