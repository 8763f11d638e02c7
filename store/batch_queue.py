"""The queue of announced batches in Redis. It announces; `store.leases` grants (keys: `redis_keys`)."""

import secrets
from collections.abc import Iterable, Sequence

import msgspec
import redis.asyncio
import redis.asyncio.retry
import redis.backoff
import redis.exceptions

from domain.campaign import Batch, BatchIdentity
from store import redis_keys

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Batch).decode
_decode_identity = msgspec.msgpack.Decoder(BatchIdentity).decode  # looks at no recipient

RedisError = redis.exceptions.RedisError
Queue = tuple[int, str]  # (delivery server, priority class)


def connect(url: str, timeout_seconds: float) -> redis.asyncio.Redis:
    """A client whose every command is bounded by `timeout_seconds`; nothing is connected before the first command."""
    # One retry at once for a connection that broke while it lay idle; what fails again is the caller's to wait for.
    once = redis.asyncio.retry.Retry(redis.backoff.NoBackoff(), 1, supported_errors=(redis.exceptions.ConnectionError,))
    return redis.asyncio.Redis.from_url(
        url, socket_timeout=timeout_seconds, socket_connect_timeout=timeout_seconds, health_check_interval=30, retry=once
    )


async def lengths(client: redis.asyncio.Redis, queues: Iterable[Queue]) -> dict[Queue, int]:
    """How many batches are announced and not taken, in each of `queues`; one round trip."""
    keys = {queue: redis_keys.queue(*queue) for queue in queues}
    if not keys:
        return {}
    async with client.pipeline(transaction=False) as pipeline:
        for key in keys.values():
            pipeline.llen(key)
        found = await pipeline.execute(raise_on_error=False)
    counts = dict.fromkeys(keys, 0)
    for (queue, key), count in zip(keys.items(), found, strict=True):
        if isinstance(count, redis.exceptions.ResponseError):
            await _remove_foreign(client, key, count)
        elif isinstance(count, Exception):
            raise count
        else:
            counts[queue] = count
    return counts


async def _remove_foreign(client: redis.asyncio.Redis, key: str, error: redis.exceptions.ResponseError) -> None:
    """A value of another type under our name would block the queue for ever; what it replaced is announced anew."""
    if not str(error).startswith("WRONGTYPE"):
        raise error
    await client.delete(key)


async def count_waiting(client: redis.asyncio.Redis, delivery_server_ids: Iterable[int]) -> int:
    """How many queues of these delivery servers, one per priority class, have something; one command for all of them."""
    keys = [redis_keys.queue(server, mail_class) for server in delivery_server_ids for mail_class in redis_keys.PRIORITY_CLASSES]
    return int(await client.exists(*keys)) if keys else 0


async def which_waiting(client: redis.asyncio.Redis, delivery_server_ids: Iterable[int]) -> set[Queue]:
    """Those queues; one round trip."""
    queues = [(server, mail_class) for server in delivery_server_ids for mail_class in redis_keys.PRIORITY_CLASSES]
    async with client.pipeline(transaction=False) as pipeline:
        for queue in queues:
            pipeline.exists(redis_keys.queue(*queue))
        found = await pipeline.execute() if queues else []
    return {queue for queue, there in zip(queues, found, strict=True) if there}


async def head(client: redis.asyncio.Redis, delivery_server_id: int, priority_class: str) -> BatchIdentity | None:
    """Which batch will be taken next; None when there is none that can be read."""
    value: bytes | None = await client.lindex(redis_keys.queue(delivery_server_id, priority_class), 0)  # type: ignore[assignment]
    if not value:
        return None
    try:
        return _decode_identity(value)
    except msgspec.MsgspecError:
        return None


async def push(client: redis.asyncio.Redis, priority_class: str, batches: Sequence[Batch]) -> None:
    """Announce batches of one delivery server, in order."""
    if batches:
        await client.rpush(redis_keys.queue(batches[0].delivery_server_id, priority_class), *map(_encode, batches))


async def take(client: redis.asyncio.Redis, delivery_server_id: int, priority_class: str, count: int) -> tuple[list[Batch], int]:
    """Take up to `count` announced batches. Returns them and how many values were no batch (foreign or cut off: dropped)."""
    key = redis_keys.queue(delivery_server_id, priority_class)
    values: list[bytes] | None
    batches: list[Batch] = []
    unreadable = 0
    try:
        values = await client.lpop(key, count)  # type: ignore[assignment]
    except redis.exceptions.ResponseError as error:
        await _remove_foreign(client, key, error)
        values, unreadable = None, 1
    for value in values or ():
        try:
            batches.append(_decode(value))
        except msgspec.MsgspecError:
            unreadable += 1
    return batches, unreadable


async def was_wiped(client: redis.asyncio.Redis) -> bool:
    """Tell whether Redis has lost everything since the last `mark`."""
    return not await client.exists(redis_keys.GENERATION)


async def mark(client: redis.asyncio.Redis) -> None:
    """Leave the sign whose absence `was_wiped` reads as a wipe."""
    await client.set(redis_keys.GENERATION, secrets.token_hex(8))


async def publish_change(client: redis.asyncio.Redis, what: str) -> None:
    """Tell every engine at once that `what` (campaigns, egress, suppressions) changed; they also look by themselves every second."""
    await client.publish(redis_keys.CHANGES, what)
