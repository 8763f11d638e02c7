"""compose.mail_headers: what the operator adds to every message, by rule B9, B10 and requirements 31, 32, 45-47, 67, 95, 141."""

import json
import re
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compose.campaign import CompiledCampaign, Message
from compose.mail_headers import cfbl, check_from, custom_name
from config.settings import Mail
from domain import return_path
from domain.errors import Invalid
from tests.compose.test_campaign import COMPOSED_AT, CONTENT, KEYRING, PUBLIC_URL, SERVER, assert_sound, one, parsed, recipient

ALL = Mail(
    x_mailer="Sluice (harbour)",
    complaints_to="complaints@%sender_domain%",
    cfbl_address="fbl@fbl.%sender_domain%",
    feedback_sender_id="harbour1",
)


def compiled(mail: Mail = Mail(), *, server: dict[str, Any] | None = None, **content: Any) -> CompiledCampaign:  # noqa: B008
    return CompiledCampaign(
        msgspec.structs.replace(CONTENT, **content), msgspec.structs.replace(SERVER, **server or {}), KEYRING, PUBLIC_URL, mail=mail
    )


def sent(found: CompiledCampaign, **data: Any) -> Message:
    answer = one(found, recipient(**data))
    assert_sound(answer[2])
    return answer


def test_nothing_is_added_unless_it_is_set() -> None:
    message = parsed(sent(compiled())[2])
    for name in ("X-Mailer", "X-Complaints-To", "Feedback-ID", "CFBL-Address", "CFBL-Feedback-ID"):
        assert message.get_all(name) is None


