"""Idempotency-Key: one effect, one answer."""

import asyncio
from collections import Counter

from config import tasks
from control.idempotency import forget_old
from store import idempotency
from store.postgres import Pool, connection
from tests.control.conftest import Client


def with_key(key: str) -> dict[str, dict[str, str]]:
    """Options of a request."""
    return {"headers": {"idempotency-key": key}}


async def test_the_same_request_again_gets_the_same_answer(ada: Client, pool: Pool) -> None:
    first = await ada.call("POST", "/lists", json={"name": "news"}, **with_key("k1"))
    again = await ada.call("POST", "/lists", json={"name": "news"}, **with_key("k1"))
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.content == again.content
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["content-type"] == first.headers["content-type"]
    assert await pool.fetchval("select count(*) from lists") == 1


async def test_another_request_with_the_key_is_refused(ada: Client, eve: Client) -> None:
    await ada.ok("POST", "/lists", json={"name": "news"}, **with_key("k1"))
    await ada.refused(422, "POST", "/lists", json={"name": "other"}, **with_key("k1"))
    await ada.refused(422, "POST", "/suppressions", json={"name": "news"}, **with_key("k1"))
    assert (await eve.ok("POST", "/lists", json={"name": "news"}, **with_key("k1")))["user_id"] == eve.user_id


async def test_fifty_at_once_have_one_effect(ada: Client, pool: Pool) -> None:
    answers = await asyncio.gather(*(ada.call("POST", "/lists", json={"name": "news"}, **with_key("k")) for _ in range(50)))
    assert set(Counter(answer.status_code for answer in answers)) <= {201, 409}
    assert await pool.fetchval("select count(*) from lists") == 1
    created = [answer for answer in answers if answer.status_code == 201]
    assert len({answer.content for answer in created}) == 1
    assert sum("idempotent-replayed" not in answer.headers for answer in created) == 1


async def test_a_refusal_does_not_use_the_key_up(ada: Client) -> None:
    await ada.refused(422, "POST", "/lists", json={"name": ""}, **with_key("k"))
    await ada.ok("POST", "/lists", json={"name": "news"}, **with_key("k"))


async def test_a_request_that_was_never_answered_stays_in_doubt(ada: Client, pool: Pool) -> None:
    await ada.ok("POST", "/lists", json={"name": "news"}, **with_key("k"))
    await pool.execute("update idempotency_keys set status = null, response = null")
    await ada.refused(409, "POST", "/lists", json={"name": "news"}, **with_key("k"))
    await pool.execute("update idempotency_keys set created_at = now() - interval '25 hours'")
    async with connection(pool) as conn:
        assert await idempotency.purge(conn) == 1


async def test_a_request_that_lost_its_store_on_the_way_stays_in_doubt(ada: Client, pool: Pool) -> None:
    await pool.execute(
        "create function lost() returns trigger language plpgsql as "
        "$$ begin perform pg_terminate_backend(pg_backend_pid()); return null; end $$"
    )
    await pool.execute("create trigger lost after insert on lists execute function lost()")
    await ada.refused(503, "POST", "/lists", json={"name": "news"}, **with_key("k"))
    await pool.execute("drop trigger lost on lists")
    await ada.refused(409, "POST", "/lists", json={"name": "news"}, **with_key("k"))
    await ada.ok("POST", "/lists", json={"name": "news"}, **with_key("another"))


async def test_a_day_later_the_key_is_free_and_its_answer_forgotten(ada: Client, pool: Pool) -> None:
    for name in ("news", "other"):
        await ada.ok("POST", "/lists", json={"name": name}, **with_key("k"))
        await ada.refused(422, "POST", "/lists", json={"name": "a third"}, **with_key("k"))
        await pool.execute("update idempotency_keys set created_at = now() - interval '25 hours'")
    forgetting = asyncio.create_task(forget_old(pool, every_seconds=0.01))
    async with asyncio.timeout(20):
        while await pool.fetchval("select count(*) from idempotency_keys"):
            await asyncio.sleep(0.01)
    await tasks.end([forgetting], 5.0)


async def test_a_kept_answer_shows_no_secret(ada: Client, pool: Pool) -> None:
    path = f"/users/{ada.user_id}/api-keys"
    made = await ada.ok("POST", path, json={}, **with_key("k"))
    assert (await ada.ok("POST", path, json={}, **with_key("k")))["key"] == made["key"]
    kept = await pool.fetchval("select response from idempotency_keys")
    assert made["key"].encode() not in kept
    assert made["key"].rpartition("_")[2].encode() not in kept


async def test_an_import_is_compared_by_its_length(ada: Client) -> None:
    news = await ada.ok("POST", "/lists", json={"name": "news"})
    options = {"headers": {"idempotency-key": "k", "content-type": "text/csv"}}
    first = await ada.ok("POST", f"/lists/{news['id']}/imports", content=b"email\na@b.example\n", **options)
    again = await ada.ok("POST", f"/lists/{news['id']}/imports", content=b"email\na@b.example\n", **options)
    assert again == first
    await ada.refused(422, "POST", f"/lists/{news['id']}/imports", content=b"email\nother@b.example\n", **options)


async def test_keys_that_are_none_are_refused(ada: Client) -> None:
    for key in ("", "x" * 256, "a\tb", "\u00e4"):
        answer = await ada.call("POST", "/lists", json={"name": "news"}, headers={"idempotency-key": key.encode("latin-1")})
        assert answer.status_code == 422, key
