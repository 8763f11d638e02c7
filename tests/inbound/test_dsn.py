"""inbound.dsn: the machine-readable part, as the RFC has it and as it comes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inbound.dsn import DELAYED, DELIVERED, FAILED, MAX_RECIPIENTS, address_of, parse

HEAD = "Reporting-MTA: dns; mx.example\nArrival-Date: Tue, 4 Mar 2025 10:00:00 +0000\n\n"


def test_each_recipient_has_its_own_fate() -> None:
    text = HEAD + (
        "Final-Recipient: rfc822; Anna@B.example\nAction: failed\nStatus: 5.1.1\nDiagnostic-Code: smtp; 550 5.1.1\n no such user\n\n"
        "Final-Recipient: rfc822;bert@b.example\nAction: delayed\nStatus: 4.4.1\n\n"
        "Original-Recipient: rfc822;c@b.example\nFinal-Recipient: rfc822;carla@internal.example\nAction: relayed\nStatus: 2.0.0\n"
    )
    anna, bert, carla = parse(text)
    assert (anna.recipient, anna.action, anna.status, anna.diagnostic) == ("anna@b.example", FAILED, "5.1.1", "550 5.1.1 no such user")
    assert (bert.action, bert.status) == (DELAYED, "4.4.1")
    assert (carla.recipient, carla.also, carla.action) == ("c@b.example", ("carla@internal.example",), DELIVERED)


def test_recipients_run_together_are_told_apart() -> None:
    text = "Final-Recipient: rfc822;a@b.example\nAction: failed\nStatus: 5.1.1\nFinal-Recipient: rfc822;c@b.example\nAction: failed\n"
    assert [entry.recipient for entry in parse(text)] == ["a@b.example", "c@b.example"]


def test_a_blank_line_inside_a_recipient_s_fields_is_borne() -> None:
    text = HEAD + "Final-Recipient: rfc822;a@b.example\n\nAction: failed\nStatus: 5.2.2\nDiagnostic-Code: smtp;552 full\n"
    assert [(entry.recipient, entry.status, entry.diagnostic) for entry in parse(text)] == [("a@b.example", "5.2.2", "552 full")]


@pytest.mark.parametrize(
    ("fields", "action", "status"),
    [
        ("Status: 5.0.0", FAILED, "5.0.0"),
        ("Status: 4.2.0", DELAYED, "4.2.0"),
        ("Action: failed", FAILED, ""),
        ("Action: Failed (bounced)\nStatus: 5.1.1 (bad)", FAILED, "5.1.1"),
        ("Action: delivered\nStatus: 5.1.1", DELIVERED, "5.1.1"),
        ("Action: failed\nStatus: 9.9.9", FAILED, ""),
        ("Action: failed\nStatus: 5.1.1\nStatus: 4.0.0", FAILED, "5.1.1"),
    ],
)
def test_missing_doubled_and_contradictory_fields(fields: str, action: str, status: str) -> None:
    (entry,) = parse(f"{HEAD}Final-Recipient: rfc822;a@b.example\n{fields}\n")
    assert (entry.action, entry.status) == (action, status)


@pytest.mark.parametrize(
    ("value", "address"),
    [
        ("rfc822; <A@b.example>", "a@b.example"),
        ("rfc822;a+2Bb@c.example", "a+b@c.example"),
        ("utf-8; j\\x{F6}rg@b.example", "jörg@b.example"),
        ("a@b.example (Anna)", "a@b.example"),
        ("LOCAL; anna", ""),
        ("x-unix; |/usr/bin/procmail", ""),
        ("", ""),
    ],
)
def test_an_address_is_found_in_its_field(value: str, address: str) -> None:
    assert address_of(value) == address


def test_no_report_has_more_recipients_than_we_read() -> None:
    assert len(parse("".join(f"Final-Recipient: rfc822;a{n}@b.example\nAction: failed\n\n" for n in range(10_000)))) == MAX_RECIPIENTS


@given(st.text(alphabet=st.sampled_from("Final-Recipient: rfc822;a@b.\nAction:Status 5.1\0\r\t"), max_size=400))
def test_no_text_is_an_error(text: str) -> None:
    parse(text)
