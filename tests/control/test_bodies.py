"""Odd requests: whatever comes, the answer is a problem and never a failure of ours."""

import json
import random
from collections.abc import AsyncIterator

import httpx

from control.app import Application
from tests.control.conftest import MAX_BODY_BYTES, Client

JSON = {"content-type": "application/json"}


async def test_json_that_cannot_be_read_is_400(ada: Client) -> None:
    for body in (
        b"{",
        b'{"name": "a", "name": "b"}',
        b'{"name": NaN}',
        b'{"name": Infinity}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"name": "\xff"}',
        b"\xff\xfe{\x00}\x00",
        b"\xef\xbb\xbf{}",
        b'{"name": ' + b"9" * 5000 + b"}",
        b'{"name": "a\nb"}',
        b"{} {}",
        b"'a'",
        b"\0",
    ):
        await ada.refused(400, "POST", "/lists", content=body, headers=JSON)


async def test_text_nobody_can_store_is_422_and_named(ada: Client) -> None:
    answer = await ada.refused(422, "POST", "/lists", content=b'{"name": "a\\u0000b"}', headers=JSON)
    assert answer["errors"] == [{"field": "name", "reason": "contains a NUL character"}]
    answer = await ada.refused(422, "POST", "/suppressions", content=b'{"emails": ["a@b.example", "\\ud800"]}', headers=JSON)
    assert answer["errors"][0]["field"] == "emails[1]"


async def test_wrong_shapes_are_422(ada: Client) -> None:
    for body in ("[]", "null", "7", '"x"', "{}", '{"name": null}', '{"name": 7}', '{"name": ["x"]}', '{"name": "x", "more": 1}'):
        answer = await ada.refused(422, "POST", "/lists", content=body.encode(), headers=JSON)
        assert answer["errors"]
    await ada.refused(422, "POST", "/lists", headers=JSON)
    answer = await ada.refused(422, "POST", "/lists", content=b"{}", headers=JSON)
    assert answer["errors"] == [{"field": "name", "reason": "is required"}]
    answer = await ada.refused(422, "POST", "/lists", content=b"", headers=JSON)
    assert answer["errors"] == [{"field": "body", "reason": "is empty; send a JSON object"}]


async def test_what_is_allowed_is_named_in_the_caller_s_words(ada: Client) -> None:
    made = await ada.ok("POST", "/lists", json={"name": "x"})
    answer = await ada.refused(422, "POST", f"/lists/{made['id']}/fields", json={"name": "plan", "kind": "money"})
    assert answer["errors"] == [{"field": "kind", "reason": "must be one of date, list, number, text, not 'money'"}]
    answer = await ada.refused(422, "GET", "/campaigns?state=nonsense")
    assert answer["errors"][0]["field"] == "state"
    assert "draft" in answer["errors"][0]["reason"]
    assert (await ada.refused(404, "GET", "/nothing"))["detail"] == "there is no such path; /docs shows them all"
    assert "GET" in (await ada.refused(405, "PUT", "/lists"))["detail"]


async def test_sizes_and_types(ada: Client) -> None:
    await ada.refused(413, "POST", "/lists", content=b" " * (MAX_BODY_BYTES + 1), headers=JSON)

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b" " * 65536

    await ada.refused(413, "POST", "/lists", content=endless(), headers=JSON)
    await ada.refused(415, "POST", "/lists", content=b"name=x", headers={"content-type": "application/x-www-form-urlencoded"})
    await ada.refused(415, "POST", "/lists", content=b'{"name":"x"}')
    await ada.refused(415, "POST", "/lists", content=b"x", headers={**JSON, "content-encoding": "gzip"})
    many = json.dumps({"emails": ["a@b.example"] * 10_001}).encode()
    assert len(many) < MAX_BODY_BYTES
    await ada.refused(422, "POST", "/suppressions", content=many, headers=JSON)


async def test_pages_and_ids_out_of_range(ada: Client) -> None:
    for query in (
        "limit=0",
        "limit=1001",
        "limit=1000000000",
        "limit=x",
        "limit=-1",
        "after=-1",
        "after=99999999999999999999",
        "after=x",
        "after=1.5",
    ):
        await ada.refused(422, "GET", f"/lists?{query}")
    for path in ("0", "-1", "99999999999999999999999", "x", "1;drop", "%00", "..%2f..", "1%2F2", "9223372036854775807", "\u0661"):
        await ada.refused(404, "GET", f"/lists/{path}")
    await ada.refused(405, "PUT", "/lists")
    await ada.refused(404, "GET", "/nothing")


