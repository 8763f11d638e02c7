"""control.console over HTTP on real stores: signing in, what each page shows, what only its own forms may do."""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import redis.asyncio
import uvicorn

from config.keys import Keyring
from config.settings import Settings
from control.app import create_app
from store import users
from store.postgres import Pool


class Browser:
    """A client with cookies that follows no redirect and sends what a browser sends."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.http = aiohttp.ClientSession(base, cookie_jar=aiohttp.CookieJar(unsafe=True))

    async def get(self, path: str, **headers: str) -> tuple[int, dict[str, str], str]:
        async with self.http.get(path, allow_redirects=False, headers=headers) as answer:
            return answer.status, {name.lower(): value for name, value in answer.headers.items()}, await answer.text()

    async def post(self, path: str, origin: str | None = "", **fields: str) -> tuple[int, dict[str, str], str]:
        headers = {} if origin is None else {"Origin": origin or self.base}
        async with self.http.post(path, data=fields, allow_redirects=False, headers=headers) as answer:
            return answer.status, {name.lower(): value for name, value in answer.headers.items()}, await answer.text()


class Machine:
    """A control process with two users, each with a campaign and a delivery server."""

    def __init__(self, pool: Pool, base: str) -> None:
        self.pool = pool
        self.base = base
        self.keys: dict[str, str] = {}
        self.campaigns: dict[str, int] = {}
        self.servers: dict[str, int] = {}
        self.browsers: list[Browser] = []

    def browser(self) -> Browser:
        self.browsers.append(Browser(self.base))
        return self.browsers[-1]

    async def signed_in(self, who: str) -> Browser:
        browser = self.browser()
        status, headers, _ = await browser.post("/login", key=self.keys[who])
        assert (status, headers["location"]) == (303, "/")
        return browser

    async def add(self, name: str, scope: str) -> None:
        key, prefix, hashed = users.make_key()
        user = await self.pool.fetchval("insert into users (name) values ($1) returning id", name)
        await self.pool.execute("insert into api_keys (user_id, scope, prefix, hash) values ($1, $2, $3, $4)", user, scope, prefix, hashed)
        listed = await self.pool.fetchval("insert into lists (user_id, name) values ($1, 'L') returning id", user)
        server = await self.pool.fetchval(
            "insert into delivery_servers (user_id, name, host, port, security) values ($1, $2, '127.0.0.1', 1, 'none') returning id",
            user,
            f"relay of {name}",
        )
        campaign = await self.pool.fetchval(
            "insert into campaigns (user_id, name, state, list_id, delivery_server_id, subject, recipients, batches, started_at) "
            "values ($1, $2, 'running', $3, $4, 'Hello', 1000, 2, now()) returning id",
            user,
            f"<b>News</b> of {name}",
            listed,
            server,
        )
        await self.pool.execute(
            "insert into campaign_totals (campaign_id, journal, delivered, bounced) values ($1, 'j', 600, 20)", campaign
        )
        self.keys[name], self.campaigns[name], self.servers[name] = key, campaign, server


@pytest.fixture
async def machine(pool: Pool, redis: redis.asyncio.Redis) -> AsyncIterator[Machine]:
    app: Any = create_app(pool, redis, Keyring(bytes(32)), Settings())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="on", ws="none"))
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    task = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.01)
        assert not task.done()
    port = server.servers[0].sockets[0].getsockname()[1]
    made = Machine(pool, f"http://127.0.0.1:{port}")
    for name, scope in (("ada", "user"), ("grace", "user"), ("root", "admin")):
        await made.add(name, scope)
    yield made
    for browser in made.browsers:
        await browser.http.close()
    server.should_exit = True
    await task


async def test_a_stranger_is_sent_to_the_sign_in(machine: Machine) -> None:
    browser = machine.browser()
    for path in ("/", "/campaigns", f"/campaigns/{machine.campaigns['ada']}", "/delivery-servers"):
        status, headers, _ = await browser.get(path)
        assert (status, headers["location"]) == (303, "/login")
        assert (await browser.get(path, **{"X-Console-Refresh": "1"}))[0] == 401
    status, headers, text = await browser.get("/login")
    assert status == 200
    assert 'name="key"' in text
    assert "default-src 'self'" in headers["content-security-policy"]


async def test_a_wrong_key_is_refused_and_never_shown(machine: Machine) -> None:
    browser = machine.browser()
    for key in ("", "slk_aaaaaaaaaaaa_bbbb", machine.keys["ada"] + "x", "\x00", "é" * 300):
        status, headers, text = await browser.post("/login", key=key)
        assert status == 401
        assert "set-cookie" not in headers
        assert not key or key not in text
    assert (await browser.get("/"))[0] == 303


async def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(machine: Machine, redis: redis.asyncio.Redis) -> None:
    browser = machine.browser()
    _, headers, _ = await browser.post("/login", key=machine.keys["ada"])
    cookie = headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    token = re.match(r"sluice_session=([^;]+)", headers["set-cookie"])
    assert token
    dump = repr([(key, await redis.get(key)) for key in await redis.keys("*")])
    assert "sluice:console:" in dump
    assert token[1] not in dump
    assert machine.keys["ada"] not in dump


async def test_forms_of_other_sites_do_nothing(machine: Machine) -> None:
    browser = await machine.signed_in("ada")
    path = f"/campaigns/{machine.campaigns['ada']}/pause"
    for origin in ("https://evil.example", "null", None, machine.base.replace("127.0.0.1", "127.0.0.1.evil.example")):
        assert (await browser.post(path, origin))[0] == 403
        assert (await browser.post("/login", origin, key=machine.keys["ada"]))[0] == 403
    assert await machine.pool.fetchval("select state from campaigns where id = $1", machine.campaigns["ada"]) == "running"


async def test_signing_out_ends_the_session(machine: Machine, redis: redis.asyncio.Redis) -> None:
    browser = await machine.signed_in("ada")
    assert (await browser.post("/logout"))[0] == 303
    assert (await browser.get("/"))[0] == 303
    assert await redis.keys("sluice:console:*") == []


async def test_a_revoked_key_ends_its_sessions(machine: Machine) -> None:
    browser = await machine.signed_in("ada")
    assert (await browser.get("/"))[0] == 200
    await machine.pool.execute("update api_keys set revoked_at = now()")
    assert (await browser.get("/"))[0] == 303


async def test_every_page_shows_its_own_user_only_and_an_admin_everybody(machine: Machine) -> None:
    ada, root = await machine.signed_in("ada"), await machine.signed_in("root")
    for path in ("/", "/campaigns", "/delivery-servers"):
        status, headers, text = await ada.get(path)
        assert (status, headers["cache-control"]) == (200, "no-store")
        assert "of ada" in text
        assert "of grace" not in text
        assert "of grace" in (await root.get(path))[2]
    foreign = machine.campaigns["grace"]
    assert (await ada.get(f"/campaigns/{foreign}"))[0] == 404
    assert (await ada.post(f"/campaigns/{foreign}/cancel"))[0] == 404
    assert (await ada.post(f"/delivery-servers/{machine.servers['grace']}/test", to="a@b.example"))[0] == 404
    assert await machine.pool.fetchval("select state from campaigns where id = $1", foreign) == "running"


async def test_what_users_wrote_is_text_and_nothing_runs_inline(machine: Machine) -> None:
    browser = await machine.signed_in("ada")
    for path in ("/", "/campaigns", f"/campaigns/{machine.campaigns['ada']}", "/delivery-servers", "/login"):
        text = (await browser.get(path))[2]
        assert "<b>News" not in text
        assert not re.search(r"<script(?![^>]*\bsrc=\"/)|<style|\sstyle=|\son\w+=|https?://(?!www\.w3\.org)", text)


async def test_a_campaign_is_paused_resumed_and_cancelled(machine: Machine) -> None:
    browser = await machine.signed_in("ada")
    path = f"/campaigns/{machine.campaigns['ada']}"
    text = (await browser.get(path))[2]
    assert "62.0 %" in text
    assert f'action="{path}/pause"' in text
    for action, state, following in (("pause", "paused", "resume"), ("resume", "preparing", "pause"), ("cancel", "cancelling", None)):
        status, headers, _ = await browser.post(f"{path}/{action}")
        assert (status, headers["location"]) == (303, path)
        text = (await browser.get(path))[2]
        assert f">{state}</span>" in text
        assert following is None or f'action="{path}/{following}"' in text
    status, _, text = await browser.post(f"{path}/resume")
    assert status == 409
    assert 'role="alert"' in text
    assert (await browser.post(f"{path}/explode"))[0] == 404
    assert (await browser.get("/campaigns/999999999999"))[0] == 404


async def test_a_delivery_server_is_tested_for_real(machine: Machine) -> None:
    browser = await machine.signed_in("ada")
    path = f"/delivery-servers/{machine.servers['ada']}/test"
    status, _, text = await browser.post(path, to="someone@reader.example")
    assert status == 200
    assert "at stage connect" in text
    assert (await browser.post(path, to="nonsense"))[0] == 422


async def test_a_path_that_leads_nowhere_is_a_page_for_browsers_and_a_problem_for_programs(machine: Machine) -> None:
    browser = machine.browser()
    for path, accepted, kind in (("/nothing", "text/html,*/*", "text/html"), ("/nothing", "*/*", "application/problem+json"),
                                 ("/api/v1/nothing", "text/html", "application/problem+json")):  # fmt: skip
        status, headers, _ = await browser.get(path, Accept=accepted)
        assert (status, headers["content-type"].partition(";")[0]) == (401 if path.startswith("/api") else 404, kind)


async def test_static_files_are_served_and_nothing_besides(machine: Machine) -> None:
    browser = machine.browser()
    for name, kind in (("console.css", "text/css"), ("console.js", "javascript"), ("icon.svg", "image/svg+xml")):
        status, headers, _ = await browser.get(f"/static/{name}")
        assert status == 200
        assert kind in headers["content-type"]
    for name in ("../routes.py", "..%2froutes.py", "%2e%2e/session.py", "nothing.css"):
        assert (await browser.get(f"/static/{name}"))[0] == 404


async def test_without_redis_the_page_says_so(pool: Pool) -> None:
    away = redis.asyncio.Redis.from_url("redis://127.0.0.1:1", socket_connect_timeout=1)
    app: Any = create_app(pool, away, Keyring(bytes(32)), Settings())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="on", ws="none"))
    task = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.01)
    browser = Browser(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}")
    try:
        async with browser.http.get("/", headers={"Cookie": "sluice_session=abc"}, allow_redirects=False) as answer:
            assert answer.status == 503
            assert "A store does not answer" in await answer.text()
    finally:
        await browser.http.close()
        server.should_exit = True
        await task
        await away.aclose()
