"""A machine for end-to-end tests of the engine, on this test's own database and Redis."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from store.postgres import Pool
from tests import machine as machines


@pytest.fixture
async def machine(tmp_path: Path, pool: Pool, redis: Redis, fresh_database_url: str, redis_url: str) -> AsyncIterator[machines.Machine]:
    """Nothing runs on it yet."""
    async with machines.machine(tmp_path, fresh_database_url, redis_url) as made:
        yield made
