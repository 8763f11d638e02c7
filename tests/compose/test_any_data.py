"""Whatever the addresses, header values, merge values and bodies: a message is sound and says just that, or it is refused.

Read back by a parser that is not ours (the standard library's, in its oldest and most lenient form). A million examples take most of an
hour: `SLUICE_EXAMPLES=1000000 python -m pytest -m slow tests/compose/test_any_data.py`.
"""

import email
import email.header
import os
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markupsafe import escape

from domain.campaign import Recipient
from domain.errors import Invalid
from tests.compose.test_campaign import COMPOSED_AT, assert_sound, campaign, one, recipient
from tests.reference.quoted_printable import normalised

EXAMPLES = int(os.environ.get("SLUICE_EXAMPLES", "1000000"))
COMPILED = campaign(
    subject="News {{ subscriber.a }}",
    from_name="{{ subscriber.b }}",
    text="{{ subscriber.c }}\n.{{ subscriber.d }} end",
    html='<p title="{{ subscriber.d }}">{{ subscriber.c }}</p><a href="https://a.example/?q={{ subscriber.d }}">{{ subscriber.a }}</a>',
    headers=(("X-Note", "{{ subscriber.d }}"), ("X-List", "%Subscriber:B%")),
    track_links=True,
    track_opens=True,
)
ALWAYS = set(email.message_from_bytes(one(COMPILED, recipient(a="x"))[2]).keys())

BREAKING = ["\r\n", "\n", "\r", "\0", "\t", "\x1b", "\x7f", "\x85", "\u2028", "\u202e", "\ufeff", "=?utf-8?q?=0d=0a?="]
BREAKING += ["=?utf-7?b?DQo=?="]
ODD = [".", "..", "\r\n.\r\n", "  ", "=", "=?", "?=", "é", "明", "😀", "Bcc: x@y.example", ":", "<", ">", '"', "'", "&", "\\", "--=_"]
ODD += ["%zz"]
LONG = ["{{ x }}", "%Subscriber:A%", "word word word ", "x" * 80, "é" * 60, "x" * 1200]
PIECES = st.sampled_from([*BREAKING, *ODD, *LONG])
CLEAN = st.sampled_from(["a", "B", " ", ".", "é", "明", "😀", "=", "-", "'", "&", "<b>", '"', ",", "x" * 40, "_", "?", "(c)"])
CLEAN_TEXTS = st.lists(CLEAN, max_size=8).map("".join)
TEXTS = st.one_of(
    CLEAN_TEXTS,
    st.lists(PIECES, max_size=8).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
HEADERS = st.one_of(CLEAN_TEXTS, CLEAN_TEXTS, CLEAN_TEXTS, TEXTS)
PLAIN = st.text(st.sampled_from("abcXYZ019-_+"), min_size=1, max_size=12)
LOCALS = st.one_of(PLAIN, PLAIN, st.text(st.sampled_from('ab."\\ @<>,;:\r\n\0é\u202e()'), max_size=10))
DOMAINS = st.one_of(
    st.sampled_from(["shore.example", "b\u00fccher.example", "a.b.c.example", "x" * 63 + ".example"]),
    st.text(st.sampled_from("ab1.-_ é\r\n@"), max_size=12),
)


def decoded(value: Any) -> str:
    """A header field's text, its encoded words read."""
    parts = email.header.decode_header(str(value).replace("\r\n", ""))
    return "".join(part.decode(charset or "ascii") if isinstance(part, bytes) else part for part, charset in parts)


def check(local: str, domain: str, a: str, b: str, c: str, d: str) -> bool:
    """Whether the message was sent; asserts all that must hold of it."""
    address = f"{local}@{domain}"
    to = Recipient(1, 17, address, msgspec.json.encode({"a": a, "b": b, "c": c, "d": d}))
    [answer] = COMPILED.build([to], composed_at=COMPOSED_AT, attempt=1)
    if isinstance(answer, Invalid):
        assert answer.field in ("email", "subject", "from_name", "headers", "merge data")
        return False
    _, rcpt, wire, _ = answer
    assert_sound(wire)
    assert not any(octet in rcpt for octet in b"\r\n\0<> ") or rcpt.startswith(b'"')
    message = email.message_from_bytes(wire)
    names = message.keys()
    assert len(set(names)) == len(names), "no header twice"
    assert set(names) - {"X-Note", "X-List"} == ALWAYS - {"X-Note", "X-List"}, "no header more, none less"
    assert not message.defects
    assert decoded(message["Subject"]) == f"News {a}"
    if d.strip():
        assert decoded(message["X-Note"]) == d
    parts: Any = message.get_payload()
    plain, html = parts
    assert not plain.defects
    assert not html.defects
    assert said(plain) == normalised(f"{c}\n.{d} end")
    text = said(html)
    assert text.startswith(normalised(f'<p title="{escape(d)}">{escape(c)}</p><a href="https://'))
    assert text.count("<") == 5, "two tags opened, two closed, the pixel"
    return True


def said(part: Any) -> str:
    return normalised(part.get_payload(decode=True).decode("utf-8"))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LOCALS, DOMAINS, HEADERS, HEADERS, TEXTS, HEADERS)
def test_a_message_is_sound_and_says_what_it_was_given_or_is_refused(local: str, domain: str, a: str, b: str, c: str, d: str) -> None:
    check(local, domain, a, b, c, d)


@pytest.mark.slow
@settings(max_examples=EXAMPLES, deadline=None, derandomize=False, suppress_health_check=list(HealthCheck), database=None)
@given(LOCALS, DOMAINS, HEADERS, HEADERS, TEXTS, HEADERS)
def test_a_million_messages_are(local: str, domain: str, a: str, b: str, c: str, d: str) -> None:
    # Most drawn addresses are refused: the same values once more for one that is not
    if not check(local, domain, a, b, c, d):
        check("ann", "shore.example", a, b, c, d)
