"""Pre-flight through the API and the command, with a real name server: what it finds, what it holds, what force lets go."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from config.settings import Control, Mail, Preflight, Settings
from store import users
from tests import name_server
from tests.control.conftest import MAX_BODY_BYTES, Client
from tests.control.test_campaigns import draft

TABLE = {
    ("good.example", "SOA"): ["ns.good.example. admin.good.example. 1 3600 600 86400 60"],
    ("good.example", "MX"): ["10 mx.good.example."],
    ("good.example", "TXT"): ['"v=spf1 ip4:192.0.2.1 -all"'],
    ("_dmarc.good.example", "TXT"): ['"v=DMARC1; p=quarantine"'],
    ("b.good.example", "TXT"): ['"v=spf1 " "include:good.example -all"'],
    ("b.good.example", "MX"): ["10 mx.good.example."],
    ("go.good.example", "A"): ["127.0.0.1"],
}
HTML = '<p>Hi {{ subscriber.first_name }}</p><a href="{{ links.unsubscribe }}">leave</a>'


@pytest.fixture
async def settings() -> AsyncIterator[Settings]:
    """With a name server of our own that says nothing about silent.example."""
    async with name_server.serve(TABLE, silent=("silent.example", "_dmarc.silent.example")) as address:
        asked = Preflight(nameservers=(address,), timeout_seconds=0.5)
        mail = Mail(cfbl_address="fbl@operator.example")
        yield Settings(control=Control(max_body_bytes=MAX_BODY_BYTES), preflight=asked, mail=mail)


async def findings(client: Client, campaign: dict[str, Any]) -> dict[str, dict[str, Any]]:
    report = await client.ok("POST", f"/campaigns/{campaign['id']}/preflight")
    assert report["ready"] == (not any(each["severity"] == "blocking" for each in report["findings"]))
    assert report["samples"] > 0
    return {each["name"]: each for each in report["findings"]}


async def campaign_on(client: Client, mfrom: str, **changes: Any) -> dict[str, Any]:
    made = await draft(client, **changes)
    server = {"mfrom": mfrom, "link_domain": "go.good.example"}
    await client.ok("PATCH", f"/delivery-servers/{made['delivery_server_id']}", json=server)
    return made


async def test_a_campaign_of_good_domains_has_only_its_key_missing(ada: Client, eve: Client) -> None:
    made = await campaign_on(
        ada, "b.good.example", from_email="news@good.example", html=HTML, text="Hi\n{{ links.unsubscribe }}", reply_to="us@b.good.example"
    )
    found = await findings(ada, made)
    assert "reply_to_takes_no_mail" not in found
    assert [name for name, each in found.items() if each["severity"] == "blocking"] == ["dkim_missing"]
    assert {"provider": "Microsoft", "code": "550 5.7.515"}.items() <= found["dkim_missing"]["answers"][1].items()
    key = await ada.ok("POST", "/dkim-keys", json={"domain": "good.example", "selector": "s1"})
    assert f"dkim_record:{key['record_name']}" in await findings(ada, made)
    await eve.refused(404, "POST", f"/campaigns/{made['id']}/preflight")


async def test_values_that_are_empty_for_some_are_named_with_one_of_them(ada: Client) -> None:
    html = HTML + "{{ subscriber.city }}%Subscriber:First_Name%{{ subscriber.first_name | default: 'you' }}"
    made = await campaign_on(ada, "b.good.example", from_email="news@good.example", html=html, subject="News")
    assert not [name for name in await findings(ada, made) if name.startswith("value_empty")]
    rows = "email,first_name\nnobody@reader.example,\n" + "".join(f"p{number}@reader.example,Ann\n" for number in range(7))
    headers = {"content-type": "text/csv"}
    await ada.ok("POST", f"/lists/{made['list_id']}/imports", content=rows.encode(), headers=headers)
    found = await findings(ada, made)
    assert "field_unknown:city" in found
    empty = {name: each for name, each in found.items() if name.startswith("value_empty")}
    assert set(empty) == {"value_empty:subscriber.first_name", "value_empty:%Subscriber:First_Name%"}
    said = empty["value_empty:subscriber.first_name"]
    assert said["what"] == "{{ subscriber.first_name }} is empty for 10 % of 10 recipients, for example nobody@reader.example"
    assert "{{ subscriber.first_name | default: '...' }}" in said["advice"]


async def test_bad_domains_are_named_with_the_answers_they_would_get(ada: Client) -> None:
    made = await campaign_on(ada, "b.gone.example", from_email="news@gone.example", reply_to="us@Nowhere.example")
    found = await findings(ada, made)
    assert "nowhere.example" in found["reply_to_takes_no_mail"]["what"]
    assert {"from_missing", "return_path_missing", "dkim_missing"} <= set(found)
    assert {"no_unsubscribe_link", "variable_unknown:first_name"} <= set(found)
    silent = await campaign_on(ada, "b.good.example", from_email="news@silent.example", name="silent")
    assert "dns_silent" in await findings(ada, silent)
    assert "from_missing" not in await findings(ada, silent), "silence is no proof"


async def test_a_complaint_address_of_another_domain_needs_a_key_of_the_operators(
    ada: Client, make_client: Callable[[str, users.Scope], Awaitable[Client]]
) -> None:
    admin = await make_client(users.ADMIN_NAME, "admin")
    made = await campaign_on(ada, "b.good.example", from_email="news@good.example", html=HTML, text="Hi\n{{ links.unsubscribe }}")
    found = await findings(ada, made)
    assert found["cfbl_left_out"]["severity"] == "warning"
    assert "no DKIM key signs for operator.example, the domain of mail.cfbl_address" in found["cfbl_left_out"]["what"]
    key = await admin.ok("POST", "/dkim-keys", json={"domain": "operator.example", "selector": "o1"})
    found = await findings(ada, made)
    assert "cfbl_left_out" not in found
    assert found[f"dkim_record:{key['record_name']}"]["severity"] == "warning", "the mail is none the worse for it"
    assert "cfbl_unsigned" in found, "and its sender has no key at all"
    assert "dkim_missing" in found
    await ada.ok("POST", "/dkim-keys", json={"domain": "good.example", "selector": "s1"})
    assert not {"cfbl_unsigned", "dkim_missing"} & set(await findings(ada, made))
    own = await campaign_on(ada, "b.good.example", from_email="news@operator.example", name="own")
    assert not {"cfbl_left_out", f"dkim_record:{key['record_name']}"} & set(await findings(ada, own)), "its own domain is enough"


async def test_a_blocking_finding_holds_the_start_unless_forced(ada: Client) -> None:
    made = await draft(ada, from_email="me@gmail.com")
    answer = await ada.refused(422, "POST", f"/campaigns/{made['id']}/start")
    assert answer["errors"][0]["field"] == "preflight.from_public_domain"
    assert "force" in answer["errors"][0]["reason"]
    assert (await ada.ok("GET", f"/campaigns/{made['id']}"))["state"] == "draft"
    assert (await ada.ok("POST", f"/campaigns/{made['id']}/start?force=true"))["state"] == "preparing"
    assert (await ada.ok("POST", f"/campaigns/{made['id']}/start"))["state"] == "preparing", "starting twice is fine"


async def test_warnings_hold_nothing_and_the_dns_does_not_either(ada: Client) -> None:
    made = await draft(ada, from_email="news@gone.example", text="", html="<p>x</p>")
    assert (await ada.ok("POST", f"/campaigns/{made['id']}/start"))["state"] == "preparing"
