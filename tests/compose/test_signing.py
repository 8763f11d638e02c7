"""compose.signing: every signature verifies with an independent verifier, nothing can be added, and same input gives same octets."""

import functools
import random
import re

import msgspec
import pytest

from compose import dkim_keys
from compose.campaign import CompiledCampaign
from compose.raw import RawMessage
from compose.signing import DkimSigner, ParsedKeys, SigningDomains, SigningKey, domains_of
from compose.verifying import verdicts as ours
from config.settings import Mail
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


OPERATOR = 1
ELSEWHERE = Mail(cfbl_address="fbl@operator.example")
BESIDE = DkimSigner([*BOTH.keys, signing_key("rsa2", "operator.example"), signing_key("ed2", "operator.example")])
BESIDE_RECORDS = {**records("rsa", "ed"), **records("rsa2", "ed2", domain="operator.example")}


def test_with_a_complaint_address_of_another_domain_both_domains_sign_for_it():
    compiled = CompiledCampaign(CONTENT, SERVER, KEYRING, PUBLIC_URL, BESIDE, ELSEWHERE)
    for to in RECIPIENTS:
        wire = one(compiled, to)[2]
        assert_sound(wire)
        assert verdicts(wire, BESIDE_RECORDS) == [True] * 4
        said = ours(wire, BESIDE_RECORDS)
        assert [(each.domain, each.algorithm) for each in said] == [
            ("garden.example", "rsa-sha256"), ("garden.example", "ed25519-sha256"),
            ("operator.example", "rsa-sha256"), ("operator.example", "ed25519-sha256"),
        ]  # fmt: skip
        for each in said:
            assert {"cfbl-address", "cfbl-feedback-id"} <= set(each.headers)
        assert wire.count(b"\r\nCFBL-Address: fbl@operator.example; report=arf\r\n") == 1
        forged = wire.replace(b"fbl@operator.example", b"fbl@operator.examplf")
        assert verdicts(forged, BESIDE_RECORDS) == [False] * 4


def test_the_complaint_address_comes_and_goes_with_the_signature_of_its_domain():
    compiled = CompiledCampaign(CONTENT, SERVER, KEYRING, PUBLIC_URL, BOTH, ELSEWHERE)
    plain = one(campaign(), RECIPIENTS[0])[2]
    assert one(compiled, RECIPIENTS[0])[2] == plain, "nobody signs for the address, so it is not named"
    compiled.signer = BESIDE
    there = one(compiled, RECIPIENTS[0])[2]
    assert b"\r\nCFBL-Feedback-ID: " in there
    compiled.signer = DkimSigner([*BOTH.keys, signing_key("ed2", "operator.example")])
    assert verdicts(one(compiled, RECIPIENTS[0])[2], BESIDE_RECORDS) == [True] * 3
    compiled.signer = BOTH
    assert one(compiled, RECIPIENTS[0])[2] == plain
    compiled.signer = BESIDE
    assert one(compiled, RECIPIENTS[0])[2] == there, "the same octets as before"


def test_a_complaint_address_of_the_from_domain_needs_no_other_signature():
    for address in ("fbl@garden.example", "fbl@a.Garden.example", "fbl@%sender_domain%"):
        mail = Mail(cfbl_address=address)
        assert domains_of(CONTENT, SERVER, mail) == domains_of(CONTENT, SERVER, Mail())
        wire = one(CompiledCampaign(CONTENT, SERVER, KEYRING, PUBLIC_URL, BOTH, mail), RECIPIENTS[0])[2]
        assert b"\r\nCFBL-Address: " in wire
        assert verdicts(wire, records("rsa", "ed")) == [True, True]


def ids(*chosen: list[DkimKey]) -> tuple[list[int], ...]:
    return tuple([each.id for each in keys] for keys in chosen)


def test_the_operators_key_signs_for_the_complaint_address_before_the_users_own():
    wanted = domains_of(CONTENT, SERVER, ELSEWHERE)
    assert wanted == SigningDomains(CONTENT.user_id, ["garden.example", "bounce.garden.example"], "operator.example")
    mine = [key(1, user_id=3), key(2, user_id=3, algorithm="ed25519-sha256")]
    own = [key(3, user_id=3, domain="operator.example")]
    operators = [
        key(4, user_id=OPERATOR, domain="operator.example", algorithm="ed25519-sha256"),
        key(5, user_id=OPERATOR, domain="operator.example"),
        key(6, user_id=OPERATOR, domain="operator.example", state="retiring"),
        key(7, user_id=OPERATOR),
    ]
    strangers = [key(8, user_id=9), key(9, user_id=9, domain="operator.example")]
    assert ids(*wanted.choose([*strangers, *own, *operators, *mine], OPERATOR)) == ([1, 2], [5, 4])
    assert ids(*wanted.choose([*strangers, *own, *mine], OPERATOR)) == ([1, 2], [3])
    assert ids(*wanted.choose([*strangers, *mine], OPERATOR)) == ([1, 2], []), "a stranger's key never signs"
    assert ids(*wanted.choose([*strangers, *operators], OPERATOR)) == ([], [5, 4]), "nor the operator's for the sender"
    assert ids(*wanted.choose([*strangers, *own], 0)) == ([], [3]), "there is no operator"
    assert ids(*wanted.choose([*own, *mine], 3)) == ([1, 2], [3]), "the user is the operator"


def test_a_signature_of_the_parent_domain_serves_for_both():
    content = msgspec.structs.replace(CONTENT, from_email="letter@news.garden.example")
    wanted = domains_of(content, SERVER, Mail(cfbl_address="fbl@garden.example"))
    assert wanted.feedback == "garden.example"
    above = key(1, user_id=3)
    assert ids(*wanted.choose([above, key(2, user_id=OPERATOR)], OPERATOR)) == ([1], [])
    below = key(3, user_id=3, domain="news.garden.example")
    assert ids(*wanted.choose([above, below], OPERATOR)) == ([3], [1])


def test_mail_that_comes_with_its_own_header_is_signed_for_its_sender_alone():
    raw = msgspec.structs.replace(CONTENT, raw=b"From: letter@garden.example\r\nCFBL-Address: fbl@operator.example\r\n\r\nhello\r\n")
    assert domains_of(raw, SERVER, ELSEWHERE).feedback == ""
    message = RawMessage(raw, SERVER, KEYRING, BOTH, ELSEWHERE)
    [answer] = message.build(RECIPIENTS[:1], composed_at=COMPOSED_AT, attempt=1)
    assert not isinstance(answer, Invalid)
    assert verdicts(answer[2], records("rsa", "ed")) == [True, True]
    assert domains_of(msgspec.structs.replace(CONTENT, sign=False), SERVER, ELSEWHERE).names == []
    assert domains_of(msgspec.structs.replace(CONTENT, from_email="no address"), SERVER, ELSEWHERE).names == []


def test_the_return_path_of_the_whole_system_signs_where_the_server_has_none():
    server = msgspec.structs.replace(SERVER, mfrom="")
    mail = Mail(sender_domain="central.example", catch_all_domain="all.example")
    assert domains_of(CONTENT, server, mail).sender == ["garden.example", "central.example"]
    assert domains_of(CONTENT, server, Mail(catch_all_domain="all.example")).sender == ["garden.example", "all.example"]
    assert domains_of(CONTENT, server, Mail()).sender == ["garden.example"]


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
