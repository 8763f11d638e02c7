"""Announced batches through a real Redis."""

from redis.asyncio import Redis

from domain.campaign import Batch, Recipient
from store import batch_queue, redis_keys


def batch(number: int) -> Batch:
    return Batch(7, number, 1, 3, 1.5, 0.0, [0, 2], [Recipient(1, 11, "a@b.example", b"{}"), Recipient(3, 13, "ü@b.example", b'{"x": 1}')])


async def test_batches_come_out_as_they_went_in_and_in_order(redis: Redis) -> None:
    await batch_queue.push(redis, "marketing", [batch(1), batch(2), batch(3)])
    assert await batch_queue.lengths(redis, [(3, "marketing"), (4, "marketing")]) == {(3, "marketing"): 3, (4, "marketing"): 0}
    assert await batch_queue.take(redis, 3, "marketing", 2) == ([batch(1), batch(2)], 0)
    assert await batch_queue.take(redis, 3, "marketing", 2) == ([batch(3)], 0)
    assert await batch_queue.take(redis, 3, "marketing", 2) == ([], 0)


async def test_a_value_that_is_no_batch_is_counted_and_dropped(redis: Redis) -> None:
    await redis.rpush(redis_keys.queue(3, "marketing"), b"\xc1 not msgpack", b"\x93\x01\x02\x03")
    await batch_queue.push(redis, "marketing", [batch(1)])
    assert await batch_queue.take(redis, 3, "marketing", 10) == ([batch(1)], 2)


async def test_it_tells_how_many_queues_have_something_and_which(redis: Redis) -> None:
    assert await batch_queue.count_waiting(redis, [3, 4]) == 0
    assert await batch_queue.which_waiting(redis, [3, 4]) == set()
    await batch_queue.push(redis, "marketing", [batch(1), batch(2)])
    await redis.rpush(redis_keys.queue(4, "transactional"), b"x")
    assert await batch_queue.count_waiting(redis, [3, 4]) == 2
    assert await batch_queue.which_waiting(redis, [3, 4]) == {(3, "marketing"), (4, "transactional")}
    assert (await batch_queue.count_waiting(redis, []), await batch_queue.which_waiting(redis, [])) == (0, set())


async def test_a_wiped_redis_is_noticed(redis: Redis) -> None:
    assert await batch_queue.was_wiped(redis)
    await batch_queue.mark(redis)
    assert not await batch_queue.was_wiped(redis)
    await redis.flushall()
    assert await batch_queue.was_wiped(redis)
