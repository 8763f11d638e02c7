"""The inbound process as it is started: one ready line, both doors open, SIGTERM clean."""

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
from redis.asyncio import Redis

from config import tasks
from config.settings import Settings
from inbound import app, handling, metrics
from inbound.policy import MailPolicy
from inbound.unsubscribe_copies import UnsubscribeCopies
from inbound.worker import Worker
from journal.feedback_files import FeedbackFiles
from journal.visits import Visits
from store import bounces, status
from store.postgres import Pool
from store.tracking import Visit
from tests.inbound.conftest import World
from tests.inbound.test_unsubscribe_copies import Receiver, left
from tests.inbound.test_unsubscribe_copies import receiver as receiver

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


async def start(
    tmp_path: Path, database_url: str, redis_url: str, *, stderr: int = asyncio.subprocess.PIPE, **settings: str
) -> asyncio.subprocess.Process:
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "SLUICE_NODE_STATE_DIRECTORY": str(tmp_path),
        "SLUICE_NODE_NAME": "mx.mailer.example",
        "SLUICE_DATABASE_URL": database_url,
        "SLUICE_REDIS_URL": redis_url,
        "SLUICE_SECRETS_KEY": bytes(range(32)).hex(),
        "SLUICE_INBOUND_SMTP_PORT": str(free_port()),
        "SLUICE_INBOUND_HTTP_PORT": str(free_port()),
        **settings,
    }
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "inbound", cwd=ROOT, env=environment, stdout=asyncio.subprocess.PIPE, stderr=stderr
    )


async def ready(process: asyncio.subprocess.Process) -> dict[str, tuple[str, int]]:
    assert process.stdout is not None
    line = (await asyncio.wait_for(process.stdout.readline(), 60)).decode().split()
    assert line[:2] == ["inbound", "ready"], (line, await process.stderr.read() if process.stderr else b"")
    places = dict(word.split("=") for word in line[2:])
    return {name: (place.rpartition(":")[0], int(place.rpartition(":")[2])) for name, place in places.items()}


