"""Which addresses are taken, and when two are one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.address import key, parse, parse_domain
from domain.errors import Invalid

TAKEN = {
    # as written: on the wire, key, needs SMTPUTF8
    "ada@news.example": ("ada@news.example", "ada@news.example", False),
    "Ada.Lovelace+tag@NEWS.Example": ("Ada.Lovelace+tag@news.example", "ada.lovelace+tag@news.example", False),
    "o'brien_!#$%&*/=?^`{|}~-@x-1.example": ("o'brien_!#$%&*/=?^`{|}~-@x-1.example", "o'brien_!#$%&*/=?^`{|}~-@x-1.example", False),
    "a@bücher.example": ("a@xn--bcher-kva.example", "a@xn--bcher-kva.example", False),
    "A@BÜCHER.EXAMPLE": ("A@xn--bcher-kva.example", "a@xn--bcher-kva.example", False),
    "a@xn--bcher-kva.example": ("a@xn--bcher-kva.example", "a@xn--bcher-kva.example", False),
    "a@straße.example": ("a@xn--strae-oqa.example", "a@xn--strae-oqa.example", False),
    "a@例え.テスト": ("a@xn--r8jz45g.xn--zckzah", "a@xn--r8jz45g.xn--zckzah", False),
    "Jürgen@news.example": ("Jürgen@news.example", "jürgen@news.example", True),
    "用户@例子.example": ("用户@xn--fsqu00a.example", "用户@xn--fsqu00a.example", True),
    "l" * 64 + "@news.example": ("l" * 64 + "@news.example", "l" * 64 + "@news.example", False),
    "a@" + ".".join(["d" * 59] * 4) + ".example": ("a@" + ".".join(["d" * 59] * 4) + ".example",) * 2 + (False,),
}

REFUSED = {
    "": "is empty",
    "ada": "has no @",
    "ada.news.example": "has no @",
    "@news.example": "has nothing before the @",
    "ada@": "has no domain after the @",
    "a b@news.example": "contains a space",
    "ada @ news.example": "contains a space",
    " ada@news.example": "contains a space",
    "ada@news.example\n": "contains a space or line break",
    "ada@news.example\r\nRCPT TO:<eve@x.example>": "contains a space or line break",
    "a..b@news.example": "has two dots in a row",
    ".a@news.example": "has a dot at an end",
    "a.@news.example": "has a dot at an end",
    "a@news..example": "has two dots in a row",
    "a@.example": "is not a domain label",
    "a@news.example.": "ends in a dot",
    "a@b@news.example": "has more than one @",
    '"a b"@news.example': "contains a space",
    '"ab"@news.example': "has a quoted part",
    "a,b@news.example": "more than one address",
    "a@news.example,b@news.example": "has more than one @",
    "a@x.example;": "is not a domain label",
    "a(comment)@news.example": "contains '('",
    "<a@news.example>": "contains '<'",
    "a@[192.0.2.1]": "has an address literal",
    "a@192.0.2.1": "has a domain that ends in a number",
    "a@news": "has a domain without a dot",
    "a@ne_ws.example": "is not a domain label",
    "a@-news.example": "is not a domain label",
    "a@news-.example": "is not a domain label",
    "a@" + "d" * 64 + ".example": "is not a domain label",
    "a@" + "d" * 3000 + ".example": "has a domain of more than 253",
    "a@" + "ü" * 3000 + ".example": "has a domain of more than 253",
    "l" * 65 + "@news.example": "has more than 64 octets before the @",
    "ü" * 33 + "@news.example": "has more than 64 octets before the @",
    "l" * 64 + "@" + ".".join(["d" * 60] * 3) + ".example": "is longer than 254 octets",
    "a@xn--zzzzzz99999.example": "not a valid international domain label",
    "a@\u200b.example": "not a valid international domain name",
    "a@\ud800.example": "not a valid international domain name",
    "a\0@news.example": "contains a NUL",
    "a\x07@news.example": "contains '\\x07'",
    "a\u200b@news.example": "invisible character U+200B",
    "a\u202e@news.example": "invisible character U+202E",
    "\ud800@news.example": "invisible character U+D800",
    "a\u00a0b@news.example": "contains a space",
}


@pytest.mark.parametrize("text", TAKEN, ids=ascii)
def test_what_is_taken(text: str) -> None:
    address = parse(text)
    assert (address.wire, address.key, address.smtputf8) == TAKEN[text]
    assert key(text) == address.key
    assert parse(address.text).key == address.key
    assert parse(address.wire).key == address.key


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: ascii(text)[:40])
def test_what_is_refused_and_why(text: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse(text, "from")
    assert caught.value.field == "from"
    assert REFUSED[text] in caught.value.reason


@given(st.text(max_size=80) | st.from_regex(r"[a-z.+\"@ ]{1,20}@[a-z.\[\]-]{1,20}", fullmatch=True))
def test_whatever_comes_an_address_is_fit_for_the_wire_or_refused(text: str) -> None:
    try:
        address = parse(text)
    except Invalid:
        return
    local, _, domain = address.wire.rpartition("@")
    assert len(address.wire.encode()) <= 254
    assert len(local.encode()) <= 64
    assert domain.isascii()
    assert "." in domain
    assert not set(address.wire) & set(' \t\r\n\0<>(),;:\\"[]')
    assert parse(address.text).key == address.key == parse(address.key).key


def test_a_domain_alone() -> None:
    assert parse_domain("Track.BÜCHER.example", "link_domain") == "track.xn--bcher-kva.example"
    for text in ("", "localhost", "https://x.example", "x.example/path", "x.example:80", "a@x.example"):
        with pytest.raises(Invalid, match="link_domain"):
            parse_domain(text, "link_domain")


@pytest.mark.parametrize(("text", "reason"), [("", "is empty"), ("a@b.example", "a domain alone"), ("https://b.example", "a domain alone")])
def test_what_stands_for_a_domain_and_is_none_is_not_called_an_address(text: str, reason: str) -> None:
    with pytest.raises(Invalid) as refused:
        parse_domain(text, "domain")
    assert reason in refused.value.reason
