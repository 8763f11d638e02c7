"""DKIM keys in the store: sealed, one that signs per domain and kind, rotation with overlap, a version that engines follow."""

import asyncio
from typing import Any

import pytest

from domain.dkim import DkimKey
from domain.errors import Conflict, NotFound
from store import dkim, users
from store.postgres import Pool, connection, transaction

SEALED = b"sealed for row %d"


async def user(pool: Pool, name: str = "ada") -> int:
    async with transaction(pool) as conn:
        return (await users.create_user(conn, name)).id


async def create(pool: Pool, user_id: int, selector: str, **changes: Any) -> DkimKey:
    fields: dict[str, Any] = {
        "domain": "garden.example", "selector": selector, "algorithm": "rsa-sha256", "bits": 2048, "public_key": b"public",
        "seal": lambda key_id: SEALED % key_id,
    }  # fmt: skip
    return await dkim.create(pool, user_id, **{**fields, **changes})


async def test_the_first_key_of_a_kind_signs_and_the_next_one_waits(pool: Pool) -> None:
    ada = await user(pool)
    version = await dkim.version(pool)
    first = await create(pool, ada, "s1")
    assert (first.state, first.private_key_sealed, first.retired_at) == ("active", SEALED % first.id, None)
    assert first.activated_at is not None
    assert await dkim.version(pool) == version + 1
    second = await create(pool, ada, "s2")
    assert (second.state, second.activated_at) == ("waiting", None)
    assert await dkim.version(pool) == version + 1, "nothing that signs has changed"
    other = await create(pool, ada, "e1", algorithm="ed25519-sha256", bits=256)
    assert other.state == "active"
    assert {key.id for key in await dkim.active(pool, [ada], ["garden.example"])} == {first.id, other.id}


async def test_the_operator_is_the_user_admin(pool: Pool) -> None:
    assert await dkim.operator(pool) == 0
    await user(pool)
    admin = await user(pool, users.ADMIN_NAME)
    assert await dkim.operator(pool) == admin
    key = await create(pool, admin, "s1")
    async with connection(pool) as conn:
        assert await dkim.operator(conn) == admin
    assert await dkim.active(pool, [admin], ["garden.example"]) == [key]


async def test_activating_a_key_retires_the_one_before_it(pool: Pool) -> None:
    ada = await user(pool)
    first, second = await create(pool, ada, "s1"), await create(pool, ada, "s2")
    version = await dkim.version(pool)
    assert (await dkim.activate(pool, ada, second.id)).state == "active"
    assert await dkim.version(pool) == version + 1
    async with connection(pool) as conn:
        before = await dkim.get(conn, ada, first.id)
    assert before.state == "retiring"
    assert before.retired_at is not None
    assert before.private_key_sealed == SEALED % first.id
    assert [key.id for key in await dkim.active(pool, [ada], ["garden.example"])] == [second.id]
    assert (await dkim.activate(pool, ada, second.id)).activated_at is not None
    assert await dkim.version(pool) == version + 1, "it was active already"
    back = await dkim.activate(pool, ada, first.id)
    assert (back.state, back.retired_at) == ("active", None)


async def test_a_retired_key_signs_no_more_and_can_be_deleted(pool: Pool) -> None:
    ada = await user(pool)
    made = await create(pool, ada, "s1")
    with pytest.raises(Conflict, match="retire it first"):
        await dkim.delete(pool, ada, made.id)
    assert (await dkim.retire(pool, ada, made.id)).state == "retiring"
    assert await dkim.active(pool, [ada], ["garden.example"]) == []
    await dkim.delete(pool, ada, made.id)
    with pytest.raises(NotFound):
        await dkim.delete(pool, ada, made.id)


async def test_a_key_can_be_made_to_wait_or_to_take_over_at_once(pool: Pool) -> None:
    ada = await user(pool)
    assert (await create(pool, ada, "s1", activate=False)).state == "waiting"
    assert (await create(pool, ada, "s2", activate=True)).state == "active"
    assert (await create(pool, ada, "s3", activate=True)).state == "active"
    async with connection(pool) as conn:
        assert [key.state for key in await dkim.list_keys(conn, ada, "garden.example", 0, 10)] == ["waiting", "retiring", "active"]
        assert await dkim.list_keys(conn, ada, "other.example", 0, 10) == []
        assert await dkim.selectors(conn, ada, "garden.example") == {"s1", "s2", "s3"}


async def test_a_selector_is_used_once_per_domain_and_user(pool: Pool) -> None:
    ada, bob = await user(pool), await user(pool, "bob")
    await create(pool, ada, "s1")
    with pytest.raises(Conflict, match="choose another selector"):
        await create(pool, ada, "s1")
    await create(pool, ada, "s1", domain="shore.example")
    assert (await create(pool, bob, "s1")).state == "active"


async def test_nobody_sees_or_signs_with_the_keys_of_another_user(pool: Pool) -> None:
    ada, bob = await user(pool), await user(pool, "bob")
    made = await create(pool, ada, "s1")
    for work in (dkim.activate, dkim.retire, dkim.delete):
        with pytest.raises(NotFound):
            await work(pool, bob, made.id)
    async with connection(pool) as conn:
        assert await dkim.list_keys(conn, bob, None, 0, 10) == []
        assert [key.id for key in await dkim.list_keys(conn, None, None, 0, 10)] == [made.id]
    assert await dkim.active(pool, [bob], ["garden.example"]) == []


async def test_many_at_once_leave_one_that_signs(pool: Pool) -> None:
    ada = await user(pool)
    made = await asyncio.gather(*(create(pool, ada, f"s{number}") for number in range(8)))
    assert [key.state for key in made].count("active") == 1
    await asyncio.gather(*(dkim.activate(pool, ada, key.id) for key in made))
    assert len(await dkim.active(pool, [ada], ["garden.example"])) == 1