async def post(place: tuple[str, int], path: str, body: bytes = b"") -> bytes:
    async with asyncio.timeout(60):
        reader, writer = await asyncio.open_connection(*place)
        writer.write(f"POST {path} HTTP/1.1\r\nHost: t\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.read()
        writer.close()
        return answer


async def until(pool: Pool, question: str) -> None:
    async with asyncio.timeout(60):
        while not await pool.fetchval(question):
            await asyncio.sleep(0.02)


async def test_the_process_serves_both_doors_and_ends_clean_on_sigterm(
    tmp_path: Path, fresh_database_url: str, redis_url: str, pool: Pool, world: World
) -> None:
    process = await start(tmp_path, fresh_database_url, redis_url)
    try:
        places = await ready(process)
        assert (await post(places["http"], f"/u/{world.token}")).startswith(b"HTTP/1.1 200")
        await until(pool, "select state = 'unsubscribed' from subscribers")
        reader, writer = await asyncio.open_connection(*places["smtp"])
        assert (await reader.readline()).startswith(b"220 mx.mailer.example")
        for command, code in (
            ("HELO x", b"250"),
            ("MAIL FROM:<>", b"250"),
            (f"RCPT TO:<{world.return_path()}>", b"250"),
            ("DATA", b"354"),
            ("a: b\r\n\r\nc\r\n.", b"250"),
        ):
            writer.write(command.encode() + b"\r\n")
            assert (await reader.readline()).startswith(code), command
        assert await pool.fetchval("select raw from inbound_messages") == b"a: b\r\n\r\nc\r\n"
        process.send_signal(signal.SIGTERM)  # with a session open
        assert (await reader.readline()).startswith(b"421")
        assert await asyncio.wait_for(process.wait(), 60) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_kill_9_between_the_answer_and_the_store_loses_no_unsubscribe_and_doubles_none(
    tmp_path: Path, fresh_database_url: str, redis_url: str, pool: Pool, world: World
) -> None:
    await pool.execute("update campaigns set from_email = 'news@mailer.example'")
    bob = await world.add_bob(pool)
    port = str(free_port())

    async def begun() -> asyncio.subprocess.Process:
        return await start(
            tmp_path, fresh_database_url, redis_url, SLUICE_INBOUND_HTTP_PORT=port,
            SLUICE_MAIL_LIST_UNSUBSCRIBE_TO="leavers@mailer.example",
        )  # fmt: skip

    async def killed(process: asyncio.subprocess.Process) -> None:
        process.kill()
        await process.wait()

    process = await begun()
    try:
        places = await ready(process)
        async with pool.acquire() as conn, conn.transaction():
            await conn.execute("lock table journal_cursors in access exclusive mode")  # PostgreSQL stands still where it is needed
            answer = await post(places["http"], f"/u/{world.token}", b"List-Unsubscribe=One-Click")
            assert answer.startswith(b"HTTP/1.1 200")
            assert b"Your wish is recorded" in answer
            await killed(process)
        assert await pool.fetchval("select state from subscribers where id = $1", world.subscriber_id) == "subscribed"

        process = await begun()
        await ready(process)
        await until(pool, "select state = 'unsubscribed' from subscribers where email_key = 'ada@reader.example'")
        await killed(process)
        # She comes back; what was carried out before the second death is not done once more behind it
        await pool.execute("update subscribers set state = 'subscribed'")
        await pool.execute("update suppressions set removed_at = now()")
        process = await begun()
        places = await ready(process)
        assert (await post(places["http"], f"/u/{bob}")).startswith(b"HTTP/1.1 200")
        await until(pool, "select state = 'unsubscribed' from subscribers where email_key = 'bob@reader.example'")
        assert await pool.fetchval("select state from subscribers where id = $1", world.subscriber_id) == "subscribed"
        copies = await pool.fetch("select data->>'address' as left from recipients where campaign_id <> $1 order by 1", world.campaign_id)
        assert [row["left"] for row in copies] == ["Ada@reader.example", "bob@reader.example"]
    finally:
        if process.returncode is None:
            await killed(process)


@pytest.mark.parametrize("name", ["smtp_port", "metrics_port"])
async def test_a_port_that_is_taken_is_named(tmp_path: Path, fresh_database_url: str, redis_url: str, name: str) -> None:
    taken = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = taken.sockets[0].getsockname()[1]
    settings = {f"SLUICE_INBOUND_{name.upper()}": str(port)}
    process = await start(tmp_path, fresh_database_url, redis_url, stderr=asyncio.subprocess.PIPE, **settings)
    try:
        _, errors = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 2
        assert f"inbound.{name}: cannot listen on 127.0.0.1:{port}" in errors.decode()
    finally:
        taken.close()


async def test_rules_are_followed_again_whatever_the_store_said_meanwhile(
    pool: Pool, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "REFRESH_SECONDS", 0.02)
    policy = MailPolicy(pool, world.keyring, ("relay.example",))
    following = asyncio.create_task(app.Inbound(Settings())._follow(policy, None))
    try:
        await pool.execute("alter table forwarding rename to elsewhere")
        await asyncio.sleep(0.2)
        await pool.execute("alter table elsewhere rename to forwarding")
        await pool.execute("insert into forwarding (aliases) values ('*@relay.example:rest@ours.example')")
        async with asyncio.timeout(60):
            while policy.recipient("anyone@relay.example")[0] is None:
                await asyncio.sleep(0.02)
    finally:
        await tasks.end([following], 5.0)


async def test_a_part_that_fails_ends_the_process() -> None:
    async def fails() -> None:
        raise LookupError("a bug of ours")

    inbound = app.Inbound(Settings())
    inbound._start("this part", fails())
    async with asyncio.timeout(60):
        await inbound._stop.wait()
    assert inbound._failed


async def test_a_log_that_nobody_reads_stops_nothing(tmp_path: Path, fresh_database_url: str, redis_url: str, world: World) -> None:
    """As when `sluice up` was killed, or stands still: no word of the log may cost an answer."""
    for reader_is in ("gone", "standing still"):
        reading, writing = os.pipe()
        if reader_is == "gone":
            os.close(reading)
        else:
            os.write(writing, bytes(1 << 16))  # the pipe is full
        process = await start(tmp_path, fresh_database_url, redis_url, stderr=writing)
        os.close(writing)
        try:
            places = await ready(process)
            for _ in range(2):  # each message is two lines of log
                reader, writer = await asyncio.open_connection(*places["smtp"])
                for command, code in (
                    ("", b"220"), ("HELO x", b"250"), ("MAIL FROM:<>", b"250"), (f"RCPT TO:<{world.return_path()}>", b"250"),
                    ("DATA", b"354"), ("a: b\r\n\r\nc\r\n.", b"250"), ("QUIT", b"221"),
                ):  # fmt: skip
                    writer.write(command.encode() + b"\r\n" if command else b"")
                    assert (await asyncio.wait_for(reader.readline(), 60)).startswith(code), (reader_is, command)
                writer.close()
            process.terminate()
            assert await asyncio.wait_for(process.wait(), 60) == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            if reader_is != "gone":
                os.close(reading)


async def test_lost_visits_are_in_the_status_and_in_the_metrics(
    tmp_path: Path, fresh_database_url: str, redis_url: str, redis: Redis, pool: Pool, world: World
) -> None:
    port = free_port()
    process = await start(tmp_path, fresh_database_url, redis_url, SLUICE_INBOUND_METRICS_PORT=str(port))
    try:
        await ready(process)
        async with asyncio.timeout(60):
            while not (found := await status.gather(pool, redis)).inbound_processes:
                await asyncio.sleep(0.05)
        (said,) = found.inbound_processes
        assert (said.visits_recorded, said.visits_lost, said.trouble) == (0, 0, [])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert b"\nsluice_visits_lost_total 0.0\n" in await reader.read()
        writer.close()
    finally:
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 60) == 0


