"""inbound.bounce_text: reports in prose of many makes and languages; no text costs more than its size."""

import time

import pytest

from inbound import bounce_text
from inbound.triage import read
from tests.inbound.bounce_forms import FORMS, RETURNED

Form = tuple[str, str, str, str, list[str], bool | None, tuple[str, ...]]


@pytest.mark.parametrize("path", ["<>", None], ids=["null sender", "no return path"])
@pytest.mark.parametrize("form", FORMS, ids=[form[0] for form in FORMS])
def test_a_report_in_prose_is_understood(form: Form, path: str | None) -> None:
    name, sender, subject, body, recipients, hard, categories = form
    header = f"From: {sender}\nTo: <bounce-1@mailer.sluice.example>\nSubject: {subject}\nMIME-Version: 1.0\n"
    header += "Content-Type: text/plain; charset=utf-8\n" + (f"Return-Path: {path}\n" if path else "")
    got = read((header + "\n" + body + RETURNED.format(to=(recipients or ["someone@rcpt.example"])[0])).encode())
    assert got.kind == "dsn", name
    assert [failure.recipient for failure in got.failed] == recipients
    if hard is not None:
        assert [failure.means.hard for failure in got.failed] == [hard]
    if categories:
        assert got.failed[0].means.category in categories


def test_the_returned_message_is_not_the_report() -> None:
    report, returned = bounce_text.split_returned("It failed.\n\n--- Below this line is a copy of the message.\n\nTo: a@b.example\n")
    assert report.strip() == "It failed."
    assert "a@b.example" in returned
    report, returned = bounce_text.split_returned("Es ging nicht.\n\nSubject: x\nReceived: from a by b\nTo: a@b.example\n")
    assert report.strip() == "Es ging nicht."
    assert returned.startswith("Subject: x")


def test_the_sender_and_the_helpdesk_are_not_recipients() -> None:
    text = "Your mail could not be delivered.\nFrom: news@sluice.example\nContact: help@isp.example\n\nno such user: anna@isp.example\n"
    assert [item.recipient for item in bounce_text.read(text).recipients] == ["anna@isp.example"]


def test_each_reply_of_a_transcript_ends_where_the_next_begins() -> None:
    text = "<<< 550 5.1.1 <a@b.example>... User unknown\n421 b.example Deferred: Connection timed out\n"
    assert bounce_text.replies_in(text)[0] == "550 5.1.1 <a@b.example>... User unknown"


def test_a_code_in_parentheses_stands_behind_its_words() -> None:
    assert "no mailbox here" in bounce_text.replies_in("<a@b.example>:\nSorry, no mailbox here by that name. (#5.1.1)\n")[0]


def test_a_gateway_s_own_words_do_not_hide_the_reply_it_got() -> None:
    text = "5.1.0 - Unknown address error 550-'5.7.1 Access denied, your address is blocked'"
    assert bounce_text.replies_in(text) == ["550 5.7.1 Access denied, your address is blocked'"]
    assert bounce_text.nested_status(text) == "5.7.1"


@pytest.mark.parametrize(
    "text",
    ["(" * 60_000, "a@" * 30_000, "a" * 60_000, "550 " * 15_000, "5.1.1." * 10_000, "<" * 60_000, "\n" * 60_000, "To: " * 15_000,
     "=?utf-8?q?" * 6000, "x@y.example\n" * 5000, "-" * 60_000, " \t" * 30_000, "<a@b>:\n550 5.1.1 no\n" * 3000, "\u2028\u202e" * 20_000],
)  # fmt: skip
def test_no_text_is_slow(text: str) -> None:
    started = time.process_time()
    bounce_text.read(text)
    bounce_text.replies_in(text)
    bounce_text.passages(text)
    bounce_text.says_delayed(text)
    assert time.process_time() - started < 1.0  # S17
