"""The API over real stores, called in process; and a second user to look for what leaks."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import redis.asyncio as redis_client

from config.keys import Keyring
from config.settings import Control, Settings
from control.app import Application, create_app
from store import users
from store.postgres import Pool, transaction

MAX_BODY_BYTES = 256 * 1024


@dataclass
class Client:
    """One caller: requests with their key; answers as (status, JSON)."""

    http: httpx.AsyncClient
    user_id: int
    key: str

    async def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        """A request below /api/v1."""
        headers = {"authorization": f"Bearer {self.key}", **options.pop("headers", {})}
        return await self.http.request(method, f"/api/v1{path}", headers=headers, **options)

    async def ok(self, method: str, path: str, **options: Any) -> Any:
        """The JSON of a request that must succeed."""
        response = await self.call(method, path, **options)
        assert response.is_success, response.text
        return response.json() if response.content else None

    async def refused(self, status: int, method: str, path: str, **options: Any) -> dict[str, Any]:
        """The problem of a request that must be refused so."""
        response = await self.call(method, path, **options)
        assert response.status_code == status, (response.status_code, response.text)
        assert response.headers["content-type"] == "application/problem+json"
        answer: dict[str, Any] = response.json()
        assert answer["status"] == status
        assert answer["title"]
        return answer


@pytest.fixture
def settings() -> Settings:
    """Defaults, with a small limit for bodies."""
    return Settings(control=Control(max_body_bytes=MAX_BODY_BYTES))


@pytest.fixture
def keyring() -> Keyring:
    """Any key will do."""
    return Keyring(bytes(range(32)))


@pytest.fixture
def app(pool: Pool, redis: redis_client.Redis, keyring: Keyring, settings: Settings) -> Application:
    """The application on fresh stores."""
    return create_app(pool, redis, keyring, settings)


@pytest.fixture
async def http(app: Application) -> AsyncIterator[httpx.AsyncClient]:
    """A client without a key."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://sluice.example", timeout=30) as client:
        yield client


@pytest.fixture
def make_client(pool: Pool, http: httpx.AsyncClient) -> Callable[[str, users.Scope], Awaitable[Client]]:
    """Makes a user with a key."""

    async def make(name: str, scope: users.Scope = "user") -> Client:
        async with transaction(pool) as conn:
            user = await users.create_user(conn, name)
            _, key = await users.create_key(conn, user.id, "test", scope)
        return Client(http, user.id, key)

    return make


@pytest.fixture
async def ada(make_client: Callable[[str, users.Scope], Awaitable[Client]]) -> Client:
    """A user."""
    return await make_client("ada", "user")


@pytest.fixture
async def eve(make_client: Callable[[str, users.Scope], Awaitable[Client]]) -> Client:
    """Another user, who must never see what is Ada's."""
    return await make_client("eve", "user")


@pytest.fixture
async def admin(make_client: Callable[[str, users.Scope], Awaitable[Client]]) -> Client:
    """An administrator."""
    return await make_client("root", "admin")
