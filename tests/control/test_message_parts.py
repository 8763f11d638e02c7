"""Files, pre-header, AMP and MJML of direct messages, down to the octets of a message."""

import base64
import email.parser
import email.policy
import os
from collections.abc import AsyncIterator
from email.message import EmailMessage
from typing import Any

import msgspec
import pytest

from compose.campaign import CompiledCampaign
from config.keys import Keyring
from control.messages import lines_of
from domain.campaign import Recipient
from domain.errors import Invalid
from store import campaigns, egress
from store.postgres import Pool, connection
from tests.control.conftest import Client
from tests.control.test_messages import body, server

MJML = "<mjml><mj-body><mj-section><mj-column><mj-text>Hello {{ subscriber.name }}</mj-text></mj-column></mj-section></mj-body></mjml>"


def file(filename: str, content: bytes, content_type: str = "application/pdf", content_id: str = "") -> dict[str, str]:
    return {"filename": filename, "content": base64.b64encode(content).decode(), "content_type": content_type, "content_id": content_id}


async def composed(pool: Pool, keyring: Keyring, made: dict[str, Any]) -> EmailMessage:
    """What the first recipient of a message gets, read by the standard library."""
    async with connection(pool) as conn:
        content = await campaigns.content(
            conn, made["campaign_id"], await conn.fetchval("select part from messages where id = $1", made["id"])
        )
        way = await egress.get(conn, content.user_id, content.delivery_server_id)
        row = await conn.fetchrow("select * from recipients where campaign_id = $1 and number = $2", content.id, made["first_number"])
    assert row is not None
    recipient = Recipient(row["number"], row["subscriber_id"], row["email"], row["data"].encode())
    [answer] = CompiledCampaign(content, way, keyring, "https://news.example").build([recipient], composed_at=1.8e9, attempt=1)
    assert isinstance(answer, tuple), answer
    message = email.parser.BytesParser(policy=email.policy.default).parsebytes(answer[2])
    assert isinstance(message, EmailMessage)
    return message


async def test_files_and_parts_go_with_a_message(ada: Client, pool: Pool, keyring: Keyring) -> None:
    picture, document = os.urandom(5000), os.urandom(100_000)
    wanted = body(
        await server(ada), {"email": "ann@a.example", "data": {"name": "Ann"}},
        html='<html><body><p>Hello {{ subscriber.name }}</p><img src="cid:logo"></body></html>',
        preheader="For {{ subscriber.name }}",
        amp="<!doctype html><html ⚡4email><body>Hi {{ subscriber.name }}</body></html>",
        attachments=[file("logo.png", picture, "image/PNG", "logo"), file("Übersicht.pdf", document)],
    )  # fmt: skip
    message = await composed(pool, keyring, await ada.ok("POST", "/messages", json=wanted))
    (attached,) = [part for part in message.iter_attachments() if part.get_content_disposition() == "attachment"]
    assert (attached.get_filename(), attached.get_content()) == ("Übersicht.pdf", document)
    (image,) = [part for part in message.walk() if part["Content-ID"] == "<logo>"]
    assert (image.get_content_type(), image.get_content()) == ("image/png", picture)
    texts = {part.get_content_type(): part.get_content() for part in message.walk() if part.get_content_maintype() == "text"}
    assert list(texts) == ["text/plain", "text/x-amp-html", "text/html"]
    assert ">For Ann</div>" in texts["text/html"]
    assert "Hi Ann" in texts["text/x-amp-html"]


async def test_mjml_and_style_sheets_are_turned_into_what_mail_programs_read(ada: Client, pool: Pool, keyring: Keyring) -> None:
    wanted = body(await server(ada), {"email": "ann@a.example", "data": {"name": "Ann"}}, mjml=MJML, inline_css=True)
    del wanted["html"], wanted["text"]
    message = await composed(pool, keyring, await ada.ok("POST", "/messages", json=wanted))
    plain, rich = message.iter_parts()
    assert plain.get_content().strip() == "Hello Ann"
    assert "Hello Ann" in rich.get_content()


async def test_a_stream_of_lines_takes_a_file_in_its_first_line_only(ada: Client, pool: Pool, keyring: Keyring) -> None:
    content = {name: value for name, value in body(await server(ada)).items() if name != "recipients"}
    document = os.urandom(150_000)
    lines = [{**content, "attachments": [file("a.bin", document, "application/octet-stream")]}, {"email": "ann@a.example"}]
    headers = {"content-type": "application/x-ndjson"}
    sent = b"\n".join(map(msgspec.json.encode, lines))
    made = await ada.ok("POST", "/messages/stream", content=sent, headers=headers)
    (attached,) = (await composed(pool, keyring, made)).iter_attachments()
    assert attached.get_content() == document


async def test_only_the_first_line_of_a_stream_may_be_as_long_as_a_body() -> None:
    async def blocks(first: int, second: int) -> AsyncIterator[bytes]:
        for block in (b"x" * first, b"\n", b"y" * second, b"\nz\n"):
            yield block

    assert [len(line) async for line in lines_of(blocks(900_000, 200_000), 1_000_000)] == [900_000, 200_000, 1]
    for sizes in ((1_100_000, 1), (1, 300_000)):
        with pytest.raises(Invalid, match="longer than"):
            assert not [line async for line in lines_of(blocks(*sizes), 1_000_000)]


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("attachments[1].filename", {"attachments": [file("a", b"x"), file("../a", b"x")]}),
        ("attachments[0].filename", {"attachments": [file("a\r\nBcc: b@c.example", b"x")]}),
        ("attachments[0].content_type", {"attachments": [file("a", b"x", "message/rfc822")]}),
        ("attachments[0].content_id", {"attachments": [file("a", b"x", content_id="<x>")]}),
        ("attachments[1].content_id", {"attachments": [file("a", b"x", content_id="x"), file("b", b"x", content_id="x")]}),
        ("attachments[0].content", {"attachments": [{"filename": "a", "content": "no base64"}]}),
        ("attachments[0].filename", {"attachments": [{"content": ""}]}),
        ("attachments", {"attachments": [file("a", b"x")] * 51}),
        ("mjml", {"mjml": MJML}),  # beside html
        ("inline_css", {"inline_css": True, "html": ""}),
        ("amp", {"amp": "<p>no AMP</p>"}),
        ("html", {"preheader": "{{ x | nothing }}"}),
    ],
)
async def test_what_cannot_be_attached_is_refused_by_its_place(ada: Client, pool: Pool, field: str, changes: dict[str, Any]) -> None:
    answer = await ada.refused(422, "POST", "/messages", json=body(await server(ada), {"email": "a@b.example"}, **changes))
    assert answer["errors"][0]["field"] == field, answer
    assert await pool.fetchval("select count(*) from messages") == 0


async def test_a_body_beyond_the_limit_is_refused(ada: Client) -> None:
    wanted = body(await server(ada), {"email": "a@b.example"}, attachments=[file("a", bytes(256 * 1024))])
    await ada.refused(413, "POST", "/messages", json=wanted)
