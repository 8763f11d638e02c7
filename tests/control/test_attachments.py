"""Attachments, pre-headers and what is made of an HTML part, through the API, down to the octets of a message."""

import email.parser
import email.policy
import os
from email.message import EmailMessage
from typing import Any

import pytest

from compose.campaign import CompiledCampaign
from config.keys import Keyring
from config.settings import Mail
from domain.campaign import Recipient
from store import campaigns, egress
from store.postgres import Pool, connection
from tests.control.conftest import Client
from tests.control.test_campaigns import draft

HTML = '<html><body><p>Hello <b>{{ subscriber.name }}</b></p><a href="https://a.example/{{ subscriber.id }}">Go</a></body></html>'


async def composed(pool: Pool, keyring: Keyring, campaign_id: int) -> EmailMessage:
    """The message that one recipient would get, read by the standard library."""
    async with connection(pool) as conn:
        content = await campaigns.content(conn, campaign_id)
        server = await egress.get(conn, content.user_id, content.delivery_server_id)
    compiled = CompiledCampaign(content, server, keyring, "https://news.example", mail=Mail())
    recipient = Recipient(1, 7, "ann@inbox.example", b'{"name": "Ann"}')
    answer = compiled.build([recipient], composed_at=1.8e9, attempt=1)[0]
    assert isinstance(answer, tuple), answer
    message = email.parser.BytesParser(policy=email.policy.default).parsebytes(answer[2])
    assert isinstance(message, EmailMessage)
    return message


async def attach(client: Client, campaign_id: int, content: bytes, kind: str, **parameters: str) -> Any:
    return await client.ok(
        "POST", f"/campaigns/{campaign_id}/attachments", content=content, params=parameters, headers={"content-type": kind}
    )


async def test_files_go_with_every_message(ada: Client, pool: Pool, keyring: Keyring) -> None:
    made = await draft(ada, html=HTML + '<img src="cid:logo">', text="Hi")
    picture, document = os.urandom(5000), os.urandom(300_000)  # the second is larger than any other body may be
    first = await attach(ada, made["id"], picture, "image/png", filename="logo.png", content_id="logo")
    second = await attach(ada, made["id"], document, "application/pdf", filename="Übersicht.pdf")
    listed = await ada.ok("GET", f"/campaigns/{made['id']}/attachments")
    assert listed == [first, second]
    assert [each["size"] for each in listed] == [5000, 300_000]
    message = await composed(pool, keyring, made["id"])
    (file,) = [part for part in message.iter_attachments() if part.get_content_disposition() == "attachment"]
    assert (file.get_filename(), file.get_content()) == ("Übersicht.pdf", document)
    image = next(part for part in message.walk() if part["Content-ID"] == "<logo>")
    assert image.get_content() == picture
    await ada.ok("DELETE", f"/campaigns/{made['id']}/attachments/{second['id']}")
    assert not [part for part in (await composed(pool, keyring, made["id"])).walk() if part.get_filename() == "Übersicht.pdf"]


@pytest.mark.parametrize(
    ("field", "parameters", "kind"),
    [
        ("filename", {"filename": "../a"}, "image/png"),
        ("filename", {"filename": "a\r\nBcc: b@c.example"}, "image/png"),
        ("content_type", {"filename": "a"}, "message/rfc822"),
        ("content_id", {"filename": "a", "content_id": "<x>"}, "image/png"),
    ],
)
async def test_what_cannot_be_attached_is_refused_by_field(ada: Client, field: str, parameters: dict[str, str], kind: str) -> None:
    made = await draft(ada)
    answer = await ada.refused(
        422, "POST", f"/campaigns/{made['id']}/attachments", content=b"x", params=parameters, headers={"content-type": kind}
    )
    assert [each["field"] for each in answer["errors"]] == [field]


async def test_too_much_is_refused_whole_and_a_content_id_is_there_once(ada: Client) -> None:
    made = await draft(ada)
    path = f"/campaigns/{made['id']}/attachments"
    await attach(ada, made["id"], b"x", "image/png", filename="a", content_id="x")
    again = await ada.refused(
        422, "POST", path, content=b"x", params={"filename": "b", "content_id": "x"}, headers={"content-type": "image/png"}
    )
    assert again["errors"][0]["field"] == "content_id"
    large = await ada.refused(
        422, "POST", path, content=bytes(10 * 1024 * 1024), params={"filename": "b"}, headers={"content-type": "image/png"}
    )
    assert "max_attachment_bytes" in large["detail"]
    assert len(await ada.ok("GET", path)) == 1


