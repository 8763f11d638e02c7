"""Operator patterns in the store: an order without gaps, one version for every change, all or none."""

import asyncio

import pytest

from domain.bounce import CATEGORIES
from domain.bounce_patterns import Pattern, read_line
from domain.errors import Conflict, Invalid, NotFound
from store import bounce_patterns
from store.postgres import Pool, connection, transaction


def line(text: str) -> Pattern:
    return read_line(text, frozenset(CATEGORIES))


async def order(pool: Pool) -> list[str]:
    async with connection(pool) as conn:
        found = await bounce_patterns.list_patterns(conn)
    assert [each.position for each in found] == list(range(1, len(found) + 1))
    return [f"{each.pattern}==>{each.verdict}" for each in found]


async def test_patterns_are_added_moved_and_removed_without_gaps(pool: Pool) -> None:
    made = {}
    for name, position in (("bbb", None), ("ddd", None), ("aaa", 1), ("ccc", 3), ("eee", 99)):
        async with transaction(pool) as conn:
            made[name] = (await bounce_patterns.add(conn, line(f"{name}==>Hard"), position=position)).id
    assert await order(pool) == [f"{name}==>Hard" for name in ("aaa", "bbb", "ccc", "ddd", "eee")]
    for name, position, expected in (("eee", 1, "eabcd"), ("eee", 4, "abced"), ("aaa", 99, "bceda"), ("ccc", 2, "bceda")):
        async with transaction(pool) as conn:
            await bounce_patterns.move(conn, made[name], position)
        assert "".join(text[0] for text in await order(pool)) == expected
    async with transaction(pool) as conn:
        await bounce_patterns.remove(conn, made["eee"])
    assert "".join(text[0] for text in await order(pool)) == "bcda"
    for work in (bounce_patterns.remove, lambda conn, pattern_id: bounce_patterns.move(conn, pattern_id, 1)):
        with pytest.raises(NotFound):
            async with transaction(pool) as conn:
                await work(conn, made["eee"])
    with pytest.raises(Conflict):
        async with transaction(pool) as conn:
            await bounce_patterns.add(conn, line("aaa==>Soft"))


async def test_every_change_raises_the_version_and_what_is_loaded_goes_with_it(pool: Pool) -> None:
    versions = [await bounce_patterns.version(pool)]

    async def add(number: int) -> None:
        async with transaction(pool) as conn:
            await bounce_patterns.add(conn, line(f"text {number}==>Soft"))

    await asyncio.gather(*(add(number) for number in range(8)))
    versions.append(await bounce_patterns.version(pool))
    number, loaded = await bounce_patterns.load(pool)
    assert versions[0] < versions[1] == number
    assert {str(each) for each in loaded} == {f"text {number}==>Soft" for number in range(8)}
    assert await order(pool) == [str(each) for each in loaded]


async def test_a_file_is_taken_over_whole_or_not_at_all_and_twice_is_once(pool: Pool) -> None:
    lines = [line(text) for text in ("one text==>Hard", "two text==>Soft", "/three \\d/==>quota-issues")]
    async with transaction(pool) as conn:
        first = await bounce_patterns.take(conn, lines, replace=False)
    async with transaction(pool) as conn:
        again = await bounce_patterns.take(conn, lines, replace=False)
    assert [(each.added, each.changed, each.removed, each.unchanged) for each in (first, again)] == [(3, 0, 0, 0), (0, 0, 0, 3)]
    async with transaction(pool) as conn:
        done = await bounce_patterns.take(conn, [line("two text==>Hard"), line("zero text==>Soft")], replace=True)
    assert (done.added, done.changed, done.removed) == (1, 1, 2)
    assert await order(pool) == ["two text==>Hard", "zero text==>Soft"]
    costly = [line(f"/a.{{{90 + i}}}b{i}/==>Hard") for i in range(60)]
    with pytest.raises(Invalid, match="too costly"):
        async with transaction(pool) as conn:
            await bounce_patterns.take(conn, costly, replace=False)
    assert await order(pool) == ["two text==>Hard", "zero text==>Soft"]
