"""ext.header: fields that read back as the text that was given, and refuse the text that could break out of them."""

import email
import email.policy

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from ext.body import Unsendable
from ext.header import MAX_TEXT_OCTETS, check, mailbox, unstructured
from tests.reference import header_fields as slow

PARTS = [
    "a",
    "b ",
    " ",
    "  ",
    "é",
    "明",
    "😀",
    "word " * 5,
    "x" * 40,
    "x" * 80,
    "=?",
    "?=",
    "=?utf-8?q?",
    "_",
    "=",
    ".",
    '"',
    "\\",
    "(",
    ")",
    ",",
    "<",
    ">",
    "@",
    ":",
    ";",
]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=14).map("".join) | st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Cf", "Zl", "Zp"]), max_size=120
)
FORBIDDEN = [
    "\r",
    "\n",
    "\0",
    "\t",
    "\x0b",
    "\x1b",
    "\x7f",
    "\x85",
    "\x9f",
    "\u2028",
    "\u2029",
    "\u200e",
    "\u200f",
    "\u061c",
    "\u202a",
    "\u202e",
    "\u2066",
    "\u2069",
    "\ufeff",
]


def accepted(text: str) -> bool:
    try:
        check(text)
    except ValueError:
        return False
    return True


@given(TEXTS)
@example("=?utf-8?q?hello?=")
@example("a" * 66 + " b")
@example("a" * 67 + " b")
@example("a" * 68)
@example("明" * 300)
def test_an_unstructured_value_reads_back_and_its_lines_are_sound(text):
    assume(accepted(text))
    field = unstructured(b"Subject", text)
    assert slow.lines_are_sound(field) or not text
    name, value = slow.unfolded(field)
    assert name == "Subject"
    assert slow.text(value) == text


@given(TEXTS)
@example('Ann "the boss" O\'Neill \\ Co')
@example("Smith, Ann")
def test_a_display_name_reads_back_beside_its_address(text):
    assume(accepted(text))
    field = mailbox(b"From", text, b"ann@shore.example")
    assert slow.lines_are_sound(field)
    parsed = email.message_from_bytes(field + b"\r\n", policy=email.policy.default)["from"]
    assert [address.addr_spec for address in parsed.addresses] == ["ann@shore.example"]
    shown = slow.unfolded(field)[1].removesuffix(b"<ann@shore.example>").removesuffix(b" ")
    if shown.startswith(b'"'):
        assert parsed.addresses[0].display_name == text
    elif not text:
        assert field == b"From: ann@shore.example\r\n"
    else:
        assert slow.text(shown) == text


@given(TEXTS, st.sampled_from(FORBIDDEN), TEXTS)
def test_a_character_that_could_break_or_disguise_a_header_is_refused(before, bad, after):
    for make in (lambda text: unstructured(b"Subject", text), lambda text: mailbox(b"From", text, b"a@b.example")):
        with pytest.raises(Unsendable, match=f"U\\+{ord(bad):04X}|hides|decoded"):
            make(before + bad + after)


@pytest.mark.parametrize(
    "text",
    [
        "=?utf-8?q?=0d=0a?=",
        "=?utf-8?Q?a=0D=0ABcc:_x@y.example?=",
        "=?UTF-8?B?DQpCY2M6IHhAeS5leGFtcGxl?=",
        "hello =?iso-8859-1?q?=0a?= there",
        "=?utf-16?b?AA0ACg==?=",
        "=?nosuch?q?=00?=",
        "=?utf-8?q?=E2=80=A8?=",
        "=?utf-8?b?4oCu?=",
        "=?utf-7?q?+AA0ACg-?=",
    ],
)
def test_an_encoded_word_that_hides_something_is_refused(text):
    with pytest.raises(Unsendable, match="encoded word"):
        check(text)


@pytest.mark.parametrize("text", ["=?utf-8?q?caf=C3=A9?=", "is 1 =? 2", "=?utf-8?x?abc?="])
def test_text_that_only_looks_like_an_encoded_word_arrives_as_it_was_written(text):
    assert slow.text(slow.unfolded(unstructured(b"Subject", text))[1]) == text


def test_half_a_surrogate_pair_is_refused_never_dropped():
    with pytest.raises(UnicodeEncodeError):
        unstructured(b"Subject", "a\ud800b")


def test_a_value_longer_than_the_limit_is_refused():
    check("é" * (MAX_TEXT_OCTETS // 2))
    assert slow.lines_are_sound(unstructured(b"Subject", "é" * (MAX_TEXT_OCTETS // 2)))
    for text in ("é" * (MAX_TEXT_OCTETS // 2) + "e", "a" * 1_000_000):
        with pytest.raises(Unsendable, match="octets"):
            unstructured(b"Subject", text)
        with pytest.raises(Unsendable, match="octets"):
            mailbox(b"From", text, b"a@b.example")


def test_plain_text_stays_readable():
    assert unstructured(b"Subject", "Good morning, Ann") == b"Subject: Good morning, Ann\r\n"
    assert mailbox(b"From", "Harbour Letter", b"a@b.example") == b"From: Harbour Letter <a@b.example>\r\n"
    assert mailbox(b"From", "Letter, Inc.", b"a@b.example") == b'From: "Letter, Inc." <a@b.example>\r\n'
    assert mailbox(b"Reply-To", "", b"a@b.example") == b"Reply-To: a@b.example\r\n"
