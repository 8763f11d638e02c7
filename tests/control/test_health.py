"""Health, status and the API's description of itself."""

import json
from pathlib import Path

import httpx
import msgspec
import redis.asyncio as redis_client

from config.keys import Keyring
from config.settings import Settings
from control.app import Application, create_app
from control.openapi import finished
from store import batch_queue, redis_keys
from store.postgres import Pool
from tests.control.conftest import Client
from tests.control.test_campaigns import draft

DOCUMENT = Path(__file__).parents[2] / "docs" / "openapi.json"


async def test_health_needs_no_key(http: httpx.AsyncClient) -> None:
    assert (await http.get("/health/live")).json()["status"] == "ok"
    ready = await http.get("/health/ready")
    assert (ready.status_code, ready.json()) == (200, {"status": "ok", "postgresql": "ok", "redis": "ok"})


async def test_a_store_that_is_away_is_named_and_answered_503(pool: Pool, keyring: Keyring, settings: Settings, ada: Client) -> None:
    away = batch_queue.connect("redis://127.0.0.1:1", 1)
    app = create_app(pool, away, keyring, settings)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://sluice.example") as http:
        ready = await http.get("/health/ready")
        assert (ready.status_code, ready.json()["redis"], ready.json()["postgresql"]) == (503, "not answering", "ok")
        client = Client(http, ada.user_id, ada.key)
        assert (await client.ok("POST", "/lists", json={"name": "works without Redis"}))["id"]
        status = await client.ok("GET", "/status")
        assert (status["ok"], status["postgresql"]) == (False, "ok")
        assert status["trouble"][0].startswith("Redis: ")
        await pool.close()
        assert (await http.get("/health/ready")).json()["postgresql"] == "not answering"
        answer = await client.refused(503, "GET", "/lists")
        assert answer["type"] == "urn:sluice:problem:unavailable"
    await away.aclose()


async def test_status_shows_what_engines_say_of_delivery_servers(ada: Client, admin: Client, redis: redis_client.Redis) -> None:
    server = await ada.ok("POST", "/delivery-servers", json={"name": "relay", "host": "127.0.0.1"})
    before = await ada.ok("GET", "/status")
    assert (before["delivery_servers"][0]["state"], before["ok"]) == ("unknown", False)
    for engine, state, sentence in (("n.1", "idle", "nothing to send"), ("n.2", "suspended", "refused the user name or password")):
        path = {
            "delivery_server_id": server["id"],
            "name": "relay",
            "state": state,
            "sentence": sentence,
            "connections": 2,
            "delivered": 5,
            "extra": 1,
        }
        heartbeat = {"id": engine, "node": "n", "state": "running", "at": 1.5, "messages": 7, "trouble": [], "paths": [path]}
        await redis.set(redis_keys.engine_status(engine), msgspec.json.encode(heartbeat))
    await redis.set(redis_keys.engine_status("foreign"), b"\xff not json")
    await redis.rpush(redis_keys.queue(server["id"], "marketing"), b"x", b"y")
    status = await ada.ok("GET", "/status")
    shown = status["delivery_servers"][0]
    assert (shown["state"], shown["sentence"]) == ("suspended", "refused the user name or password")
    assert (shown["connections"], shown["delivered"], shown["queued_batches"]) == (4, 10, 2)
    assert status["trouble"] == ["delivery server relay: refused the user name or password"]
    assert [engine["id"] for engine in (await admin.ok("GET", "/status"))["engines"]] == ["n.1", "n.2"]


async def test_a_campaign_that_waits_for_a_server_that_is_switched_off_is_trouble(ada: Client) -> None:
    made = await draft(ada)
    await ada.ok("POST", f"/campaigns/{made['id']}/start")
    said = "campaign c: waits for delivery server c, which is switched off"
    assert said not in (await ada.ok("GET", "/status"))["trouble"]
    await ada.ok("PATCH", f"/delivery-servers/{made['delivery_server_id']}", json={"enabled": False})
    assert said in (await ada.ok("GET", "/status"))["trouble"]


async def test_status_says_what_an_inbound_process_has_lost_and_to_operators_only(
    ada: Client, admin: Client, redis: redis_client.Redis
) -> None:
    lost = "3 opens and clicks were lost since the start: the disk is full"
    heartbeat = {"id": "n:8080", "node": "n", "visits_recorded": 9, "visits_lost": 3, "visits_waiting_bytes": 2048, "trouble": [lost]}
    await redis.set(redis_keys.inbound_status("n:8080"), msgspec.json.encode(heartbeat))
    status = await admin.ok("GET", "/status")
    (shown,) = status["inbound_processes"]
    assert (shown["visits_recorded"], shown["visits_lost"], shown["visits_waiting_bytes"]) == (9, 3, 2048)
    assert f"inbound n:8080: {lost}" in status["trouble"]
    of_ada = await ada.ok("GET", "/status")
    assert of_ada["inbound_processes"] == []
    assert lost not in str(of_ada["trouble"])


async def test_the_description_in_docs_is_the_one_served(http: httpx.AsyncClient, app: Application) -> None:
    served = (await http.get("/docs/openapi.json")).json()
    assert served == finished(app.litestar.openapi_schema.to_schema())
    assert json.loads(DOCUMENT.read_text()) == served, "write it anew: python -m control.openapi > docs/openapi.json"
    for path, operations in served["paths"].items():
        for method, operation in operations.items():
            assert operation["operationId"], (method, path)
            assert operation["summary"], (method, path)


async def test_the_docs_page_asks_no_other_host(http: httpx.AsyncClient) -> None:
    page = await http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "http" not in page.text.replace("http-equiv", "")
    for name in ("swagger-ui-bundle.js", "swagger-ui.css", "start.js", "favicon-32x32.png"):
        assert f"/docs/static/{name}" in page.text
        assert (await http.get(f"/docs/static/{name}")).status_code == 200
    assert (await http.get("/docs/static/../../app.py")).status_code == 404
