"""Whose domain it is: proved by a DKIM record in the DNS, from then on nobody else's From address (bad input 43)."""

from collections.abc import AsyncIterator

import pytest

from config.settings import Control, Preflight, Settings
from tests import name_server
from tests.control.conftest import MAX_BODY_BYTES, Client
from tests.control.test_campaigns import draft
from tests.control.test_messages import body, server

TABLE: dict[tuple[str, str], list[str]] = {}


@pytest.fixture
async def settings() -> AsyncIterator[Settings]:
    """With a name server of our own, whose table the tests fill."""
    TABLE.clear()
    async with name_server.serve(TABLE) as address:
        yield Settings(control=Control(max_body_bytes=MAX_BODY_BYTES), preflight=Preflight(nameservers=(address,), timeout_seconds=1.0))


async def test_a_domain_that_somebody_proved_is_his(ada: Client, eve: Client) -> None:
    new = {"domain": "garden.example", "selector": "s1", "algorithm": "ed25519-sha256"}
    key = await ada.ok("POST", "/dkim-keys", json=new)
    await eve.ok("POST", "/dkim-keys", json=new)
    mine = await draft(eve, from_email="a@garden.example", name="before")
    found = await ada.ok("POST", f"/dkim-keys/{key['id']}/check")
    assert (found["published"], found["says"], found["verified_at"]) == (False, "is not in the DNS", None)
    TABLE["s1._domainkey.garden.example", "TXT"] = [f'"{key["record"]}"']
    found = await ada.ok("POST", f"/dkim-keys/{key['id']}/check")
    assert (found["published"], found["found"]) == (True, [key["record"]])
    assert found["verified_at"]
    await eve.refused(404, "POST", f"/dkim-keys/{key['id']}/check")

    answer = await eve.refused(422, "POST", f"/campaigns/{mine['id']}/start")
    assert answer["errors"][0]["field"] == "from_email"
    assert "belongs to another user" in answer["detail"]
    way = await server(eve, "other")
    for address in ("a@garden.example", "a@news.Garden.example"):
        answer = await eve.refused(422, "POST", "/messages", json=body(way, {"email": "x@y.example"}, from_email=address))
        assert answer["errors"][0]["field"] == "from_email"
    await eve.ok("POST", "/messages", json=body(way, {"email": "x@y.example"}, from_email="a@notgarden.example"))
    await draft(ada, from_email="a@news.garden.example")


async def test_a_key_is_activated_only_when_its_record_is_there(ada: Client) -> None:
    new = {"domain": "garden.example", "algorithm": "ed25519-sha256"}
    first = await ada.ok("POST", "/dkim-keys", json={**new, "selector": "s1"})
    second = await ada.ok("POST", "/dkim-keys", json={**new, "selector": "s2"})
    path = f"/dkim-keys/{second['id']}/activate?check=true"
    TABLE["s2._domainkey.garden.example", "TXT"] = [f'"{first["record"]}"']
    answer = await ada.refused(409, "POST", path)
    assert "s2._domainkey.garden.example holds another key" in answer["detail"]
    assert (await ada.ok("GET", f"/dkim-keys/{first['id']}"))["state"] == "active"
    TABLE["s2._domainkey.garden.example", "TXT"] = [f'"{second["record"]}"']
    assert (await ada.ok("POST", path))["state"] == "active"
