"""`sluice inbound pipe`: one message on standard input, exit codes as MTAs expect them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from store.postgres import Pool
from tests.inbound.conftest import World

ROOT = Path(__file__).parents[2]
MAIL = "From: MAILER-DAEMON@mx.example\nTo: {to}\nSubject: failed\n\nhello\n.\n"

Pipe = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture
def pipe(tmp_path: Path, fresh_database_url: str, redis_url: str, pool: Pool) -> Pipe:
    def run(message: str | bytes, *words: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
        own = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "SLUICE_NODE_STATE_DIRECTORY": str(tmp_path),
            "SLUICE_DATABASE_URL": fresh_database_url,
            "SLUICE_REDIS_URL": redis_url,
            "SLUICE_SECRETS_KEY": bytes(range(32)).hex(),
        }
        data = message if isinstance(message, bytes) else message.encode()
        return subprocess.run([sys.executable, "-m", "control.cli", "inbound", "pipe", *words], input=data,
                              capture_output=True, env=own | environment, cwd=ROOT, timeout=60, check=False)  # fmt: skip

    return run


async def test_a_message_is_stored_with_crlf_for_the_recipient_that_was_named(pipe: Pipe, pool: Pool, world: World) -> None:
    message = "From MAILER-DAEMON Sat Nov 21 20:00:00 2026\n" + MAIL.format(to="x@y.example")
    done = pipe(message, "--recipient", world.return_path(), "--sender", "")
    assert (done.returncode, done.stdout) == (0, b""), done.stderr
    [row] = await pool.fetch("select * from inbound_messages")
    assert row["raw"] == MAIL.format(to="x@y.example").replace("\n", "\r\n").encode()
    assert (row["mail_from"], row["recipient"], row["user_id"], row["number"]) == ("", world.return_path(), world.user_id, 1)


async def test_what_the_mta_says_in_variables_and_fields_is_understood(pipe: Pipe, pool: Pool, world: World) -> None:
    assert pipe(MAIL.format(to="x@y.example"), SENDER="", RECIPIENT=world.return_path()).returncode == 0
    fields = f"Return-Path: <ada@reader.example>\nDelivered-To: {world.return_path()}\n"
    assert pipe(fields + MAIL.format(to="abuse@bounce.mailer.example")).returncode == 0
    rows = await pool.fetch("select mail_from, recipient, number from inbound_messages order by id")
    assert [tuple(row) for row in rows] == [("", world.return_path(), 1), ("ada@reader.example", world.return_path(), 1)]


async def test_refusals_have_the_codes_of_sysexits(pipe: Pipe, pool: Pool, world: World) -> None:
    good = MAIL.format(to=world.return_path())
    assert pipe(good, "--recipient", "ada@reader.example").returncode == 67
    assert pipe(MAIL.format(to="nobody@bounce.mailer.example")).returncode == 67
    assert pipe("", "--recipient", world.return_path()).returncode == 65
    assert pipe("Received: a\n" * 101 + good).returncode == 65
    assert pipe(b"x" * 70_000, "--recipient", world.return_path(), SLUICE_INBOUND_MAX_MESSAGE_BYTES="65536").returncode == 65
    assert await pool.fetchval("select count(*) from inbound_messages") == 0


async def test_trouble_of_ours_is_tried_again(pipe: Pipe, pool: Pool, world: World) -> None:
    good = MAIL.format(to=world.return_path())
    away = pipe(good, SLUICE_DATABASE_URL="postgresql://nobody@127.0.0.1:1/none")
    assert away.returncode == 75
    assert b"127.0.0.1:1/none is not available" in away.stderr
    assert pipe(good, SLUICE_INBOUND_SMTP_PORT="x").returncode == 75
    await pool.execute("alter table inbound_messages rename to away")
    broken = pipe(good)
    assert broken.returncode == 75
    assert b"inbound_messages" in broken.stderr
    assert b"Traceback" not in away.stderr
