"""compose.signing: every signature verifies with an independent verifier, nothing can be added, and same input gives same octets."""

import functools
import random
import re

import msgspec
import pytest

from compose import dkim_keys
from compose.campaign import CompiledCampaign
from compose.signing import DkimSigner, ParsedKeys, SigningKey
from domain.campaign import Recipient
from domain.dkim import DkimKey
from domain.errors import Invalid
from tests.compose.test_campaign import COMPOSED_AT, CONTENT, KEYRING, PUBLIC_URL, RECIPIENTS, SERVER, assert_sound, one, recipient
from tests.domain.test_dkim import key
from tests.reference.dkim_verdicts import verdicts


@functools.cache
def pair(name: str) -> dkim_keys.KeyPair:
    """One key pair per name; making them costs."""
    if name.startswith("ed"):
        return dkim_keys.make("ed25519-sha256")
    return dkim_keys.make("rsa-sha256", 1024 if name.startswith("small") else 2048)


def signing_key(name: str, domain: str = "garden.example") -> SigningKey:
    found = pair(name)
    return SigningKey(domain, name, found.algorithm, dkim_keys.parse(found.private_key))


def records(*names: str, domain: str = "garden.example") -> dict[str, str]:
    stored: list[DkimKey] = [
        key(domain=domain, selector=name, algorithm=pair(name).algorithm, public_key=pair(name).public_key) for name in names
    ]
    return {each.record_name: each.record for each in stored}


BOTH = DkimSigner([signing_key("rsa"), signing_key("ed")])


def campaign(signer: DkimSigner | None = BOTH, **changes: object) -> CompiledCampaign:
    return CompiledCampaign(msgspec.structs.replace(CONTENT, **changes), SERVER, KEYRING, PUBLIC_URL, signer)


@pytest.mark.parametrize("to", RECIPIENTS, ids=lambda to: to.email)
def test_both_signatures_of_the_newsletter_verify(to):
    wire = one(campaign(), to)[2]
    assert_sound(wire)
    assert verdicts(wire, records("rsa", "ed")) == [True, True]
    assert [wire.startswith(b"DKIM-Signature: "), wire.count(b"DKIM-Signature: ")] == [True, 2]
    assert wire.index(b"a=rsa-sha256") < wire.index(b"a=ed25519-sha256")


VARIED = [
    {"text": "", "html": "<p>only html</p>"},
    {"text": "only text", "html": ""},
    {"text": "ends in empty lines\n\n\n\n", "html": ""},
    {"text": "\n\n\n", "html": ""},
    {"text": " ", "html": ""},
    {"text": "", "html": ""},
    {"text": "blanks  and\ttabs \n   \n . \n..\n", "html": ""},
    {"text": "Größe: 東京 🎉\n" * 300, "html": "<p>Łódź</p>" * 500},
    {"text": "x" * 70_000, "html": ""},
    {"subject": "Ä " * 200, "from_name": "東京 " * 20},
    {"subject": "a  b   c  ", "from_name": 'Quote " and \\'},
    {"reply_to": "", "list_name": ""},
    {"from_email": "jürgen@garden.example"},
    {"from_email": "news@BÜCHER.example"},
    {"from_email": "a@garden.example", "list_name": "Grüße" * 20},
]


@pytest.mark.parametrize("changes", VARIED, ids=range(len(VARIED)))
def test_signatures_verify_whatever_the_message_says(changes):
    for to in RECIPIENTS[:3]:
        wire = one(campaign(**changes), to)[2]
        assert verdicts(wire, records("rsa", "ed")) == [True, True]


ADDED = [
    b"Subject: You have won\r\n", b"From: boss@garden.example\r\n", b"To: me@shore.example\r\n",
    b"Date: Mon, 01 Jan 2024 00:00:00 +0000\r\n",
    b"Message-ID: <2@garden.example>\r\n",
]  # fmt: skip


@pytest.mark.parametrize("line", ADDED)
def test_a_second_header_of_an_oversigned_kind_breaks_every_signature(line):
    wire = one(campaign(), RECIPIENTS[0])[2]
    head, _, body = wire.partition(b"\r\n\r\n")
    for changed in (line + wire, head + b"\r\n" + line + b"\r\n" + body):
        assert verdicts(changed, records("rsa", "ed")) == [False, False]


CHANGED = [
    (rb"(?m)^List-Unsubscribe: <", b"List-Unsubscribe: <x"), (rb"One-Click", b"Two-Clicks"), (rb"(?m)^List-ID: ", b"List-ID: x"),
    (rb"(?m)^Subject: ", b"Subject: Re: "), (rb"(?m)^To: ", b"To: x"), (rb"(?m)^Reply-To: ", b"Reply-To: x"),
    (rb"(?m)^X-FBLId: ", b"X-FBLId: x"), (rb"text/html", b"text/plain"), (rb" t=1", b" t=2"), (rb"\r\n\Z", b"\r\nadded\r\n"),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "instead"), CHANGED)
def test_what_is_covered_cannot_be_changed(pattern, instead):
    wire = one(campaign(), RECIPIENTS[0])[2]
    changed, count = re.subn(pattern, instead, wire, count=1)
    assert count == 1
    assert verdicts(changed, records("rsa", "ed"))[0] is False


