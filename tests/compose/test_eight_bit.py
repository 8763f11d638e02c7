"""The 8bit form of a message: the same words as in the form for any server, never a line that is too long, never another boundary."""

import base64
import functools
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compose import mime
from compose.campaign import CompiledCampaign, Envelope
from compose.signing import DkimSigner
from domain.campaign import Attachment
from domain.errors import Invalid
from tests.compose.test_campaign import COMPOSED_AT, RECIPIENTS, SERVER, campaign, parsed, recipient
from tests.compose.test_signing import records, signing_key
from tests.reference.dkim_verdicts import verdicts
from tests.reference.quoted_printable import normalised

WILLING = msgspec.structs.replace(SERVER, limits=msgspec.structs.replace(SERVER.limits, eightbitmime=True))
TEXT = "Grüße, {{ subscriber.wish }}!\n.\n..dots\n \nblanks \t \nend"
HTML = "<p>Schöne Grüße</p>{{ subscriber.wish | raw }}{{ subscriber.more }}"
MARK = mime.boundary(7, 2).decode()
PICTURE = Attachment(filename="a.png", content_type="image/png", content=b"\x89PNG\xff")


def build(compiled: CompiledCampaign, **data: Any) -> tuple[Envelope, bytes]:
    """A recipient's message in the 8bit form, where it fits, and in that for any server."""
    to, when = recipient(1, **data), {"composed_at": COMPOSED_AT, "attempt": 1}
    [answer] = compiled.build_8bit([to], **when)  # type: ignore[arg-type]
    [plain] = compiled.build([to], **when)  # type: ignore[arg-type]
    assert isinstance(answer, Envelope), answer
    assert not isinstance(plain, Invalid)
    assert answer.mail_from == plain[0]
    return answer, plain[2]


def words(wire: bytes) -> list[tuple[str, str]]:
    """Type and text of each text part, line ends as LF, without those at its end."""
    found = []
    for part in parsed(wire).walk():
        if part.get_content_maintype() == "text":
            octets = part.get_payload(decode=True)
            assert isinstance(octets, bytes)
            found.append((part.get_content_type(), normalised(octets.decode("utf-8")).rstrip("\n")))
    return found


def codings(wire: bytes) -> list[str]:
    return [str(part["content-transfer-encoding"]) for part in parsed(wire).walk() if not part.is_multipart()]


def assert_sound(answer: Envelope) -> None:
    wire = answer.wire
    assert wire.endswith(b"\r\n")
    assert b"\0" not in wire
    assert wire.count(b"\r") == wire.count(b"\n") == wire.count(b"\r\n")
    assert max(len(line) for line in wire.split(b"\r\n")) <= 998
    assert answer.eight_bit is not wire.isascii()
    dotted = wire if answer.dotted is None else answer.dotted
    assert dotted == b"\r\n".join(b"." + line if line.startswith(b".") else line for line in wire.split(b"\r\n"))


def test_parts_beyond_ascii_go_as_they_are_and_the_others_as_ever():
    compiled = campaign(WILLING, text=TEXT, html="<p>Hi</p>", attachments=(PICTURE,))
    answer, plain = build(compiled, wish="ä ö")
    assert_sound(answer)
    assert codings(answer.wire) == ["8bit", "quoted-printable", "base64"]
    assert codings(plain) == ["quoted-printable", "quoted-printable", "base64"]
    assert words(answer.wire) == words(plain)
    assert "\r\nGrüße, ä ö!\r\n.\r\n..dots\r\n \r\nblanks \t \r\nend\r\n--=_".encode() in answer.wire
    assert len(answer.wire) < len(plain)
    assert plain.isascii()
    assert codings(build(campaign(WILLING, text="Привет, {{ subscriber.wish }}", html=""))[0].wire) == ["8bit"]


