"""API keys, scopes, and that what belongs to somebody else does not exist."""

import asyncio
from pathlib import Path

import httpx
import pytest

from control import guards
from control.app import Application
from domain.errors import Invalid
from store import users
from store.postgres import Pool, connection
from tests.control.conftest import Client

SERVER = {"name": "relay", "host": "127.0.0.1", "port": 2525, "mfrom": "bounce.news.example"}
CAMPAIGN = {"name": "c", "subject": "Hello {{ first_name }}", "from_email": "news@news.example", "text": "Hi"}


async def test_without_a_valid_key_nothing_is_told(http: httpx.AsyncClient, ada: Client) -> None:
    wrong = [
        None,
        "",
        "Bearer",
        "Bearer x",
        f"Basic {ada.key}",
        f"Bearer {ada.key}x",
        f"Bearer {ada.key[:-1]}",
        f"Bearer {ada.key} {ada.key}",
        "Bearer slk_" + "0" * 12 + "_" + "x" * 43,
        "Bearer " + "x" * 100_000,
        "Bearer sl\u00e4k_\x7f".encode("latin-1"),
    ]
    for value in wrong:
        headers = {} if value is None else {b"authorization": value if isinstance(value, bytes) else value.encode()}
        for path in ("/api/v1/me", "/api/v1/no-such-thing", f"/api/v1/me?key={ada.key}"):
            response = await http.get(path, headers=headers)
            assert response.status_code == 401, value
            assert response.json()["type"] == "urn:sluice:problem:unauthorized"
    two = await http.get("/api/v1/me", headers=[("authorization", f"Bearer {ada.key}"), ("authorization", f"Bearer {ada.key}")])
    assert two.status_code == 401


async def test_many_wrong_keys_are_limited_and_a_good_one_still_works(http: httpx.AsyncClient, ada: Client) -> None:
    await ada.ok("GET", "/me")
    statuses = []
    for i in range(70):
        headers = {"authorization": f"Bearer slk_aaaaaaaaaaaa_{i:043d}", "x-forwarded-for": f"192.0.2.{i}"}
        statuses.append((await http.get("/api/v1/me", headers=headers)).status_code)
    assert statuses[:50] == [401] * 50
    assert statuses[-1] == 429
    assert (await ada.ok("GET", "/me"))["scope"] == "user"


