"""Accounting files of what came back: PowerMTA's columns, one line each, nothing lost or doubled by a crash."""

import csv
import io
from pathlib import Path

import pytest

from journal.feedback_files import FEEDBACK_COLUMNS, REMOTE_COLUMNS, FeedbackFiles
from store.postgres import Pool

TRICKY = "=cmd|' /C calc'!A0, \"quoted\"\x1b[31m\u2028next line (((( a@a@a@"


@pytest.fixture
async def campaign(pool: Pool) -> int:
    user = await pool.fetchval("insert into users (name) values ('u') returning id")
    lists = await pool.fetchval("insert into lists (user_id, name) values ($1, 'l') returning id", user)
    server = "insert into delivery_servers (user_id, name, host, port, security) values ($1, 's', 'h', 25, 'none') returning id"
    return int(
        await pool.fetchval(
            "insert into campaigns (user_id, name, list_id, delivery_server_id, subject) values ($1, 'c', $2, $3, 's') returning id",
            user, lists, await pool.fetchval(server, user),
        )
    )  # fmt: skip


async def add(pool: Pool, campaign: int, kind: str, number: int, diagnostic: str = "550 5.1.1 User unknown", node: str = "mx1") -> None:
    details = (
        '{"orig": "b-x@bounce.example", "srcMta": "192.0.2.1", "dsnReportingMta": "mx.relay.example", "feedbackType": "abuse", '
        '"reportedDomain": "mailer.example", "headers": {"X-FBLId": "abc", "To": "r@x.example", "From": "News <n@m.example>", '
        '"Return-Path": "<b-x@bounce.example>", "Subject": "Hello"}}'
    )
    await pool.execute(
        "insert into feedback (kind, action, user_id, campaign_id, number, recipient, effect, status, category, diagnostic, mta, format, "
        "details, node) select $2, $3, user_id, id, $4, 'r@x.example', 'hard', '5.1.1', 'bad-mailbox', $5, 'mx.x.example', $6, "
        "$7::text::jsonb, $8 from campaigns where id = $1",
        campaign, kind, {"rb": "failed", "rs": "delayed", "f": "complaint", "u": "unsubscribe"}[kind], number, diagnostic,
        "arf" if kind == "f" else "dsn", details, node,
    )  # fmt: skip


def made(directory: Path, max_size_bytes: int = 1 << 20) -> FeedbackFiles:
    return FeedbackFiles("mx1", directory / "state", directory / "remote.csv", directory / "fbl.csv", max_size_bytes=max_size_bytes)


def rows(directory: Path, stem: str) -> list[list[str]]:
    text = "".join(path.read_text() for path in sorted(directory.glob(f"{stem}-*.csv")))
    return list(csv.reader(io.StringIO(text, newline="")))


async def test_each_record_has_its_columns(pool: Pool, campaign: int, tmp_path: Path) -> None:
    for number, kind in enumerate(("rb", "rs", "f", "u"), 1):
        await add(pool, campaign, kind, number)
    await add(pool, campaign, "rb", 9, node="mx2")
    files = made(tmp_path)
    assert not await files.flush(pool)
    files.close()
    header, bounce, status = rows(tmp_path, "remote")
    assert tuple(header) == REMOTE_COLUMNS
    assert header[:15] == [
        "type", "timeLogged", "orig", "rcpt", "orcpt", "dsnAction", "dsnStatus", "dsnDiag", "dsnMta", "dsnReportingMta", "bounceCat",
        "srcType", "srcMta", "envId", "format",
    ]  # fmt: skip
    assert [bounce[0], *bounce[2:]] == [
        "rb", "b-x@bounce.example", "r@x.example", "", "failed", "5.1.1 (bad destination mailbox address)", "smtp;550 5.1.1 User unknown",
        "mx.x.example", "mx.relay.example", "bad-mailbox", "smtp", "192.0.2.1", "", "dsn", "abc",
    ]  # fmt: skip
    assert (status[0], status[5]) == ("rs", "delayed")
    header, complaint = rows(tmp_path, "fbl")
    assert tuple(header) == FEEDBACK_COLUMNS
    named = dict(zip(header, complaint, strict=True))
    assert (named["feedbackType"], named["format"], named["reportedDomain"]) == ("abuse", "arf", "mailer.example")
    assert (named["header_To"], named["header_X-FBLId"], named["rcpt"]) == ("r@x.example", "abc", "r@x.example")
    assert (header.index("userAgent"), header.index("orig"), header.index("rcpt"), header.index("header_Subject")) == (5, 7, 8, 15)
    assert await pool.fetchval("select array_agg(number) from feedback where node <> ''") == [9]


async def test_what_a_stranger_wrote_stays_one_clean_line(pool: Pool, campaign: int, tmp_path: Path) -> None:
    await add(pool, campaign, "rb", 1, TRICKY)
    files = made(tmp_path)
    await files.flush(pool)
    files.close()
    (path,) = tmp_path.glob("remote-*.csv")
    assert path.read_bytes().count(b"\n") == 2
    assert not any(octet < 0x20 and octet != 0x0A for octet in path.read_bytes())
    assert len(rows(tmp_path, "remote")[1]) == len(REMOTE_COLUMNS)


async def test_a_crash_at_any_step_loses_and_doubles_nothing(pool: Pool, campaign: int, tmp_path: Path) -> None:
    for number in range(1, 4):
        await add(pool, campaign, "rb", number)
    first = made(tmp_path)
    await first.flush(pool)
    first.close()
    await pool.execute("update feedback set node = 'mx1' where number = 3")  # died before PostgreSQL was told
    (path,) = tmp_path.glob("remote-*.csv")
    with path.open("ab") as file:
        file.write(b"rb,half a line of a batch that was not finished")
    await add(pool, campaign, "rb", 4)
    second = made(tmp_path)
    await second.flush(pool)
    second.close()
    assert [row[3] for row in rows(tmp_path, "remote")] == ["rcpt", *["r@x.example"] * 4]
    assert await pool.fetchval("select count(*) from feedback where node <> ''") == 0


async def test_one_process_of_a_node_writes_and_another_takes_over(pool: Pool, campaign: int, tmp_path: Path) -> None:
    await add(pool, campaign, "rb", 1)
    first, second = made(tmp_path), made(tmp_path, max_size_bytes=300)
    await first.flush(pool)
    for number in (2, 3):
        await add(pool, campaign, "rb", number)
    await second.flush(pool)
    assert len(rows(tmp_path, "remote")) == 2
    first.close()
    await second.flush(pool)
    second.close()
    assert len(list(tmp_path.glob("remote-*.csv"))) == 3  # each full after one line
    assert sum(row[0] == "rb" for row in rows(tmp_path, "remote")) == 3