@pytest.mark.parametrize("server", [SERVER, WILLING], ids=["not asked for", "nothing beyond ASCII"])
def test_there_is_no_such_form_unless_it_is_asked_for_and_worth_it(server):
    compiled = campaign(server, text=TEXT if server is SERVER else "Hi {{ subscriber.wish }}", html="")
    assert not compiled.has_8bit
    assert campaign(WILLING, text="ü" * 500, html="").has_8bit is False, "its line is too long"
    assert campaign(WILLING, text=("ü" * 499 + "\n") * 9, html="").has_8bit is True


@pytest.mark.parametrize(
    ("wish", "fits"),
    [("x" * 994, True), ("x" * 995, False), ("ü" * 497, True), ("ü" * 498, False), ("x\n" * 5000, True), (f"--{MARK}--", False),
     (f"\r\n--{MARK}\r\nContent-Type: text/html\r\n\r\n<p>not ours", False), (f"--{MARK[:-1]}", True)],
)  # fmt: skip
def test_a_message_that_does_not_fit_goes_in_the_form_for_any_server(wish, fits):
    compiled = campaign(WILLING, text="ü: {{ subscriber.wish }}", html="<p>&auml;</p>")  # "ü: " has four octets
    answer, plain = build(compiled, wish=wish)
    assert_sound(answer)
    assert ("8bit" in codings(answer.wire)) is fits
    assert words(answer.wire) == words(plain)
    if not fits:
        assert answer.wire == plain
        assert not answer.eight_bit


def test_one_that_is_refused_or_does_not_fit_is_nobody_elses_trouble():
    compiled = campaign(WILLING, text=TEXT, html="")
    people = [recipient(1, wish="a"), recipient(2, wish="\0"), recipient(3, wish="b" * 2000), recipient(4), recipient(5)]
    people[3] = msgspec.structs.replace(people[3], data=b'{"wish": "\\ud800"}')
    answers = compiled.build_8bit(people, composed_at=COMPOSED_AT, attempt=1)
    assert [type(answer).__name__ for answer in answers] == ["Envelope", "Invalid", "Envelope", "Invalid", "Envelope"]
    assert [answer.eight_bit for answer in answers if isinstance(answer, Envelope)] == [True, False, True]


values = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(
    ["\r\n.\r\n", "\n.", "\r", ".", "x" * 998, "ü" * 499, f"\n--{MARK}\n", " \t", "\0", "\u2028\x85\x0b", "=_"]
)


@functools.cache
def signed(number: str) -> CompiledCampaign:
    compiled = campaign(WILLING, text=TEXT, html=HTML)
    compiled.signer = DkimSigner([signing_key(number)])
    return compiled


@settings(max_examples=100, deadline=None)
@given(wish=st.lists(values, max_size=6).map("".join), more=values, number=st.sampled_from(["rsa", "ed"]))
def test_whatever_the_data_it_is_sound_says_the_same_and_verifies(wish, more, number):
    to = recipient(1, wish=wish, more=more)
    [answer] = signed(number).build_8bit([to], composed_at=COMPOSED_AT, attempt=1)
    [plain] = signed(number).build([to], composed_at=COMPOSED_AT, attempt=1)
    assert isinstance(answer, Invalid) == isinstance(plain, Invalid) == ("\0" in wish + more)
    if isinstance(answer, Invalid) or isinstance(plain, Invalid):
        return
    assert_sound(answer)
    assert words(answer.wire) == words(plain[2])
    assert verdicts(answer.wire, records(number)) == [True]


def test_the_newsletter_says_the_same_in_both_forms():
    compiled = campaign(WILLING)
    assert compiled.has_8bit
    for to in RECIPIENTS:
        [answer] = compiled.build_8bit([to], composed_at=COMPOSED_AT, attempt=1)
        [plain] = compiled.build([to], composed_at=COMPOSED_AT, attempt=1)
        assert isinstance(answer, Envelope)
        assert not isinstance(plain, Invalid)
        assert_sound(answer)
        assert words(answer.wire) == words(plain[2])


def test_an_attachment_is_base64_in_either_form():
    answer, plain = build(campaign(WILLING, text=TEXT, html="", attachments=(PICTURE,)), wish="ä")
    assert base64.b64encode(PICTURE.content) in answer.wire
    assert base64.b64encode(PICTURE.content) in plain