def test_what_relays_do_to_a_message_does_not_break_it():
    wire = one(campaign(), RECIPIENTS[0])[2]
    head, _, body = wire.partition(b"\r\n\r\n")
    refolded = re.sub(rb"\r\n[ \t]+", b"\r\n\t   ", head).replace(b"\r\nTo: ", b"\r\nTO:   ")
    relayed = b"Received: from here\r\n by there\r\nX-Spam: no\r\n" + refolded + b"\r\n\r\n" + body + b"\r\n\r\n"
    assert verdicts(relayed, records("rsa", "ed")) == [True, True]


def test_the_same_input_gives_the_same_octets():
    def build(which: list[Recipient]) -> list[object]:
        return list(campaign().build(which, composed_at=COMPOSED_AT, attempt=2))

    first = build(RECIPIENTS)
    assert build(RECIPIENTS) == first
    assert [build([to])[0] for to in RECIPIENTS] == first
    assert b" t=%d;" % int(COMPOSED_AT) in one(campaign(), RECIPIENTS[0])[2]


def test_without_a_key_nothing_changes():
    signed, plain = one(campaign(), RECIPIENTS[0]), one(campaign(None), RECIPIENTS[0])
    assert b"DKIM-Signature" not in plain[2]
    assert signed[2].endswith(plain[2])
    assert (signed[:2], signed[3]) == (plain[:2], plain[3])


def test_one_refused_recipient_is_nobody_elses_trouble():
    answers = campaign().build([recipient(1), recipient(2, email="no address"), recipient(3)], composed_at=COMPOSED_AT, attempt=1)
    assert isinstance(answers[1], Invalid)
    for answer in (answers[0], answers[2]):
        assert isinstance(answer, tuple)
        assert verdicts(answer[2], records("rsa", "ed")) == [True, True]


def test_keys_may_change_between_two_messages():
    compiled = campaign(DkimSigner([signing_key("rsa")]))
    before = one(compiled, RECIPIENTS[0])[2]
    compiled.signer = DkimSigner([signing_key("rsa2")])
    after = one(compiled, RECIPIENTS[0])[2]
    compiled.signer = None
    assert one(compiled, RECIPIENTS[0])[2] == before[-len(one(compiled, RECIPIENTS[0])[2]) :]
    # Both records stay published: mail of before and after verifies
    assert verdicts(before, records("rsa", "rsa2")) == verdicts(after, records("rsa", "rsa2")) == [True]
    assert verdicts(after, records("rsa")) == [False]


@pytest.mark.parametrize("name", ["small", "rsa", "ed"])
def test_each_kind_of_key_signs_alone(name):
    assert verdicts(one(campaign(DkimSigner([signing_key(name)])), RECIPIENTS[0])[2], records(name)) == [True]


def test_a_message_that_cannot_be_read_is_refused_and_the_others_are_signed():
    good = b"From: a@garden.example\r\n\r\nhello\r\n"
    answers = BOTH.sign([good, b"no header", good], 1_700_000_000)
    assert isinstance(answers[1], Invalid)
    assert answers[0] == answers[2]
    assert isinstance(answers[0], bytes)
    assert verdicts(answers[0], records("rsa", "ed")) == [True, True]
    assert BOTH.sign([], 0) == []


def test_a_key_shows_nothing_of_itself():
    assert repr(signing_key("ed")) == "SigningKey(ed._domainkey.garden.example, ed25519-sha256)"


def test_parsed_keys_are_kept_and_the_oldest_go():
    parsed = ParsedKeys(most=2)
    for number in (1, 2):
        parsed.add(key(number), pair("rsa").private_key)
    signer = parsed.signer([key(1), key(9)])
    assert signer is not None
    assert [each.selector for each in signer.keys] == ["s1"]
    parsed.add(key(3), pair("rsa").private_key)
    assert [parsed.known(number) for number in (1, 2, 3)] == [True, False, True]
    assert len(parsed) == 2
    assert parsed.signer([key(2)]) is None
    with pytest.raises(ValueError):
        parsed.add(key(4), b"damaged")


@pytest.mark.slow
def test_ten_thousand_varied_messages_verify():
    dice = random.Random(8463)
    signs = "abc ÄÖ東京🎉.\n =.<>&'\"-_:;,\u00a0\t"
    known, count = records("rsa", "ed"), 0

    def text(most: int) -> str:
        return "".join(dice.choices(signs, k=dice.randrange(most)))

    def line(most: int) -> str:
        return text(most).replace("\n", " ").replace("\t", " ")

    while count < 10_000:
        compiled = campaign(
            subject=line(150), from_name=line(40), text=text(dice.choice([3, 200, 5000])),
            html=dice.choice(["", "<p>{{ subscriber.first_name }}</p>" + text(3000)]),
        )  # fmt: skip
        people = [recipient(number, f"p{number}@x{number}.example", first_name=text(40)) for number in range(1, 6)]
        for answer in compiled.build(people, composed_at=COMPOSED_AT + count, attempt=1):
            assert isinstance(answer, tuple), answer
            assert verdicts(answer[2], known) == [True, True], answer[2]
            count += 1
