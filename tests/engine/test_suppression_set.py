"""The suppressions an engine holds follow what is committed, however long other transactions take."""

import asyncio
from typing import NamedTuple

import asyncpg
import pytest

from domain.suppression_key import parse
from engine.suppression_set import SuppressionSet
from store import lists, suppressions, users
from store.postgres import Pool, connection, transaction


class Recipient(NamedTuple):
    email: str


ASKED = [Recipient("Anna@news.example"), Recipient("info@other.example"), Recipient("bob@a.b.example"), Recipient("ok@fine.example")]


async def test_addresses_domains_subdomains_and_local_parts_are_covered_in_every_scope(pool: Pool) -> None:
    async with transaction(pool) as conn:
        user = (await users.create_user(conn, "ada")).id
        news = (await lists.create(conn, user, "news", "", "")).id
        await suppressions.add(conn, None, None, [parse("*@*.b.example")], "manual")
        await suppressions.add(conn, user, None, [parse("info@*")], "manual")
        await suppressions.add(conn, user, news, [parse("news.example")], "manual")
        for email, expected in (("anna@news.example", ["list"]), ("info@other.example", ["user"]), ("x@a.b.example", ["system"])):
            assert [found.scope for found in await suppressions.check(conn, user, news, email)] == expected
    held = SuppressionSet()
    await held.refresh(pool)
    assert len(held) == 3
    assert held.among(user, news, ASKED, [0, 1, 2, 3]) == [0, 1, 2]
    assert held.among(user, news + 1, ASKED, [0, 1, 2, 3]) == [1, 2]
    assert held.among(user + 1, news, ASKED, [0, 1, 2, 3]) == [2]


async def test_what_commits_late_is_seen_and_what_was_seen_does_not_come_again(pool: Pool) -> None:
    async with transaction(pool) as conn:
        user = (await users.create_user(conn, "ada")).id
        await suppressions.add(conn, user, None, ["anna@news.example"], "manual")
    blocks: list[bytes] = []
    keep = blocks.append
    async with pool.acquire() as late:
        slow = late.transaction()
        await slow.start()
        await suppressions.add(late, user, None, ["late@news.example"], "manual")
        seen = await suppressions.changes(pool, "", keep)
        assert b"anna@news.example" in b"".join(blocks)
        async with transaction(pool) as conn:
            await suppressions.add(conn, user, None, ["early@news.example"], "manual")
        blocks.clear()
        seen = await suppressions.changes(pool, seen, keep)
        # the open transaction is older than this one: what was seen before it began does not come again
        assert [name in b"".join(blocks) for name in (b"early@", b"anna@", b"late@")] == [True, False, False]
        blocks.clear()
        assert await suppressions.changes(pool, seen, keep) == seen
        assert not blocks
        await slow.commit()
    seen = await suppressions.changes(pool, seen, keep)
    assert [name in b"".join(blocks) for name in (b"early@", b"anna@", b"late@")] == [False, False, True]


async def test_two_that_refresh_at_once_do_not_disturb_each_other(pool: Pool) -> None:
    async with transaction(pool) as conn:
        user = (await users.create_user(conn, "ada")).id
        await suppressions.add(conn, user, None, [f"user{i}@d{i % 7}.example" for i in range(30_000)], "import")
    held = SuppressionSet()
    await asyncio.gather(*(held.refresh(pool) for _ in range(4)))
    assert len(held) == 30_000
    assert held.among(user, 1, [Recipient("USER29999@d4.example"), Recipient("nobody@d4.example")], [0, 1]) == [0]


@pytest.mark.parametrize("key", ["*", "a@b@c", "*@*", "NOT REGEXP x", "info@ex*mple.com", "@", "@*", "a@*.b.example", "a@"])
async def test_what_an_engine_could_not_read_cannot_be_kept(pool: Pool, key: str) -> None:
    async with connection(pool) as conn:
        with pytest.raises(asyncpg.CheckViolationError):
            await suppressions.add(conn, None, None, [key], "manual")
