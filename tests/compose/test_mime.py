"""The MIME frame: read back by the standard library, it gives the parts, names and octets that went in."""

import email.message
import email.parser
import email.policy
import os

import pytest

from compose.mime import Body, base64_lines, boundary, coding, coding_8bit, frame
from domain.campaign import Attachment
from domain.errors import Invalid

MARK = boundary(7, 3)
PDF = Attachment(filename="invoice.pdf", content_type="application/pdf", content=bytes(range(256)) * 40)
LOGO = Attachment(filename="logo.png", content_type="image/png", content=b"\x89PNG\r\n\x1a\n.", content_id="logo@example.com")


def parsed(kinds: str, *attachments: Attachment) -> email.message.EmailMessage:
    """A message in this frame, read by somebody else."""
    bodies = [Body(kind) for kind in kinds.split()]
    wire, behind = frame(bodies, MARK, attachments)
    wire = b"MIME-Version: 1.0\r\n" + wire + b"".join(b"<p>words</p>" + each for each in behind)
    assert wire.endswith(b"\r\n")
    assert max(len(line) for line in wire.split(b"\r\n")) <= 998
    assert not {10, 13} & set(wire.replace(b"\r\n", b""))
    message = email.parser.BytesParser(policy=email.policy.default).parsebytes(wire)
    assert isinstance(message, email.message.EmailMessage)
    assert not [defect for part in message.walk() for defect in part.defects]
    return message


def shape(message: email.message.Message) -> object:
    """Its tree of types."""
    if not message.is_multipart():
        return message.get_content_type()
    return (message.get_content_subtype(), *[shape(part) for part in message.get_payload()])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kinds", "attachments", "expected"),
    [
        ("plain", (), "text/plain"),
        ("html", (), "text/html"),
        ("plain html", (), ("alternative", "text/plain", "text/html")),
        ("plain html", (PDF,), ("mixed", ("alternative", "text/plain", "text/html"), "application/pdf")),
        ("plain html", (LOGO,), ("alternative", "text/plain", ("related", "text/html", "image/png"))),
        ("plain html", (PDF, LOGO), ("mixed", ("alternative", "text/plain", ("related", "text/html", "image/png")), "application/pdf")),
        ("html", (LOGO, PDF), ("mixed", ("related", "text/html", "image/png"), "application/pdf")),
        ("plain", (LOGO,), ("mixed", "text/plain", "image/png")),
        ("plain x-amp-html html", (), ("alternative", "text/plain", "text/x-amp-html", "text/html")),
        ("x-amp-html html", (LOGO,), ("alternative", "text/x-amp-html", ("related", "text/html", "image/png"))),
        ("", (), "text/plain"),
        ("", (PDF,), ("mixed", "text/plain", "application/pdf")),
    ],
)
def test_there_are_as_few_multiparts_as_the_parts_need(kinds: str, attachments: tuple[Attachment, ...], expected: object):
    assert shape(parsed(kinds, *attachments)) == expected


@pytest.mark.parametrize(
    "name",
    [
        "a.pdf",
        'say "hi".txt',
        "Überweisung für März.pdf",
        "名前" * 30 + ".png",
        "x" * 190 + ".bin",
        "semi;colon\\slash.txt",
        "100%.csv",
    ],
)
def test_a_file_comes_back_with_its_name_and_octets(name: str):
    content = os.urandom(1000)
    message = parsed("plain html", Attachment(filename=name, content_type="application/octet-stream", content=content))
    (attachment,) = message.iter_attachments()
    assert attachment.get_filename() == name
    assert attachment.get_content_disposition() == "attachment"
    assert attachment.get_content() == content


def test_an_inline_image_has_the_content_id_that_the_html_names():
    image = next(part for part in parsed("plain html", LOGO, PDF).walk() if part.get_content_type() == "image/png")
    assert image["Content-ID"] == "<logo@example.com>"
    assert image.get_content_disposition() == "inline"
    assert image.get_content() == LOGO.content


@pytest.mark.parametrize("size", [0, 1, 56, 57, 58, 114, 1000])
def test_base64_lines_have_76_characters(size: int):
    lines = base64_lines(b"x" * size).split(b"\r\n")
    assert all(len(line) == 76 for line in lines[:-1])
    assert len(lines[-1]) <= 76


@pytest.mark.parametrize(
    ("field", "changed"),
    [
        ("filename", {"filename": ""}),
        ("filename", {"filename": "../etc/passwd"}),
        ("filename", {"filename": "a\r\nBcc: x@example.com"}),
        ("filename", {"filename": "half \ud800 pair"}),
        ("filename", {"filename": "x" * 201}),
        ("content_type", {"content_type": "pdf"}),
        ("content_type", {"content_type": "text/plain\r\nX: y"}),
        ("content_type", {"content_type": "message/rfc822"}),
        ("content_type", {"content_type": "multipart/mixed"}),
        ("content_id", {"content_id": "<a@b>"}),
        ("content_id", {"content_id": "a\r\nb"}),
    ],
)
def test_what_cannot_stand_in_a_header_is_refused_with_its_field(field: str, changed: dict[str, str]):
    values = {"filename": "a.pdf", "content_type": "application/pdf", "content_id": "", **changed}
    with pytest.raises(Invalid) as refused:
        frame([Body("html")], MARK, (Attachment(content=b"", **values),))
    assert refused.value.field == field


def test_a_content_id_can_be_there_once_only():
    with pytest.raises(Invalid, match="twice"):
        frame([Body("html")], MARK, (LOGO, LOGO))


@pytest.mark.parametrize(
    ("text", "anywhere", "with_8bitmime"),
    [
        ("", "quoted-printable", "quoted-printable"),
        ("plain words", "quoted-printable", "quoted-printable"),
        ("Viele Grüße aus Köln, kommt gut nach Hause", "quoted-printable", "8bit"),
        ("こんにちは", "base64", "8bit"),
        ("Привет", "base64", "8bit"),
        ("Привет\n" * 200, "base64", "8bit"),
        ("ü" + "x" * 996 + "\r\n", "quoted-printable", "8bit"),
        ("ü" + "x" * 997 + "\r\n", "quoted-printable", "quoted-printable"),
    ],
)
def test_a_part_has_the_encoding_that_suits_its_text_and_its_server(text: str, anywhere: str, with_8bitmime: str):
    assert coding(text) == anywhere
    assert coding_8bit(text) == with_8bitmime
