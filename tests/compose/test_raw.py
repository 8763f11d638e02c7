"""compose.raw: what is taken and what is refused, and that nothing but the envelope and a signature is ours."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compose.campaign import Envelope
from compose.raw import RawMessage, take
from compose.signing import DkimSigner, domains_of
from config.settings import Mail
from domain import return_path
from domain.errors import Invalid
from tests.compose.test_campaign import COMPOSED_AT, CONTENT, KEYRING, SERVER, recipient
from tests.compose.test_signing import records, signing_key
from tests.reference.dkim_verdicts import verdicts

FIELDS = b"From: Shop <news@garden.example>\r\nDate: Sat, 21 Nov 2026 10:00:00 +0000\r\nMessage-ID: <1@x.example>\r\nSubject: Hi\r\n"
BODY = b"..\r\n.one\r\nbr\xc3\xbcck\r\n.\r\n"


def built(raw: bytes, signer: DkimSigner | None = None, **server: object) -> Envelope:
    taken = take(raw, 0.0)
    content = msgspec.structs.replace(CONTENT, raw=taken.raw, from_email=taken.from_email)
    message = RawMessage(content, msgspec.structs.replace(SERVER, **server), KEYRING, signer)
    [answer] = message.build([recipient()], composed_at=COMPOSED_AT, attempt=1)
    assert isinstance(answer, Envelope), answer
    return answer


def test_what_is_complete_goes_out_octet_for_octet() -> None:
    answer = built(FIELDS + b"\r\n" + BODY, mfrom="bounce.garden.example")
    assert answer.wire == FIELDS + b"\r\n" + BODY
    assert answer.dotted == FIELDS + b"\r\n...\r\n..one\r\nbr\xc3\xbcck\r\n..\r\n"
    assert answer.eight_bit
    path = return_path.read(KEYRING.derive("return-path"), answer.mail_from.decode())
    assert path is not None
    assert (path.user_id, path.campaign_id, path.number) == (CONTENT.user_id, CONTENT.id, recipient().number)
    plain = built(FIELDS + b"\r\nHello\r\n")
    assert plain.dotted is None
    assert not plain.eight_bit


def test_fields_for_us_go_and_missing_ones_come() -> None:
    controls = b"X-Job: june\r\nX-Virtual-MTA: pool\r\n one\r\nX-MAIL-CLASS: marketing\r\n"
    given = b"Bcc: a@b.example,\r\n c@d.example\r\nReturn-Path: <>\r\n" + controls + b"From: news@garden.example\r\nX-Own: 1\r\n\r\n"
    taken = take(given, 1_795_000_000.0)
    assert taken.controls == {"x-job": "june", "x-virtual-mta": "pool one", "x-mail-class": "marketing"}
    date, identity, *rest = taken.raw.split(b"\r\n")
    assert date.startswith(b"Date: ")
    assert date.endswith(b"2026 11:06:40 +0000")
    assert identity.startswith(b"Message-ID: <")
    assert identity.endswith(b"@garden.example>")
    assert rest == [b"From: news@garden.example", b"X-Own: 1", b"", b""]


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (b"", "header"),
        (b"\r\nno header\r\n", "header"),
        (b"Subject: x\r\n\r\nx\r\n", "From"),
        (FIELDS + b"\r\nbare\nLF\r\n", "message"),
        (FIELDS + b"\r\nbare\rCR\r\n", "message"),
        (FIELDS + b"\r\nNUL\0\r\n", "message"),
        (FIELDS + b"\r\n" + b"x" * 999 + b"\r\n", "message"),
        (FIELDS + b"X-Bad: \x01\r\n\r\n", "header"),
        (FIELDS + "X-Bad: ü\r\n\r\n".encode(), "header"),
        (FIELDS + b"no field\r\n\r\n", "header"),
        (b".Dot: 1\r\n" + FIELDS + b"\r\n", "header"),
        (b" folded: 1\r\n" + FIELDS + b"\r\n", "header"),
        (FIELDS + b"From: eve@other.example\r\n\r\n", "From"),
        (FIELDS + b"SUBJECT: two\r\n\r\n", "SUBJECT"),
        (FIELDS + b"X-Job: 1\r\nX-Job: 2\r\n\r\n", "X-Job"),
        (FIELDS + b"X-Schedule: tomorrow\r\n\r\n", "X-Schedule"),
        (b"From: a@b.example, c@d.example\r\n\r\n", "From"),
        (b"From: ceo@bank.example <a@b.example>\r\n\r\n", "From"),
        (b"From: \"a\" <a@b.example> <c@d.example>\r\n\r\n", "From"),
        (FIELDS + b"X: 1\r\n" * 300 + b"\r\n", "header"),
    ],
)  # fmt: skip
def test_what_could_be_read_in_two_ways_is_refused(message: bytes, named: str) -> None:
    with pytest.raises(Invalid) as caught:
        take(message, 0.0)
    assert caught.value.field == named


def test_it_is_signed_as_it_is_and_only_once_for_all() -> None:
    signer = DkimSigner([signing_key("sel")])
    answer = built(FIELDS + b"\r\n" + BODY, signer)
    assert answer.wire.endswith(FIELDS + b"\r\n" + BODY)
    assert answer.dotted == answer.wire.replace(b"\r\n.", b"\r\n..")
    assert list(verdicts(answer.wire, records("sel"))) == [True]


def test_mail_that_others_wrote_goes_out_under_the_sender_it_is_given() -> None:
    for sender in ("SRS0=hash=day=people.example=ann@bounce.example", ""):
        content = msgspec.structs.replace(CONTENT, raw=b"Subject: Hi\r\n\r\n", from_email="", mail_from=sender, sign=False)
        assert domains_of(content, SERVER, Mail()).names == []
        message = RawMessage(content, msgspec.structs.replace(SERVER, enforced_from="us@garden.example"), KEYRING)
        [answer] = message.build([recipient()], composed_at=COMPOSED_AT, attempt=1)
        assert isinstance(answer, Envelope)
        assert (answer.mail_from, answer.wire) == (sender.encode(), content.raw)


def test_the_rules_for_from_addresses_hold() -> None:
    content = msgspec.structs.replace(CONTENT, raw=FIELDS + b"\r\n", from_email="news@garden.example")
    with pytest.raises(Invalid, match="From: must be other@garden.example"):
        RawMessage(content, msgspec.structs.replace(SERVER, enforced_from="other@garden.example"), KEYRING)
    with pytest.raises(Invalid, match="From: this system sends nothing"):
        RawMessage(content, SERVER, KEYRING, mail=Mail(forbidden_from=("*@garden.example",)))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([b"From: a@b.example", b"\r\n", b"\r\n.", b"\n", b"\r", b" x", b"Bcc: y", b"\0", b"\xff", b":", b"."])))
def test_whatever_is_taken_is_safe_on_the_wire(pieces: list[bytes]) -> None:
    try:
        taken = take(b"".join(pieces), 0.0)
    except Invalid:
        return
    header, gap, _ = taken.raw.partition(b"\r\n\r\n")
    assert gap
    assert b"bcc" not in header.lower()
    assert taken.raw.count(b"\r") == taken.raw.count(b"\n") == taken.raw.count(b"\r\n")
    assert taken.raw.endswith(b"\r\n")
    assert not taken.raw.startswith(b".")
