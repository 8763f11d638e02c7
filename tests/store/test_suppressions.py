"""Suppressions in the store, and one-click unsubscribes."""

import asyncio

from domain.address import parse
from domain.suppression import covers, decide
from store import lists, subscribers, suppressions, users
from store.postgres import Pool, connection, transaction


async def test_an_unsubscribe_is_the_subscriber_s_state_and_a_suppression(pool: Pool) -> None:
    async with transaction(pool) as conn:
        user = await users.create_user(conn, "ada")
        news = await lists.create(conn, user.id, "news", "", "")
        other = await lists.create(conn, user.id, "other", "", "")
        reader, _ = await subscribers.add(conn, user.id, news.id, parse("Reader@x.example"), {})
        await subscribers.add(conn, user.id, other.id, parse("reader@x.example"), {})

    async def unsubscribe() -> bool:
        async with connection(pool) as conn:
            return await suppressions.unsubscribe(conn, user.id, news.id, reader.id, "reader@x.example")

    assert sorted(await asyncio.gather(*(unsubscribe() for _ in range(4)))) == [False, False, False, True]
    async with connection(pool) as conn:
        assert (await subscribers.get(conn, news.id, reader.id)).state == "unsubscribed"
        assert (await subscribers.get(conn, other.id, None, "reader@x.example")).state == "subscribed"
        assert [each.scope for each in await suppressions.check(conn, user.id, news.id, "reader@x.example")] == ["list"]
        assert await suppressions.check(conn, user.id, other.id, "reader@x.example") == []
        added, fresh = await subscribers.add(conn, user.id, news.id, parse("READER@x.example"), {"a": "b"})
        assert (fresh, added.state, added.data) == (False, "unsubscribed", {"a": "b"})


async def test_an_unsubscribe_without_a_subscriber_still_suppresses(pool: Pool) -> None:
    async with transaction(pool) as conn:
        user = await users.create_user(conn, "ada")
        news = await lists.create(conn, user.id, "news", "", "")
        assert await suppressions.unsubscribe(conn, user.id, news.id, None, "gone@x.example", "one click") is True
        found = await suppressions.check(conn, user.id, news.id, "gone@x.example")
    assert [(each.reason, each.note) for each in found] == [("unsubscribed", "one click")]


def test_who_is_covered_by_what_is_decided() -> None:
    unsubscribed = decide(1, 10, "a@x.example", "unsubscribed")
    bounced = decide(1, 10, "a@x.example", "bounced")
    assert (unsubscribed.scope, bounced.scope) == ("list", "user")
    assert [covers(unsubscribed, *who) for who in ((1, 10), (1, 11), (2, 10))] == [True, False, False]
    assert [covers(bounced, *who) for who in ((1, 10), (1, 11), (2, 10))] == [True, True, False]
