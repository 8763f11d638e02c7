"""inbound.feedback_report: complaints as RFC 5965 has them and as they come."""

import pytest

from inbound.feedback_report import ACTED_ON, parse


def test_a_complaint_states_its_type_and_who_complained() -> None:
    report = parse(
        "Feedback-Type: Abuse\nUser-Agent: X/1\nVersion: 1\n"
        "Original-Mail-From: <B@s.example>\nOriginal-Rcpt-To: <A@b.example>\nIncidents: 3\n"
    )
    assert report is not None
    assert (report.feedback_type, report.recipients, report.original_mail_from, report.incidents) == (
        "abuse",
        ("a@b.example",),
        "b@s.example",
        3,
    )


@pytest.mark.parametrize("kind", ["not-spam", "auth-failure", "other", "made-up"])
def test_what_is_no_complaint_is_never_acted_on(kind: str) -> None:
    report = parse(f"Feedback-Type: {kind}\n")
    assert report is not None
    assert report.feedback_type not in ACTED_ON


def test_redacted_addresses_are_nobody() -> None:
    report = parse(
        "Feedback-Type: abuse\nOriginal-Rcpt-To: redacted\n"
        "Original-Rcpt-To: 3f6c@redacted.invalid\nRemoval-Recipient: undisclosed@x.example\n"
    )
    assert report is not None
    assert report.recipients == ()


def test_two_thousand_recipients_are_cut_and_junk_is_no_report() -> None:
    report = parse("Feedback-Type: abuse\n" + "".join(f"Original-Rcpt-To: a{n}@b.example\n" for n in range(2000)))
    assert report is not None
    assert len(report.recipients) == 1000
    assert parse("Version: 1\n") is None
    assert parse("") is None
