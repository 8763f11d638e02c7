"""ext.body: quoted-printable that decodes to the text, on lines that no transport can damage."""

import quopri

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markupsafe import escape

from ext.body import Piece, Unsendable, joined, quoted_printable
from tests.reference import quoted_printable as slow

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=200) | st.lists(
    st.sampled_from(
        [
            "a",
            " ",
            "  ",
            ".",
            "..",
            "\r",
            "\n",
            "\r\n",
            "=",
            "é",
            "明",
            "😀",
            "\t",
            "<",
            "&",
            '"',
            "'",
            "word " * 9,
            "x" * 74,
            "x" * 80,
            "From ",
        ]
    ),
    max_size=20,
).map("".join)


def assert_safe(wire: bytes) -> None:
    """What DATA, BDAT, DKIM's relaxed form and RFC 5322 ask of every line."""
    assert b"\0" not in wire
    for line in wire.split(b"\r\n"):
        assert len(line) <= 76
        assert not line.startswith(b".")
        assert not line.endswith((b" ", b"\t"))
        assert b"  " not in line
        assert b"\r" not in line
        assert b"\n" not in line
        assert line.isascii()


def decoded(wire: bytes) -> str:
    return quopri.decodestring(wire.replace(b"\r\n", b"\n")).decode("utf-8")


@given(TEXTS)
@example("." * 300)
@example(" " * 300)
@example("a" * 75 + " \n")
@example("\r\n.\r\n")
def test_the_lines_decode_to_the_text_and_are_safe(text):
    wire = quoted_printable(text)
    assert_safe(wire)
    assert decoded(wire) == slow.normalised(text)
    assert slow.decode(wire) == slow.normalised(text)


@given(TEXTS)
def test_the_octets_are_those_of_the_obvious_encoder(text):
    assert quoted_printable(text) == slow.encode(text)


@given(TEXTS)
def test_escaping_is_that_of_markupsafe(text):
    wire = quoted_printable(text, escape=True)
    assert_safe(wire)
    assert decoded(wire) == slow.normalised(str(escape(text)))


@given(st.lists(st.tuples(TEXTS, st.booleans()), max_size=6), st.booleans())
@example([("a\r", True), ("\nb", True)], False)
@example([("a\r", False), ("", True), ("\nb", True)], False)
@example([("x" * 75, True), (".", True)], False)
@example([("x" * 70 + " ", True), ("\n", False)], True)
def test_pieces_encoded_ahead_of_time_and_values_join_to_one_text(parts, markup):
    wire = joined([Piece(text) if ahead else text for text, ahead in parts], escape=markup)
    assert_safe(wire)
    whole = "".join(text if ahead or not markup else str(escape(text)) for text, ahead in parts)
    assert decoded(wire) == slow.normalised(whole)


@given(TEXTS, TEXTS)
def test_a_nul_is_refused_wherever_it_stands(before, after):
    with pytest.raises(Unsendable, match="NUL"):
        quoted_printable(f"{before}\0{after}")
    with pytest.raises(Unsendable, match="NUL"):
        Piece(f"{before}\0{after}")


@pytest.mark.parametrize("half", [chr(0xD800), chr(0xDFFF)])
def test_half_a_surrogate_pair_is_refused_never_dropped(half):
    with pytest.raises(UnicodeEncodeError):
        quoted_printable(f"a{half}b")
    with pytest.raises(UnicodeEncodeError):
        Piece(half)


def test_a_long_text_is_encoded_whole():
    text = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 20_000
    assert decoded(quoted_printable(text)) == text
