"""Delivery servers in the store."""

from typing import Any

import pytest

from domain.egress import DeliveryServerLimits
from domain.errors import Conflict, NotFound
from store import egress, engines, users
from store.postgres import Pool, connection, transaction

FIELDS: dict[str, Any] = {
    "name": "relay",
    "host": "127.0.0.1",
    "port": 25,
    "security": "none",
    "connect_timeout_seconds": 10.0,
    "username": "",
    "link_domain": "",
    "open_domain": "",
    "mfrom": "b.example.org",
    "enforced_from": "",
    "use_list_sender_as_mfrom": False,
    "use_list_sender_as_from": False,
    "fallback_server_id": None,
    "limits": DeliveryServerLimits(max_connections=7, retry_schedule_seconds=(1.0, 2.0)),
    "enabled": True,
}


async def test_every_field_comes_back_as_it_was_given(pool: Pool) -> None:
    async with transaction(pool) as conn:
        user = await users.create_user(conn, "ada")
    made = await egress.create(pool, user.id, FIELDS, lambda server_id: b"sealed %d" % server_id)
    assert set(FIELDS) == set(egress.FIELDS)
    assert {name: getattr(made, name) for name in FIELDS} == FIELDS
    assert made.password_sealed == b"sealed %d" % made.id
    assert (await engines.egress_config(pool)).servers == {made.id: made}


async def test_every_change_raises_the_version_and_a_failed_one_does_not(pool: Pool) -> None:
    async with transaction(pool) as conn:
        user = await users.create_user(conn, "ada")
    version = await engines.egress_version(pool)
    made = await egress.create(pool, user.id, FIELDS, None)
    assert await engines.egress_version(pool) == version + 1
    with pytest.raises(Conflict):
        await egress.create(pool, user.id, FIELDS, None)
    with pytest.raises(NotFound):
        await egress.update(pool, user.id + 1, made.id, {"port": 26}, None)
    with pytest.raises(NotFound):
        await egress.delete(pool, user.id + 1, made.id)
    assert await engines.egress_version(pool) == version + 1
    assert (await egress.update(pool, user.id, made.id, {"port": 26}, lambda _: b"new")).password_sealed == b"new"
    await egress.delete(pool, None, made.id)
    assert await engines.egress_version(pool) == version + 3
    async with connection(pool) as conn:
        with pytest.raises(NotFound):
            await egress.get(conn, user.id, made.id)
    assert (await engines.egress_config(pool)).servers == {}