async def test_fragments_of_other_languages_are_only_text(ada: Client) -> None:
    for text in (
        "'; drop table lists; --",
        "$1",
        "%s",
        "*1\\r\\n$4",
        "../../etc/passwd",
        "{{ 7 * 7 }}",
        "<script>",
        "\u202eevil",
        "\U0001f4a9",
    ):
        made = await ada.ok("POST", "/lists", json={"name": text})
        assert (await ada.ok("GET", f"/lists/{made['id']}"))["name"] == text


VALUES: list[object] = [
    *(None, True, 0, -1, 1, 2**31, 2**63 - 1, 2**63, 10**40, 1.5, 1e308),
    *("", " ", "a", "a@b.example", "a" * 5000, "\r\n", "\u2028", "\ud7ff", "é", "2020-01-01", "user", "system", "list", "draft"),
    *("{{ x }}", "{% if %}", "{{" * 500),
    *([], [[]], ["a"], [1], [None], {}, {"": ""}, {"a": {"b": {"c": []}}}),
]


async def test_random_requests_never_fail_us(app: Application, ada: Client, http: httpx.AsyncClient) -> None:
    server = await ada.ok("POST", "/delivery-servers", json={"name": "s", "host": "127.0.0.1", "mfrom": "b.example.org"})
    news = await ada.ok("POST", "/lists", json={"name": "l"})
    bodies: dict[str, list[str]] = {
        "POST /users/{u}/api-keys": ["name", "scope"],
        "POST /delivery-servers": [*server, "password"],
        "PATCH /delivery-servers/{s}": [*server, "password"],
        "POST /lists": ["name", "sender_name", "sender_email"],
        "PATCH /lists/{l}": ["name", "sender_name", "sender_email"],
        "POST /lists/{l}/fields": ["name", "kind"],
        "POST /lists/{l}/subscribers": ["email", "data"],
        "POST /campaigns": [
            "name",
            "list_id",
            "delivery_server_id",
            "subject",
            "mail_class",
            "from_name",
            "from_email",
            "reply_to",
            "html",
            "text",
        ],
        "POST /suppressions": ["emails", "scope", "list_id", "reason", "note"],
    }
    good: dict[str, object] = {
        "name": "x",
        "host": "127.0.0.1",
        "port": 25,
        "mfrom": "b.example",
        "list_id": news["id"],
        "delivery_server_id": server["id"],
        "subject": "s",
        "email": "a@b.example",
        "emails": ["a@b.example"],
        "from_email": "a@b.example",
        "text": "t",
    }
    chance = random.Random(7)
    seen: dict[int, int] = {}
    for number in range(600):
        method, _, path = chance.choice(list(bodies)).partition(" ")
        names = bodies[f"{method} {path}"]
        body = {name: good[name] for name in names if name in good}
        for _ in range(chance.randint(0, 3)):
            body[chance.choice(names)] = chance.choice(VALUES)
        if body.get("name") == "x":
            body["name"] = f"x{number}"
        response = await ada.call(method, path.format(u=ada.user_id, s=server["id"], l=news["id"]), json=body)
        assert response.status_code < 500, (method, path, body, response.text)
        seen[response.status_code] = seen.get(response.status_code, 0) + 1
        if response.status_code >= 400:
            assert response.json()["status"] == response.status_code
    assert seen.get(201, 0) > 20
    assert seen.get(422, 0) > 100


async def test_every_answer_carries_the_security_headers(http: httpx.AsyncClient, ada: Client) -> None:
    for path in ("/docs", "/docs/openapi.json", "/docs/static/swagger-ui.css", "/health/live", "/api/v1/me", "/nothing"):
        response = await http.get(path)
        assert "default-src 'self'" in response.headers["content-security-policy"], path
        assert response.headers["x-content-type-options"] == "nosniff"
    assert (await ada.call("GET", "/me")).headers["cache-control"] == "no-store"