async def test_a_revoked_key_stops_within_seconds(ada: Client, app: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await ada.ok("POST", f"/users/{ada.user_id}/api-keys", json={"name": "second"})
    second = Client(ada.http, ada.user_id, made["key"])
    await second.ok("GET", "/me")
    await ada.ok("DELETE", f"/users/{ada.user_id}/api-keys/{made['id']}")
    assert guards.CACHE_SECONDS < 5
    monkeypatch.setattr(guards, "CACHE_SECONDS", 0.0)
    await second.refused(401, "GET", "/me")
    keys = (await ada.ok("GET", f"/users/{ada.user_id}/api-keys"))["items"]
    assert [bool(key["revoked_at"]) for key in keys] == [False, True]
    assert all("key" not in key and "hash" not in key for key in keys)


async def test_a_key_is_stored_as_its_hash_only(ada: Client, pool: Pool) -> None:
    text = await pool.fetchval("select string_agg(k::text, ' ') from api_keys k")
    assert ada.key not in text
    assert ada.key.rpartition("_")[2] not in text
    assert await pool.fetchval("select hash = sha256($1) from api_keys where user_id = $2", ada.key.encode(), ada.user_id)


async def test_a_disabled_user_is_out(admin: Client, ada: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "CACHE_SECONDS", 0.0)
    await admin.ok("PATCH", f"/users/{ada.user_id}", json={"disabled": True})
    await ada.refused(401, "GET", "/me")
    await admin.ok("PATCH", f"/users/{ada.user_id}", json={"disabled": False})
    await ada.ok("GET", "/me")
    await admin.refused(422, "PATCH", f"/users/{admin.user_id}", json={"disabled": True})


async def test_only_admins_manage_users(admin: Client, ada: Client, eve: Client) -> None:
    made = await admin.ok("POST", "/users", json={"name": "zoë", "email": "Zoe@news.example"})
    assert (made["name"], made["email"]) == ("zoë", "Zoe@news.example")
    await admin.refused(409, "POST", "/users", json={"name": "zoë"})
    for method, path in (("POST", "/users"), ("GET", "/users"), ("GET", f"/users/{made['id']}"), ("PATCH", f"/users/{made['id']}")):
        await ada.refused(403, method, path, json={"name": "x"})
    await ada.refused(404, "POST", f"/users/{eve.user_id}/api-keys", json={})
    await ada.refused(404, "GET", f"/users/{eve.user_id}/api-keys")
    await ada.refused(422, "POST", f"/users/{ada.user_id}/api-keys", json={"scope": "admin"})
    page = await admin.ok("GET", "/users?limit=2")
    assert len(page["items"]) == 2
    rest = await admin.ok("GET", f"/users?after={page['next']}&limit=100")
    assert {user["name"] for user in page["items"] + rest["items"]} == {"ada", "eve", "root", "zoë"}


async def test_what_is_ada_s_does_not_exist_for_eve(ada: Client, eve: Client, admin: Client, pool: Pool) -> None:
    server = await ada.ok("POST", "/delivery-servers", json=SERVER)
    news = await ada.ok("POST", "/lists", json={"name": "news"})
    field = await ada.ok("POST", f"/lists/{news['id']}/fields", json={"name": "first_name"})
    reader = await ada.ok("POST", f"/lists/{news['id']}/subscribers", json={"email": "a@news.example"})
    body = b"email\nb@news.example\nbad\n"
    imported = await ada.ok("POST", f"/lists/{news['id']}/imports", content=body, headers={"content-type": "text/csv"})
    campaign = await ada.ok("POST", "/campaigns", json={**CAMPAIGN, "list_id": news["id"], "delivery_server_id": server["id"]})
    await ada.ok("POST", "/suppressions", json={"emails": ["x@news.example"]})
    suppression = (await ada.ok("GET", "/suppressions"))["items"][0]
    own_server = await eve.ok("POST", "/delivery-servers", json=SERVER)
    own_list = await eve.ok("POST", "/lists", json={"name": "news"})
    own = await eve.ok("POST", "/campaigns", json={**CAMPAIGN, "list_id": own_list["id"], "delivery_server_id": own_server["id"]})
    before = await snapshot(pool)

    requests: list[tuple[str, str, object]] = [
        *[(method, f"/delivery-servers/{server['id']}", {"port": 1}) for method in ("GET", "PATCH", "DELETE")],
        ("POST", f"/delivery-servers/{server['id']}/test", {"to": "a@news.example"}),
        *[(method, f"/lists/{news['id']}", {"name": "x"}) for method in ("GET", "PATCH", "DELETE")],
        ("GET", f"/lists/{news['id']}/fields", None),
        ("POST", f"/lists/{news['id']}/fields", {"name": "x"}),
        ("DELETE", f"/lists/{news['id']}/fields/{field['id']}", None),
        ("DELETE", f"/lists/{own_list['id']}/fields/{field['id']}", None),
        ("GET", f"/lists/{news['id']}/subscribers", None),
        ("POST", f"/lists/{news['id']}/subscribers", {"email": "b@news.example"}),
        *[
            (method, f"/lists/{at}/subscribers/{reader['id']}", {"state": "bounced"})
            for method in ("GET", "PATCH")
            for at in (news["id"], own_list["id"])
        ],
        ("GET", f"/lists/{own_list['id']}/subscribers/a@news.example", None),
        ("GET", f"/lists/{news['id']}/imports", None),
        ("GET", f"/imports/{imported['id']}", None),
        ("GET", f"/imports/{imported['id']}/refusals", None),
        *[(method, f"/campaigns/{campaign['id']}", {"name": "x"}) for method in ("GET", "PATCH", "DELETE")],
        *[("POST", f"/campaigns/{campaign['id']}/{verb}", None) for verb in ("start", "pause", "resume", "cancel")],
        *[
            ("GET", f"/campaigns/{campaign['id']}/{what}", None)
            for what in ("progress", "report", "recipients/1", "recipients/a@news.example")
        ],
        ("POST", "/campaigns", {**CAMPAIGN, "list_id": news["id"], "delivery_server_id": own_server["id"]}),
        ("POST", "/campaigns", {**CAMPAIGN, "list_id": own_list["id"], "delivery_server_id": server["id"]}),
        ("PATCH", f"/campaigns/{own['id']}", {"list_id": news["id"]}),
        ("PATCH", f"/campaigns/{own['id']}", {"delivery_server_id": server["id"]}),
        ("POST", "/suppressions", {"emails": ["a@news.example"], "scope": "list", "list_id": news["id"]}),
        ("GET", f"/suppressions?list_id={news['id']}", None),
        ("GET", f"/suppressions/check?email=a@news.example&list_id={news['id']}", None),
        ("DELETE", f"/suppressions/{suppression['id']}", None),
    ]
    for method, path, content in requests:
        await eve.refused(404, method, path, **({"json": content} if content is not None else {}))
    await eve.refused(404, "POST", f"/lists/{news['id']}/imports", content=body, headers={"content-type": "text/csv"})
    assert await snapshot(pool) == before
    for path in ("/delivery-servers", "/lists", "/campaigns"):
        assert len((await eve.ok("GET", path))["items"]) == 1
        assert len((await admin.ok("GET", path))["items"]) == 2
    assert (await eve.ok("GET", "/suppressions"))["items"] == []
    assert [s["id"] for s in (await eve.ok("GET", "/status"))["delivery_servers"]] == [own_server["id"]]


async def snapshot(pool: Pool) -> list[str]:
    """Everything stored, as text."""
    tables = ("users", "api_keys", "delivery_servers", "lists", "custom_fields", "subscribers", "imports", "suppressions", "campaigns")
    return [await pool.fetchval(f"select string_agg(t::text, ' ' order by t::text) from {table} t") for table in tables]


async def test_the_first_admin_key_is_made_once_by_however_many_start(pool: Pool, tmp_path: Path) -> None:
    path = tmp_path / "state" / "admin.key"
    keys = set(await asyncio.gather(*(users.ensure_admin(pool, path) for _ in range(5))))
    assert len(keys) == 1
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text().strip() in keys
    assert await pool.fetchval("select count(*) from users") == 1
    assert await pool.fetchval("select count(*) from api_keys") == 1
    async with connection(pool) as conn:
        owner = await users.find_key(conn, users.prefix_of(keys.pop()) or "")
    assert owner is not None
    assert owner.scope == "admin"


async def test_an_admin_key_from_the_settings_replaces_none(pool: Pool, tmp_path: Path) -> None:
    path = tmp_path / "admin.key"
    made = await users.ensure_admin(pool, path)
    given = "a key of the operator's own choosing"
    assert await users.ensure_admin(pool, path, given) == given
    assert await users.ensure_admin(pool, path, given) == given
    assert await users.ensure_admin(pool, path) == made
    assert await pool.fetchval("select count(*) from api_keys") == 2
    with pytest.raises(Invalid, match="control.admin_key"):
        await users.ensure_admin(pool, path, "short")


async def test_a_user_belongs_to_a_group_of_the_operators_own_numbering(admin: Client, ada: Client) -> None:
    assert (await ada.ok("GET", "/me"))["user"]["group_id"] == 0
    assert (await admin.ok("PATCH", f"/users/{ada.user_id}", json={"group_id": 12}))["group_id"] == 12
    await admin.ok("PATCH", f"/users/{ada.user_id}", json={"email": "ada@corp.example"})
    assert (await ada.ok("GET", "/me"))["user"]["group_id"] == 12
    assert (await admin.call("PATCH", f"/users/{ada.user_id}", json={"group_id": -1})).status_code in (400, 422)
