"""Copies of unsubscribes for a URL: signed, repeated until they are taken, each known by its id."""

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from typing import NamedTuple

import pytest

from compose import mail_headers
from config.settings import Mail
from domain import feedback
from inbound.unsubscribe_copies import AT_ONCE, UnsubscribeCopies
from store import bounces, unsubscribe_copies
from store.bounces import Rules
from store.postgres import Pool, transaction
from store.unsubscribe_copies import CopiesReport
from tests.inbound.conftest import World
from tests.inbound.test_web import ONE_CLICK, Site

KEY = bytes(range(32))


class Request(NamedTuple):
    """What came."""

    line: str
    headers: dict[str, str]
    body: bytes


class Receiver:
    """An HTTP server that answers as it is told, 200 where nothing is said; None: never."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.answers: list[bytes | None] = []
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            line, *fields = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
            headers = {name.lower(): value for name, _, value in (field.partition(": ") for field in fields)}
            self.requests.append(Request(line, headers, await reader.readexactly(int(headers["content-length"]))))
            answer = self.answers.pop(0) if self.answers else b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
            if answer is None:
                await reader.read()  # until he hangs up
            writer.write(answer or b"")
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    made = Receiver()
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/left?from=sluice"
    yield made
    server.close()


async def left(pool: Pool, world: World, url: str, times: int = 1) -> None:
    """Copies of `times` unsubscribes."""
    async with transaction(pool) as conn:
        for _ in range(times):
            await unsubscribe_copies.send(conn, world.user_id, world.campaign_id, 1, world.email, url, 1_772_600_767.25)


def patient(pool: Pool, receiver: Receiver) -> UnsubscribeCopies:
    """Slow machines answer late."""
    return UnsubscribeCopies(pool, receiver.url, KEY, post_seconds=60.0)


async def work(copies: UnsubscribeCopies) -> None:
    async with copies.client() as client:
        while await copies.once(client):
            pass


async def stand(pool: Pool) -> CopiesReport:
    async with pool.acquire() as conn:
        return await unsubscribe_copies.report(conn)


async def test_each_unsubscribe_over_the_web_is_posted_once_and_signed(world: World, pool: Pool, receiver: Receiver) -> None:
    before = time.time()
    async with Site(pool, world, copy_to=receiver.url).running() as site:
        for _ in range(2):
            assert (await site.ask("POST", f"/u/{world.token}", ONE_CLICK))[0] == 200
    assert await pool.fetchval("select count(*) from messages") == 0
    await work(patient(pool, receiver))
    [request] = receiver.requests
    assert request.line == "POST /left?from=sluice HTTP/1.1"
    said = json.loads(request.body)
    assert said["type"] == "unsubscribed"
    assert said["data"] == {
        "email": "Ada@reader.example", "user_id": world.user_id, "campaign_id": world.campaign_id, "campaign": "One", "number": 1,
        "list_id": world.list_id, "list": "News",
    }  # fmt: skip
    assert request.headers["content-type"] == "application/json"
    assert before - 1 <= int(request.headers["webhook-timestamp"]) <= time.time() + 1
    signed = b".".join([request.headers["webhook-id"].encode(), request.headers["webhook-timestamp"].encode(), request.body])
    expected = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    assert request.headers["webhook-signature"] == f"v1,{expected}"
    assert (await stand(pool)).waiting == 0


async def test_a_request_by_mail_is_posted_too(world: World, pool: Pool, receiver: Receiver) -> None:
    event = bounces.Event(
        kind=feedback.UNSUBSCRIBE, action="unsubscribe", user_id=world.user_id, campaign_id=world.campaign_id, number=1,
        effect="unsubscribed", diagnostic="", format="", details={},
    )  # fmt: skip
    async with transaction(pool) as conn:
        await bounces.record(conn, [event], Rules(unsubscribe_copy_to=receiver.url), bounces.Changes())
    await work(patient(pool, receiver))
    assert [json.loads(each.body)["data"]["email"] for each in receiver.requests] == ["Ada@reader.example"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 500 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", "it answered 500"),
        (b"HTTP/1.1 302 There\r\nLocation: /other\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", "it answered 302"),
        (b"", "RemoteProtocolError: Server disconnected without sending a response."),
        (b"nonsense\r\n\r\n", "RemoteProtocolError: illegal status line: bytearray(b'nonsense')"),
        (None, "no answer within 0.5 s"),
    ],
)
async def test_what_was_not_taken_comes_again_under_the_same_id(
    world: World, pool: Pool, receiver: Receiver, answer: bytes | None, reason: str
) -> None:
    await left(pool, world, receiver.url)
    receiver.answers = [answer]
    seconds = 0.5 if answer is None else 60.0
    copies = UnsubscribeCopies(pool, receiver.url, KEY, first_pause_seconds=1000.0, post_seconds=seconds)
    await work(copies)
    assert copies.report is not None
    assert (copies.report.waiting, copies.report.given_up, copies.report.waiting_because) == (1, 0, reason)
    assert copies.trouble == [f"1 copies of unsubscribes wait for 127.0.0.1: {reason}"]
    await work(copies)
    assert len(receiver.requests) == 1, "its pause is not over"
    await pool.execute("update unsubscribe_copies set due_at = now()")
    await work(patient(pool, receiver))
    first, second = receiver.requests
    assert (first.headers["webhook-id"], first.body) == (second.headers["webhook-id"], second.body)
    assert json.loads(first.body)["timestamp"] == "2026-03-04T05:06:07.250000Z"
    assert (await stand(pool)).waiting == 0


async def test_pauses_grow_and_what_is_too_old_is_given_up_until_somebody_asks(world: World, pool: Pool, receiver: Receiver) -> None:
    await left(pool, world, receiver.url)
    dead = UnsubscribeCopies(pool, "http://127.0.0.1:1/", KEY, first_pause_seconds=100.0, max_age_seconds=350.0)
    pauses = []
    for _ in range(3):
        await work(dead)
        pauses.append(await pool.fetchval("select round(extract(epoch from due_at - now())) from unsubscribe_copies"))
        await pool.execute("update unsubscribe_copies set due_at = now()")
    assert [0 < each <= 100 for each in pauses[:2]] == [True, False]
    assert pauses[1] <= 200
    found = await stand(pool)
    assert (found.waiting, found.given_up) == (0, 1)
    assert "ConnectError" in found.given_up_because
    await work(patient(pool, receiver))
    assert receiver.requests == []
    async with transaction(pool) as conn:
        assert await unsubscribe_copies.retry(conn) == 1
    await work(patient(pool, receiver))
    assert len(receiver.requests) == 1


async def test_several_processes_share_them_and_one_that_died_holds_none_back_for_good(
    world: World, pool: Pool, receiver: Receiver
) -> None:
    await left(pool, world, receiver.url, 3 * AT_ONCE)
    async with transaction(pool) as conn:
        assert len(await unsubscribe_copies.take(conn, 2, 0.0)) == 2  # and no more is heard of who took them
    await asyncio.gather(*(work(patient(pool, receiver)) for _ in range(3)))
    assert len({each.headers["webhook-id"] for each in receiver.requests}) == len(receiver.requests) == 3 * AT_ONCE


def test_the_header_of_messages_does_not_name_the_url() -> None:
    assert mail_headers.unsubscribe_to(Mail(list_unsubscribe_to="https://crm.example/left"), b"garden.example") is None
    assert mail_headers.unsubscribe_to(Mail(list_unsubscribe_to="l@%sender_domain%"), b"garden.example") == b"l@garden.example"


async def test_without_a_url_what_waits_is_said_and_stays(world: World, pool: Pool) -> None:
    await left(pool, world, "https://reader.example/")
    copies = UnsubscribeCopies(pool, "", KEY)
    await work(copies)
    assert copies.trouble == ["1 copies of unsubscribes wait for a URL in mail.list_unsubscribe_to"]
