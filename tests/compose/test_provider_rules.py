"""The rules of Gmail, Yahoo and Microsoft for bulk senders (B1-B10): what we compose keeps them, and pre-flight sees when it cannot."""

import datetime as dt
import email.utils
import re
from typing import Any

import msgspec
import pytest

from compose import dkim_keys, preflight
from compose.campaign import CompiledCampaign
from compose.signing import DkimSigner, SigningKey
from compose.verifying import verdicts
from config.settings import Mail
from domain import states
from domain.bounce import shipped_rules
from domain.dkim import DkimKey
from domain.errors import Invalid
from domain.sender_domain import DomainFacts, KeyFacts, SenderFacts
from engine import disposition
from ext.smtp_session import STAGE_CONTENT
from tests.compose.test_campaign import COMPOSED_AT, CONTENT, KEYRING, PUBLIC_URL, SERVER, parsed, recipient
from tests.reference.dkim_verdicts import verdicts as oracle

MAIL = Mail(
    x_mailer="Sluice", complaints_to="complaints@%sender_domain%", cfbl_address="fbl@%sender_domain%", feedback_sender_id="sluice2026"
)
MADE = dkim_keys.make("rsa-sha256")
NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
KEY = DkimKey(
    id=1, user_id=3, domain="garden.example", selector="s1", algorithm="rsa-sha256", bits=2048, public_key=MADE.public_key,
    private_key_sealed=b"", state="active", created_at=NOW, activated_at=NOW, retired_at=None,
)  # fmt: skip
SIGNER = DkimSigner([SigningKey("garden.example", "s1", "rsa-sha256", dkim_keys.parse(MADE.private_key))])
HTML = '<p>Hello {{ subscriber.first_name | default: "you" }}</p><a href="{{ links.unsubscribe }}">unsubscribe</a>'
TEXT = "Hello\n{{ links.unsubscribe }}"
PEOPLE = [recipient(number, f"p{number}@shore.example", first_name=f"Ann {number}") for number in range(1, 6)]


def wires(mail: Mail = MAIL, signer: DkimSigner | None = SIGNER, server: Any = SERVER, **changes: Any) -> list[bytes | Invalid]:
    said = msgspec.structs.replace(CONTENT, **{"html": HTML, "text": TEXT, "subject": "Hello", **changes})
    built = CompiledCampaign(said, server, KEYRING, PUBLIC_URL, signer, mail).build(PEOPLE, composed_at=COMPOSED_AT, attempt=1)
    return [each if isinstance(each, Invalid) else each[2] for each in built]


def one(**changes: Any) -> bytes:
    wire = wires(**changes)[0]
    assert isinstance(wire, bytes), wire
    return wire


def names(built: list[bytes | Invalid], said: Any = CONTENT, data: Any = (), known: Any = ()) -> list[str]:
    return [finding.name for finding in preflight.content(said, built, data, known)]


def facts(**changes: Any) -> SenderFacts:
    texts = ("v=spf1 ip4:192.0.2.1 -all",)
    sender = DomainFacts(name="garden.example", exists=True, mx=("mx.garden.example",), has_address=True, txt=texts)
    back = DomainFacts(name="bounce.garden.example", exists=True, mx=("mx.garden.example",), has_address=False, txt=texts)
    key = KeyFacts(name=KEY.record_name, domain=KEY.domain, bits=2048, expected=KEY.record, found=(KEY.record.replace("p=", " p = "),))
    usual = {"sender": sender, "return_path": back, "dmarc_name": "garden.example", "dmarc": ("v=DMARC1; p=none",), "keys": (key,)}
    return SenderFacts(**{**usual, "hosts": {"go.garden.example": True}, **changes})


def objections(**changes: Any) -> dict[str, str]:
    """Name of each finding -> who answers with which code."""
    found = preflight.sender(facts(**changes), one())
    return {finding.name: ", ".join(f"{answer.provider} {answer.code}".strip() for answer in finding.answers) for finding in found}


def test_a_campaign_that_keeps_every_rule_has_no_finding() -> None:
    said = msgspec.structs.replace(CONTENT, html=HTML, text=TEXT, subject="Hello")
    assert names(wires(), said, [{"first_name": "Ann"}], ["first_name"]) == []
    assert objections() == {}
    assert oracle(one(), {KEY.record_name: KEY.record}) == [True]


