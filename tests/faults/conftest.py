"""One engine run for all faults that recipients can bring about; machines of their own for the rest."""

import secrets
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from store import embedded
from store.backends_check import run_apart
from store.postgres import Pool
from tests import machine as machines
from tests.conftest import _administer, with_database
from tests.faults import catalogue
from tests.faults.peers import Verdict, play


@pytest.fixture
async def machine(tmp_path: Path, pool: Pool, redis: Redis, fresh_database_url: str, redis_url: str) -> AsyncIterator[machines.Machine]:
    """Nothing runs on it yet."""
    async with machines.machine(tmp_path, fresh_database_url, redis_url) as made:
        yield made


@pytest.fixture(scope="session")
def verdicts(backends: embedded.Backends, template_database: str, redis_url: str) -> Iterator[dict[tuple[str, str], Verdict]]:
    """What became of every fault of `catalogue.FAULTS` in every mode: (name, mode) -> verdict. Played once, all at the same time."""
    name = f"sluice_faults_{secrets.token_hex(4)}"
    url = with_database(backends.database_url, name)

    async def run() -> dict[tuple[str, str], Verdict]:
        client = Redis.from_url(redis_url)
        await client.flushdb()
        try:
            with tempfile.TemporaryDirectory() as directory:
                async with machines.machine(Path(directory), url, redis_url) as machine:
                    return await play(machine, url, catalogue.FAULTS, 180.0)
        finally:
            await client.flushdb()
            await client.aclose()

    run_apart(lambda: _administer(backends.database_url, f"create database {name} template {template_database}"))
    yield run_apart(run)
    run_apart(lambda: _administer(backends.database_url, f"drop database if exists {name} with (force)"))