def test_what_is_set_is_in_every_message_once() -> None:
    answer = sent(compiled(ALL))
    message = parsed(answer[2])
    assert message.get_all("X-Mailer") == ["Sluice (harbour)"]
    assert message.get_all("X-Complaints-To") == ["complaints@garden.example"]
    assert message.get_all("CFBL-Address") == ["fbl@fbl.garden.example; report=arf"]
    assert message.get_all("CFBL-Feedback-ID") == message.get_all("X-FBLId")
    token = str(message["CFBL-Feedback-ID"])
    assert return_path.read(KEYRING.derive("return-path"), f"b-{token}") == (3, 7, 1, int(COMPOSED_AT // 86400))


def test_feedback_id_is_as_gmail_wants_it() -> None:
    for mail_class in ("marketing", "transactional", "autoresponder"):
        [value] = parsed(sent(compiled(ALL, mail_class=mail_class))[2]).get_all("Feedback-ID") or []
        assert value == f"c7:u3:{mail_class}:harbour1"
        parts = str(value).split(":")
        assert len(parts) == len(set(parts)) == 4
        assert 5 <= len(parts[-1]) <= 15


def test_a_complaint_address_nobody_would_believe_is_left_out() -> None:
    mail = msgspec.structs.replace(ALL, cfbl_address="fbl@elsewhere.example")
    message = parsed(sent(compiled(mail))[2])
    assert message["CFBL-Address"] is None
    assert message["CFBL-Feedback-ID"] is None
    assert parsed(sent(compiled(mail, from_email="a@elsewhere.example"))[2])["CFBL-Address"] == "fbl@elsewhere.example; report=arf"
    without = msgspec.structs.replace(ALL, cfbl_address="")
    assert sent(compiled(mail))[2] == sent(compiled(without))[2]


@pytest.mark.parametrize(
    ("address", "sender", "beside"),
    [
        ("fbl@garden.example", b"garden.example", ""),
        ("fbl@Fbl.Garden.example", b"GARDEN.example", ""),
        ("fbl@%sender_domain%", b"garden.example", ""),
        ("fbl@x.%sender_domain%", b"garden.example", ""),
        ("fbl@Operator.example", b"garden.example", "operator.example"),
        ("fbl@garden.example", b"news.garden.example", "garden.example"),
        ("fbl@nogarden.example", b"garden.example", "nogarden.example"),
    ],
)
def test_who_must_sign_beside_the_from_domain_for_a_complaint_address(address: str, sender: bytes, beside: str) -> None:
    line, found = cfbl(Mail(cfbl_address=address), sender)
    assert found == beside
    assert line == b"CFBL-Address: %b; report=arf\r\n" % address.replace("%sender_domain%", sender.decode()).encode()
    assert cfbl(Mail(), sender) == (b"", "")


@pytest.mark.parametrize(
    ("server", "mail", "domain"),
    [
        ({}, Mail(sender_domain="central.example", catch_all_domain="all.example"), b"bounce.garden.example"),
        ({"mfrom": ""}, Mail(sender_domain="central.example", catch_all_domain="all.example"), b"central.example"),
        ({"mfrom": ""}, Mail(catch_all_domain="all.example"), b"all.example"),
        ({"mfrom": ""}, Mail(), b"garden.example"),
        ({"mfrom": "x@own.example"}, Mail(sender_domain="central.example"), b"own.example"),
        ({"use_list_sender_as_mfrom": True}, Mail(sender_domain="central.example"), b"garden.example"),
    ],
)
def test_the_return_path_by_the_order_of_the_rules(server: dict[str, Any], mail: Mail, domain: bytes) -> None:
    mail_from = sent(compiled(mail, server=server))[0]
    assert mail_from.rpartition(b"@")[2] == domain
    assert mail_from.startswith(b"b-") == (domain in (b"bounce.garden.example", b"central.example", b"all.example"))


@pytest.mark.parametrize(
    ("pattern", "address", "refused"),
    [
        ("*@hotmail.com", "Ann@HotMail.com", True),
        ("*@hotmail.com", "ann@hotmail.com.example", False),
        ("ceo@*", "ceo@garden.example", True),
        ("*@*.ru", "a@b.ru", True),
        ("a.b@c.example", "aXb@c.example", False),
        ("*", "a@b.example", True),
    ],
)
def test_forbidden_from_patterns(pattern: str, address: str, refused: bool) -> None:
    if refused:
        with pytest.raises(Invalid, match="address of a domain of your own"):
            check_from("from_email", address, [pattern])
    else:
        check_from("from_email", address, [pattern])


def test_a_campaign_from_a_forbidden_address_is_refused_by_its_field() -> None:
    mail = Mail(forbidden_from=("*@garden.example",))
    with pytest.raises(Invalid, match="^from_email"):
        compiled(mail)
    with pytest.raises(Invalid, match="^list.sender_email"):
        compiled(mail, server={"use_list_sender_as_from": True})
    compiled(mail, server={"enforced_from": "news@garden.example"})


def test_custom_headers_carry_merge_tags() -> None:
    headers = (
        ("X-Campaign", "%User:ID%.%Campaign:ID%"),
        ("X-Who", "%Subscriber:EmailAddress% {{ subscriber.city }}"),
        ("X-None", "{{ subscriber.nothing }}"),
        ("X-Abuse", "complaints@%sender_domain%"),
        ("X-Empty", ""),
    )
    message = parsed(sent(compiled(headers=headers), city="Zürich")[2])
    assert message["X-Campaign"] == "3.7"
    assert message["X-Who"] == "ann@shore.example Zürich"
    assert message["X-Abuse"] == "complaints@garden.example"
    assert message.get_all("X-None") is None
    assert message.get_all("X-Empty") is None


@pytest.mark.parametrize("value", ["a\r\nBcc: x@y.example", "a\nb", "a\0b", "\ud800"])
def test_merge_data_that_would_break_a_header_refuses_the_recipient(value: str) -> None:
    found = compiled(headers=(("X-Who", "{{ subscriber.city }}"),))
    [answer] = found.build([_raw(value)], composed_at=COMPOSED_AT, attempt=1)
    assert isinstance(answer, Invalid)


def _raw(value: str) -> Any:
    return msgspec.structs.replace(recipient(), data=json.dumps({"city": value}).encode())


@pytest.mark.parametrize(
    "name",
    ["From", "subject", "List-Unsubscribe", "CFBL-Address", "Content-Type", "DKIM-Signature", "X-FBLId", "Received", "Resent-To", "Bcc",
     "", "X Y", "X:Y", "X-\u00e4", "1X", "X\r\n", "X-" + "a" * 60],
)  # fmt: skip
def test_names_that_are_ours_or_no_names_are_refused(name: str) -> None:
    with pytest.raises(Invalid):
        custom_name(name)
    with pytest.raises(Invalid):
        compiled(headers=((name, "x"),))


def test_two_headers_of_one_name_are_refused() -> None:
    with pytest.raises(Invalid, match="same name"):
        compiled(headers=(("X-A", "1"), ("x-a", "2")))


@given(st.text(max_size=300))
@settings(max_examples=300, deadline=None)
def test_no_value_adds_a_header_line(value: str) -> None:
    found = compiled(headers=(("X-Who", "{{ subscriber.city }}"),))
    [answer] = found.build([_raw(value)], composed_at=COMPOSED_AT, attempt=1)
    if isinstance(answer, Invalid):
        return
    head = answer[2].partition(b"\r\n\r\n")[0]
    plain = one(compiled(), recipient())[2].partition(b"\r\n\r\n")[0]
    names = re.findall(rb"^([^ \t:]+):", head, re.MULTILINE)
    assert [name for name in names if name != b"X-Who"] == re.findall(rb"^([^ \t:]+):", plain, re.MULTILINE)


def test_the_list_unsubscribe_address_stands_beside_our_one_https_link_and_says_whom_it_is_about() -> None:
    wire = sent(compiled(Mail(list_unsubscribe_to="leavers+x@%sender_domain%")))[2]
    line = rb"\r\nList-Unsubscribe: <https://[^\r\n<>]+>,\r\n <mailto:leavers\+x@garden\.example\?subject=unsubscribe%20(u-[a-z2-7]+)>\r\n"
    [token] = re.findall(line, wire)
    whose = return_path.read(KEYRING.derive("unsubscribe"), token.decode(), return_path.UNSUBSCRIBE)
    assert whose is not None
    assert whose[:3] == (3, 7, 1)
    assert wire.count(b"List-Unsubscribe: ") == 1