def test_b1_nobody_sends_from_a_domain_of_a_mailbox_provider() -> None:
    found = preflight.content(CONTENT, wires(from_email="me@gmail.com"), [], [])
    assert [(each.name, each.severity) for each in found if each.severity == "blocking"] == [("from_public_domain", "blocking")]
    with pytest.raises(Invalid, match=r"\*@gmail.com"):
        wires(mail=Mail(forbidden_from=("*@gmail.com",)), from_email="me@gmail.com")


def test_b2_authentication_alignment_and_a_visible_way_out() -> None:
    bare = facts().return_path
    assert "Gmail 4.7.27 / 5.7.27" in objections(return_path=msgspec.structs.replace(bare, txt=("hello",)))["spf_missing"]
    assert "spf_several" in objections(return_path=msgspec.structs.replace(bare, txt=("v=spf1 -all", "v=spf1 ~all")))
    assert "Gmail 4.7.31" in objections(dmarc=())["dmarc_missing"]
    assert "dmarc_broken" in objections(dmarc=("v=DMARC1; rua=mailto:x@y.example",))
    assert "Gmail 4.7.30 / 5.7.30" in objections(keys=())["dkim_missing"]
    [key] = facts().keys
    assert f"dkim_record:{key.name}" in objections(keys=(msgspec.structs.replace(key, found=()),))
    assert f"dkim_record:{key.name}" in objections(keys=(msgspec.structs.replace(key, found=("v=DKIM1; p=AAAA",)),))
    assert "dkim_short" in objections(keys=(msgspec.structs.replace(key, bits=1024),))
    other = msgspec.structs.replace(key, domain="esp.example")
    foreign = msgspec.structs.replace(bare, name="bounces.esp.example")
    assert "Gmail 4.7.32" in objections(keys=(other,), return_path=foreign)["not_aligned"]
    assert "no_unsubscribe_link" in names(wires(html="<p>x</p>", text="x"))


def test_b3_findings_name_the_codes_that_gmail_answers_with() -> None:
    every = preflight.sender(facts(dmarc=(), keys=()), None)
    assert {answer.code for finding in every for answer in finding.answers if answer.provider == "Gmail"} == {"4.7.31", "4.7.30 / 5.7.30"}


@pytest.mark.parametrize("detail", ["23", "25", "26", "27", "29", "30", "31", "32", "515"])
def test_b3_the_codes_blame_the_sender_and_never_cost_an_address(detail: str) -> None:
    for code in (421, 450, 550, 554):
        reply = f"{code // 100}.7.{detail} This mail has been rejected; see the guidelines for senders"
        reason = shipped_rules().classify(code, reply)
        assert (reason.category, reason.fault, reason.hard) == ("policy-related", "sender", False), reply
        what = disposition.decide(STAGE_CONTENT, code, reason)
        assert what.path == "throttle"
        if code < 500:
            assert what.recipient in (states.DEFERRED, disposition.REQUEUED)


def test_b4_one_sender_a_valid_message_id_and_single_fields_once() -> None:
    wire = one()
    message = parsed(wire)
    assert len(message["from"].addresses) == 1
    assert re.fullmatch(r"<[a-z2-7]+@[a-z.]+>", message["message-id"])
    assert email.utils.parsedate_to_datetime(message["date"]).tzinfo is not None
    head = wire.partition(b"\r\n\r\n")[0].decode()
    fields = [line.partition(":")[0].lower() for line in head.split("\r\n") if line[:1] not in " \t"]
    assert len(fields) == len(set(fields)), fields
    assert max(map(len, wire.split(b"\r\n"))) <= 998
    assert len(head) < 8192
    double = wire.replace(b"\r\nSubject: Hello\r\n", b"\r\nSubject: Hello\r\nSubject: again\r\n")
    two = wire.replace(b"<letter@garden.example>", b"<letter@garden.example>, b@c.example", 1)
    for changed, name in ((double, "header_twice"), (two, "from_count"), (wire.replace(b"Date: ", b"X-D: "), "header_missing"),
                          (wire.replace(b"Message-ID: <", b"Message-ID: "), "message_id"), (wire + b"x\n", "malformed")):  # fmt: skip
        assert name in names([changed]), name


