"""Forwarding rules through the API and the command: checked whole, for administrators only, and what became of each mail."""

import json
import subprocess
from collections.abc import Callable

from config.keys import Keyring
from inbound.forwarding import Forwards
from store import forwarding
from store.postgres import Pool, transaction
from tests.control.conftest import Client
from tests.control.test_cli import answer, sluice  # noqa: F401

RULES = "reply@news.example:support@ours.example\n*:rest@ours.example\n"


async def test_rules_are_replaced_whole_and_tried_out(admin: Client, ada: Client) -> None:
    assert (await admin.ok("GET", "/forwarding"))["aliases"] == ""
    server = await ada.ok("POST", "/delivery-servers", json={"name": "out", "host": "127.0.0.1"})
    rules = {"aliases": RULES, "forward_to": "Admin@Ours.example", "abuse_to": "trust@ours.example", "delivery_server_id": server["id"]}
    made = await admin.ok("PUT", "/forwarding", json=rules)
    assert made["forward_to"] == "Admin@ours.example"
    assert (await admin.ok("GET", "/forwarding")) == made
    for recipient, target, by in (
        ("Reply@news.example", "support@ours.example", "alias"),
        ("abuse@news.example", "trust@ours.example", "duty"),
        ("root@news.example", "Admin@ours.example", "duty"),
        ("x@news.example", "rest@ours.example", "alias"),
    ):
        found = await admin.ok("POST", "/forwarding/test", json={"recipient": recipient})
        assert (found["target"], found["by"]) == (target, by)
    await admin.ok("PUT", "/forwarding", json={})
    assert (await admin.ok("POST", "/forwarding/test", json={"recipient": "x@news.example"}))["by"] == "nothing"


async def test_rules_that_cannot_be_used_are_refused_with_field_and_reason(admin: Client) -> None:
    for rules, field, reason in (
        ({"aliases": "a@b.example:c@d.example\nnonsense"}, "aliases", "line 2"),
        ({"aliases": "*:a@b.example\n" * 1001}, "aliases", "at most 1000 rules"),
        ({"forward_to": "nobody"}, "forward_to", "has no @"),
        ({"abuse_to": "a@b.example\r\nBcc: c@d.example"}, "abuse_to", "space or line break"),
        ({"forwards_to": "a@b.example"}, "forwards_to", ""),
    ):
        refused = await admin.refused(422, "PUT", "/forwarding", json=rules)
        assert refused["errors"][0]["field"] == field
        assert reason in refused["errors"][0]["reason"]


async def test_rules_are_for_administrators_and_need_a_server_that_exists(admin: Client, ada: Client) -> None:
    for method, path in (("GET", "/forwarding"), ("PUT", "/forwarding"), ("GET", "/forwarding/queue"), ("POST", "/forwarding/test")):
        await ada.refused(403, method, path, json={} if method != "GET" else None)
    await admin.refused(404, "PUT", "/forwarding", json={"delivery_server_id": 99})
    await admin.refused(404, "PUT", "/forwarding", json={"delivery_server_id": 0})


async def test_the_queue_says_what_became_of_each_mail(admin: Client, ada: Client, pool: Pool) -> None:
    await ada.ok("POST", "/delivery-servers", json={"name": "out", "host": "127.0.0.1"})
    forwards = Forwards(Keyring(bytes(32)), "mx.example")
    async with transaction(pool) as conn:
        await forwarding.add(conn, 1, "alias", "a@b.example", None, "no way out")
        for number in (2, 3):
            reason = await forwards.add(
                conn, number, "alias", "a@b.example", recipient="reply@news.example", mail_from="ann@people.example", raw=b"Hi: x\r\n\r\n"
            )
            assert reason == ""
    first = await admin.ok("GET", "/forwarding/queue?limit=2")
    assert [each["inbound_id"] for each in first["items"]] == [3, 2]
    rest = await admin.ok("GET", f"/forwarding/queue?limit=2&before={first['next']}")
    assert [(each["state"], each["reply"], each["message_id"]) for each in rest["items"]] == [("failed", "no way out", None)]
    assert {(each["rule"], each["state"], each["attempts"]) for each in first["items"]} == {("alias", "queued", 0)}
    made = await admin.ok("GET", f"/messages/{first['items'][0]['message_id']}")
    assert made["name"] == "forward of received message 3"
    assert rest["next"] is None


def test_the_command_sets_what_it_names_and_keeps_the_rest(sluice: Callable[..., subprocess.CompletedProcess[str]]) -> None:  # noqa: F811
    answer(sluice("inbound", "forwarding", "set", "--aliases", "-", "--to", "admin@ours.example", "--json", input=RULES))
    answer(sluice("inbound", "forwarding", "set", "--abuse-to", "trust@ours.example", "--json"))
    shown = answer(sluice("inbound", "forwarding", "show", "--json"))
    assert isinstance(shown, dict)
    assert (shown["aliases"], shown["forward_to"], shown["abuse_to"]) == (RULES, "admin@ours.example", "trust@ours.example")
    assert answer(sluice("inbound", "forwarding", "test", "abuse@x.example", "--json")) | {"updated_at": ""} == {  # type: ignore[operator]
        "target": "trust@ours.example", "by": "duty", "updated_at": "",
    }  # fmt: skip
    assert json.loads(sluice("inbound", "forwarding", "queue", "--json").stdout) == []
    refused = sluice("inbound", "forwarding", "set", "--aliases", "-", input="nonsense")
    assert refused.returncode == 2
    assert "line 1: write pattern:target" in refused.stderr
