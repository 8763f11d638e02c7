"""domain.forwarding: alias rules, addresses of duty, rewritten senders, and what is not forwarded."""

import pytest

from domain.errors import Invalid
from domain.forwarding import MARKER, Alias, Routes, parse_aliases, read_rewritten, rewritten, unsendable, why_not

KEY = bytes(range(32))
MAIL = b"From: ada@reader.example\r\nSubject: Re: News\r\n\r\nHello\r\n"


def test_the_first_rule_that_matches_wins() -> None:
    rules = parse_aliases(
        "# who reads what\nreply@News.example: support@ours.example\nsales-*@news.example:sales@ours.example\n\n"
        "*@shop.example:shop@ours.example\n*:rest@ours.example\nlate@news.example:never@ours.example\n"
    )
    routes = Routes(rules)
    for recipient, target in (
        ("Reply@news.example", "support@ours.example"),
        ("sales-emea@news.example", "sales@ours.example"),
        ("sales@news.example", "rest@ours.example"),
        ("anyone@shop.example", "shop@ours.example"),
        ("anyone@shop.example.evil.example", "rest@ours.example"),
        ("late@news.example", "rest@ours.example"),
    ):
        assert routes.target(recipient) == (target, False), recipient


def test_without_a_rule_nobody_gets_it() -> None:
    assert Routes(parse_aliases("reply@news.example:a@ours.example")).target("other@news.example") == ("", False)


def test_a_dot_in_a_pattern_is_a_dot() -> None:
    assert not Alias("a.b@news.example", "x@ours.example").matches("axb@news.example")


def test_addresses_of_duty_go_where_they_are_sent_and_complaints_to_their_own_reader() -> None:
    rules = parse_aliases("*:rest@ours.example")
    both = Routes(rules, "admin@ours.example", "trust@ours.example", frozenset({"complaints"}))
    for local, target in (("abuse", "trust"), ("Complaints", "trust"), ("postmaster", "admin"), ("root", "admin")):
        assert both.target(f"{local}@news.example") == (f"{target}@ours.example", True)
    assert both.target("info@news.example") == ("rest@ours.example", False)
    assert Routes(rules, "admin@ours.example").target("abuse@news.example") == ("admin@ours.example", True)
    assert Routes(rules).target("postmaster@news.example") == ("rest@ours.example", False)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("reply@news.example", "line 1: write pattern:target"),
        ("\n\nreply:a@ours.example", "line 3: the pattern must be an address"),
        ("reply@news.example:nobody", "line 1: the target has no @"),
        ("reply@news.example:a@b@ours.example", "line 1: the target has more than one @"),
        ("a*b*c*d*@news.example:a@ours.example", "at most 3 *"),
        ("a b@news.example:a@ours.example", "the pattern must be an address"),
        ("x@news.example:a@ours.example\n" * 1001, "at most 1000 rules"),
        ("*:a@ours.example\r\nBcc: x@y.example:", "line 2: the pattern must be an address"),
    ],
)
def test_rules_that_cannot_be_read_are_refused_with_their_line(text: str, reason: str) -> None:
    with pytest.raises(Invalid) as refused:
        parse_aliases(text)
    assert reason in refused.value.reason


def test_a_rewritten_sender_is_read_back_for_three_weeks_in_any_case() -> None:
    made = rewritten(KEY, "Ada.Lovelace@reader.example", "bounce.mailer.example", 20_000)
    assert made.startswith("SRS0=")
    assert made.endswith("=reader.example=Ada.Lovelace@bounce.mailer.example")
    assert read_rewritten(KEY, made, 20_000) == "Ada.Lovelace@reader.example"
    assert read_rewritten(KEY, made.lower(), 20_021) == "ada.lovelace@reader.example"
    assert read_rewritten(KEY, made.upper(), 19_999) == "ADA.LOVELACE@READER.EXAMPLE"
    assert read_rewritten(KEY, made, 20_022) is None
    assert read_rewritten(KEY, made, 19_998) is None


def test_an_address_that_we_did_not_make_is_not_read() -> None:
    made = rewritten(KEY, "ada@reader.example", "bounce.mailer.example", 20_000)
    local, _, domain = made.partition("@")
    for at in range(5, len(local)):
        changed = local[:at] + ("x" if local[at].lower() != "x" else "y") + local[at + 1 :]
        assert read_rewritten(KEY, f"{changed}@{domain}", 20_000) is None, changed
    assert read_rewritten(bytes(32), made, 20_000) is None
    for other in ("SRS0=@x.example", "SRS0=a=b=c@x.example", "srs0=ééééé=aa=b=c@x.example", "ada@reader.example", ""):
        assert read_rewritten(KEY, other, 20_000) is None


def test_a_sender_that_does_not_fit_becomes_the_null_sender() -> None:
    assert rewritten(KEY, "", "ours.example", 1) == ""
    assert rewritten(KEY, "a" * 40 + "@reader.example", "ours.example", 1) == ""
    assert len(rewritten(KEY, "a" * 32 + "@reader.example", "ours.example", 1).rpartition("@")[0]) <= 64


def test_mail_in_a_loop_is_not_forwarded() -> None:
    marked = f"{MARKER}: 0badcafe\r\n".encode() + MAIL
    assert why_not(MAIL, "ada@reader.example", duty=False, installation="0badcafe") == ""
    assert "before" in why_not(marked, "ada@reader.example", duty=True, installation="0badcafe")
    assert why_not(marked, "ada@reader.example", duty=False, installation="0badcaff") == ""  # another installation's
    looped = b"Received: from a by b\r\n" * 31 + MAIL
    assert "Received" in why_not(looped, "ada@reader.example", duty=True, installation="0badcafe")
    assert why_not(MAIL + looped, "ada@reader.example", duty=False, installation="0badcafe") == ""  # in the text, not in the header


def test_what_no_server_may_be_sent_is_named() -> None:
    assert unsendable(MAIL) == unsendable(MAIL + b"x" * 998 + b"\r\n") == ""
    assert "octets" in unsendable(MAIL + b"x" * 999 + b"\r\n")
    for octet in (b"\r", b"\n", b"\0"):
        assert "NUL" in unsendable(MAIL + b"a" + octet + b"b\r\n")


@pytest.mark.parametrize(
    "field",
    [b"Auto-Submitted: auto-replied", b"auto-submitted: auto-generated", b"Precedence: bulk", b"Precedence: auto_reply", b"List-Id: <x>",
     b"X-Auto-Response-Suppress: All", b"X-Autoreply: yes"],
)  # fmt: skip
def test_automatic_mail_goes_to_addresses_of_duty_only(field: bytes) -> None:
    automatic = field + b"\r\n" + MAIL
    assert "automatic" in why_not(automatic, "ada@reader.example", duty=False, installation="0badcafe")
    assert why_not(automatic, "ada@reader.example", duty=True, installation="0badcafe") == ""
    assert why_not(b"Auto-Submitted: no\r\n" + MAIL, "ada@reader.example", duty=False, installation="0badcafe") == ""
    assert "automatic" in why_not(MAIL, "", duty=False, installation="0badcafe")