def test_b5_domains_exist_and_class_tells_streams_apart() -> None:
    gone = msgspec.structs.replace(facts().sender, exists=False, mx=(), has_address=False, txt=())
    assert "Yahoo" in objections(sender=gone)["from_missing"]
    classes = {parsed(one(mail_class=each))["feedback-id"].split(":")[2] for each in ("marketing", "autoresponder", "transactional")}
    assert classes == {"marketing", "autoresponder", "transactional"}


def test_b6_microsoft_wants_spf_dkim_and_dmarc_and_a_sender_that_takes_answers() -> None:
    silent = msgspec.structs.replace(facts().return_path, txt=())
    found = objections(return_path=silent, keys=(), dmarc=())
    for name in ("spf_missing", "dkim_missing", "dmarc_missing"):
        assert "Microsoft 550 5.7.515" in found[name]
    assert "from_takes_no_mail" in objections(sender=msgspec.structs.replace(facts().sender, mx=(".",)))
    answers = msgspec.structs.replace(facts().sender, name="answers.example")
    assert objections(reply_to=answers) == {}
    for changes in ({"mx": (".",)}, {"mx": (), "has_address": False}, {"exists": False}):
        assert "Microsoft 550 5.7.515" in objections(reply_to=msgspec.structs.replace(answers, **changes))["reply_to_takes_no_mail"]
    assert list(objections(reply_to=msgspec.structs.replace(answers, exists=None, mx=None))) == ["dns_silent"], "silence is no proof"


def test_b7_one_click_unsubscribe_with_one_https_address_that_is_signed() -> None:
    wire = one()
    message = parsed(wire)
    links = re.findall(r"<([^<>]+)>", message["list-unsubscribe"])
    assert [link.partition(":")[0] for link in links] == ["https", "mailto"]
    assert message["list-unsubscribe-post"] == "List-Unsubscribe=One-Click"
    line = wire[wire.index(b"List-Unsubscribe: ") :].split(b"\r\n")[0]
    assert line.endswith(b">,"), "the address is on one line: a folded one breaks signatures and readers"
    [verdict] = verdicts(wire, {})
    assert {"list-unsubscribe", "list-unsubscribe-post"} <= set(verdict.headers)
    assert "unsubscribe_not_https" in names(wires(server=msgspec.structs.replace(SERVER, link_domain="")))
    tokens = {re.search(rb"/u/([\w-]+)", each)[1] for each in wires() if isinstance(each, bytes)}  # type: ignore[index]
    assert len(tokens) == len(PEOPLE)
    assert "no_unsubscribe" not in names(wires(list_id=0), msgspec.structs.replace(CONTENT, list_id=0)), "mail to nobody's list needs none"


def test_b8_the_list_is_named_the_same_in_every_message() -> None:
    every = [*wires(), *wires(id=8, mail_class="autoresponder"), one(text="")]
    ids = {parsed(wire)["list-id"] for wire in every if isinstance(wire, bytes)}
    assert len(ids) == 1
    assert re.search(r"<list-5\.user-3\.[a-z.]+>$", ids.pop())
    assert re.search(r"<list-6\.user-3\.[a-z.]+>$", parsed(one(list_id=6))["list-id"])
    assert "list-id" in verdicts(one(), {})[0].headers
    assert not [name for name in parsed(one(list_id=0)) if name.lower().startswith("list-")], "no list, nothing to leave"


def test_b9_feedback_id_has_four_parts_that_differ_and_is_signed() -> None:
    wire = one()
    parts = parsed(wire)["feedback-id"].split(":")
    assert parts == ["c7", "u3", "marketing", "sluice2026"]
    assert len(set(parts)) == 4
    assert "feedback-id" in verdicts(wire, {})[0].headers
    assert parsed(one(id=8))["feedback-id"].split(":")[-1] == "sluice2026"
    assert "feedback_id" in names(wires(mail=Mail(feedback_sender_id="ab")))