async def test_the_process_posts_copies_of_unsubscribes_and_counts_them(
    tmp_path: Path, fresh_database_url: str, redis_url: str, pool: Pool, world: World, receiver: Receiver
) -> None:
    port = free_port()
    await left(pool, world, receiver.url)  # by another process
    process = await start(
        tmp_path, fresh_database_url, redis_url, SLUICE_INBOUND_METRICS_PORT=str(port), SLUICE_MAIL_LIST_UNSUBSCRIBE_TO=receiver.url
    )
    try:
        places = await ready(process)
        assert (await post(places["http"], f"/u/{world.token}")).startswith(b"HTTP/1.1 200")
        async with asyncio.timeout(60):
            while len(receiver.requests) < 2:
                await asyncio.sleep(0.05)
        assert len({each.headers["webhook-id"] for each in receiver.requests}) == 2
        await until(pool, "select count(*) = 0 from unsubscribe_copies")
        found = b""
        async with asyncio.timeout(60):
            while b'\nsluice_unsubscribe_copies{state="given_up"} 0.0\n' not in found:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
                found = await reader.read()
                writer.close()
                await asyncio.sleep(0.2)
    finally:
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 60) == 0


async def test_a_heartbeat_names_what_was_lost_and_why(tmp_path: Path, pool: Pool) -> None:
    async def tell(what: str) -> None:
        raise AssertionError(what)

    visits = Visits(tmp_path / "visits", budget_bytes=50)
    for number in range(3):
        visits.add(Visit(1, number, "o", 0, 1.5, "", "Mozilla/5.0"))
    worker = Worker(pool, handling.Keys(b"k" * 32, b"k" * 32), bounces.Rules(), tell)
    files = FeedbackFiles("n", tmp_path / "feedback", tmp_path / "remote.csv", tmp_path / "fbl.csv")
    requests = Visits(tmp_path / "requests")
    requests.trouble = "no answer in time"
    said = metrics.Status("n:1", "n", worker, visits, requests, files, UnsubscribeCopies(pool, "", b"")).heartbeat()
    assert (said["visits_recorded"], said["visits_lost"]) == (1, 2)
    assert said["visits_waiting_bytes"] > 0
    assert said["trouble"] == [
        "unsubscribes and reports of abuse over HTTP are safe on disk and wait: no answer in time",
        "2 opens and clicks were lost since the start: the disk budget is used up",
    ]
    visits.close()
    requests.close()