async def test_a_started_campaign_and_a_strangers_take_nothing(ada: Client, eve: Client) -> None:
    made = await draft(ada)
    path = f"/campaigns/{made['id']}/attachments"
    file = {"content": b"x", "params": {"filename": "a"}, "headers": {"content-type": "image/png"}}
    for method in ("GET", "POST"):
        await eve.refused(404, method, path, **(file if method == "POST" else {}))
    await ada.ok("POST", f"/campaigns/{made['id']}/start")
    await ada.refused(409, "POST", path, **file)


async def test_the_text_part_follows_the_html_part_until_somebody_writes_one(ada: Client) -> None:
    made = await draft(ada, html=HTML, text=None)
    assert made["text"] == "Hello {{ subscriber.name }}\n\n[Go](https://a.example/{{ subscriber.id }})\n"
    path = f"/campaigns/{made['id']}"
    assert (await ada.ok("PATCH", path, json={"html": "<p>Other</p>"}))["text"] == "Other\n"
    assert (await ada.ok("PATCH", path, json={"text": "Mine"}))["text"] == "Mine"
    assert (await ada.ok("PATCH", path, json={"html": HTML}))["text"] == "Mine"
    assert (await ada.ok("PATCH", path, json={"text": ""}))["text"] == ""
    assert (await ada.ok("PATCH", path, json={"text": None}))["text"].startswith("Hello {{")


async def test_mjml_and_style_sheets_are_turned_into_what_mail_programs_read(ada: Client) -> None:
    source = (
        "<mjml><mj-body><mj-section><mj-column><mj-text>Hello {{ subscriber.name }}</mj-text></mj-column></mj-section></mj-body></mjml>"
    )
    made = await draft(ada, mjml=source, text=None)
    assert "Hello {{ subscriber.name }}" in made["html"]
    assert made["text"] == "Hello {{ subscriber.name }}\n"
    path = f"/campaigns/{made['id']}"
    styled = "<style>p { color: red }</style><p>Hi</p>"
    assert '<p style="color: red;">' in (await ada.ok("PATCH", path, json={"html": styled, "inline_css": True}))["html"]
    for field, body in (("mjml", {"mjml": source, "html": "<p>"}), ("inline_css", {"inline_css": True}), ("mjml", {"mjml": "<mjml><x"})):
        assert (await ada.refused(422, "PATCH", path, json=body))["errors"][0]["field"] == field


async def test_the_preheader_is_a_template_in_the_html_part(ada: Client, pool: Pool, keyring: Keyring) -> None:
    made = await draft(ada, html=HTML, preheader="For {{ subscriber.name }}", text="")
    html = (await composed(pool, keyring, made["id"])).get_content()
    assert html.startswith('<html><body><div style="display: none; max-height: 0px; overflow: hidden;">For Ann</div>')
    assert (await ada.refused(422, "PATCH", f"/campaigns/{made['id']}", json={"preheader": "{{ x"}))["errors"]


async def test_an_amp_part_stands_between_text_and_html(ada: Client, pool: Pool, keyring: Keyring) -> None:
    amp = "<!doctype html><html ⚡4email><body>Hello {{ subscriber.name }}</body></html>"
    made = await draft(ada, html=HTML, amp=amp, text="Hi")
    message = await composed(pool, keyring, made["id"])
    assert [part.get_content_type() for part in message.iter_parts()] == ["text/plain", "text/x-amp-html", "text/html"]
    assert "Hello Ann" in list(message.iter_parts())[1].get_content()
    for body in ({"amp": "<p>no AMP</p>"}, {"html": "", "amp": amp}, {"amp": amp + "{{ x"}):
        assert (await ada.refused(422, "PATCH", f"/campaigns/{made['id']}", json=body))["errors"][0]["field"] == "amp"


async def test_text_that_is_not_latin_goes_as_base64_and_comes_back_the_same(ada: Client, pool: Pool, keyring: Keyring) -> None:
    words = "こんにちは {{ subscriber.name }}さん\n.二行目は点で始まる\n" * 20
    made = await draft(ada, html=HTML, text=words)
    plain, rich = (await composed(pool, keyring, made["id"])).iter_parts()
    assert (plain["Content-Transfer-Encoding"], rich["Content-Transfer-Encoding"]) == ("base64", "quoted-printable")
    assert plain.get_content().replace("\r\n", "\n") == words.replace("{{ subscriber.name }}", "Ann")