def test_b10_a_cfbl_address_of_another_domain_is_signed_for_by_both_or_left_out() -> None:
    other = Mail(cfbl_address="fbl@operator.example")
    made = dkim_keys.make("ed25519-sha256")
    beside = msgspec.structs.replace(
        KEY, id=2, user_id=1, domain="operator.example", selector="o1", algorithm="ed25519-sha256", public_key=made.public_key
    )
    alone = SigningKey("operator.example", "o1", "ed25519-sha256", dkim_keys.parse(made.private_key))
    signer = DkimSigner([*SIGNER.keys, alone])
    wire = one(mail=other, signer=signer)
    assert oracle(wire, {KEY.record_name: KEY.record, beside.record_name: beside.record}) == [True, True]
    assert [{"cfbl-address", "cfbl-feedback-id"} <= set(each.headers) for each in verdicts(wire, {})] == [True, True]
    for given, found in ((signer, []), (SIGNER, ["cfbl_left_out"]), (DkimSigner([alone]), ["cfbl_unsigned"]), (None, ["cfbl_left_out"])):
        said = preflight.content(CONTENT, [one(mail=other, signer=given)], [{"first_name": "Ann"}], ["first_name"], "operator.example")
        assert [each.name for each in said if each.name.startswith("cfbl")] == found
        assert all(each.severity == "warning" for each in said if each.name.startswith("cfbl"))
        assert ("operator.example" in "".join(each.what for each in said)) == (found == ["cfbl_left_out"])
    assert "cfbl-address" not in parsed(one(mail=other))
    assert "cfbl-feedback-id" not in parsed(one(mail=other))

    # the record of the second key: without it the mail is as good as ever, so nothing is held
    record = KeyFacts(name=beside.record_name, domain=beside.domain, bits=256, expected=beside.record, found=(beside.record,))
    assert [each.name for each in preflight.sender(facts(beside=(record,)), wire)] == []
    [finding] = preflight.sender(facts(beside=(msgspec.structs.replace(record, found=()),)), wire)
    assert (finding.name, finding.severity) == ("dkim_record:o1._domainkey.operator.example", "warning")
    [finding] = preflight.sender(facts(keys=(), beside=(record,)), None)
    assert finding.name == "dkim_missing", "a key for the complaint address is none for the sender"
    assert "cfbl_unsigned" in names(wires(signer=None))


def test_b10_cfbl_address_once_in_the_from_domain_and_signed() -> None:
    wire = one()
    message = parsed(wire)
    assert message["cfbl-address"] == "fbl@garden.example; report=arf"
    assert message["cfbl-feedback-id"] == message["x-fblid"]
    assert {"cfbl-address", "cfbl-feedback-id"} <= set(verdicts(wire, {})[0].headers)
    assert wire.lower().count(b"\r\ncfbl-address:") == wire.lower().count(b"\r\ncfbl-feedback-id:") == 1
    assert "cfbl-address" not in parsed(one(mail=Mail(cfbl_address="fbl@other.example")))


def test_fields_that_nobody_has_are_named() -> None:
    said = msgspec.structs.replace(
        CONTENT, subject="{{ subscriber.city }}", text="%Subscriber:Nick% %Subscriber:City|there% {{ subscriber['zip'] }}",
        html='{% if subscriber.vip %}{{ subscriber.vip }}{% endif %}{{ subscriber.email }}{{ subscriber.first_name | default: "you" }}',
    )  # fmt: skip
    data = [{"city": "Rome" if n % 4 else "", "zip": "1"} for n in range(100)]
    assert [each.name for each in preflight.fields(said, data, ["city", "zip", "vip", "first_name"])] == ["field_unknown:nick"]
    source = "{{ first_name }}{% assign a = 1 %}{{ a }}{{ links.x }}{{ 5 }}"
    assert preflight.unknown_variables(source) == ["first_name"]


def test_what_a_filter_would_count_is_said() -> None:
    long = "<p>" + "x" * 110_000 + "</p>"
    assert "clipped" in names(wires(html=long + HTML))
    assert "no_text" in names(wires(text=""))
    assert "no_subject" in names(wires(subject="{{ subscriber.nothing }}"))
    links = '<a href="http://203.0.113.7/x">a</a><a href="https://bit.ly/x">b</a><a href="https://evil.example/">www.bank.example</a>'
    assert {"link_to_address", "link_shortener", "link_disguised"} <= set(names(wires(html=HTML + links)))
    assert "link_disguised" not in names(wires(html=HTML + '<a href="https://www.bank.example/a">bank.example</a>'))
