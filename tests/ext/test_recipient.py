"""ext.recipient: what is read from merge data octet by octet is what the decoder reads, and what one refuses the other does."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from domain.campaign import Recipient
from domain.errors import Invalid
from ext.recipient import Names, Row, loosely
from tests.compose.test_campaign import COMPOSED_AT, assert_sound, campaign, one, parsed, said
from tests.reference.quoted_printable import normalised

FIELDS = ("a", "b", "first_name", "é", "id", "email")
TEMPLATE = "".join(f"[{{{{ subscriber['{name}'] }}}}|{{{{ subscriber['{name}'] | upcase }}}}]" for name in FIELDS)
TEMPLATE += "[{{ subscriber.a.b }}{{ subscriber.b[0] }}|%Subscriber:FirstName%|%Subscriber:A%]{% if subscriber.a == 'é' %}yes{% endif %}"
COMPILED = campaign(text=TEMPLATE, html="", subject="s")

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12) | st.sampled_from(["é", "", "a b", "😀"])
NUMBERS = st.integers(-(10**22), 10**22) | st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([-0.0, 0.5, -0.5, 10**17])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b"]) | TEXTS, inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from([*FIELDS, "FirstName", "FIRST_NAME", "c"]) | TEXTS
OBJECTS = st.dictionaries(NAMES, JSON, max_size=7)


CHANGES = st.lists(
    st.tuples(st.integers(0, 200), st.sampled_from([*b'{}[]",:\\0-.eutf \n\x00\x1f\x80\xc3\xed\xf4\xff']), st.booleans()), max_size=3
)
ODD = rb"""
{"a":01}
{"a":1.}
{"a":.5}
{"a":-}
{"a":1e5}
{"a":1e999}
{"a":tru}
{"a":true
{"a":1}x
{"a":1,}
{,"a":1}
{"a"}
{'a':1}
{"a":[1,]}
{"a":{"b"}}
{"a":"\x"}
{"a":"\u12"}
{"a":"\ud800"}
{"a":"\ud83d\ude00"}
{"a":"\u00e9"}
{"a":"\u00E9\u6771\u00df\/\"\\","b":"\u0041\u007f\u0080\u07ff\u0800\uffff"}
{"a":"\u001f","b":"\n"}
{"\u0061":1}
{"a":1,"a":2}
 {"a" : 1 }
{"a":nul
{"a":f
{
{}
[]
1
{"a":123456789012345678901234567890}
{"a":-0}
{"a":-0.0}
""".strip(b"\n").split(b"\n")
ODD += [b"", b'{"a":"\xff"}', b'{"a":"\xed\xa0\x80"}', b'{"a":"\t"}', b'{"a":' + b"[" * 3000 + b"]" * 3000 + b"}", b"\n{}\r\n"]


def text_of(data: bytes) -> str:
    """What the template says to somebody with these data."""
    wire = one(COMPILED, Recipient(1, 17, "ann@shore.example", data))[2]
    assert_sound(wire)
    return said(parsed(wire))


@settings(max_examples=150, deadline=None)
@given(OBJECTS, st.booleans(), st.sampled_from([None, 1]))
@example({"a": {"a": {"a": [[[1]]]}}}, False, 1)
@example({"a": "\ud7ff\ue000", "b": '\\"/\b\f\n\r\t'}, True, None)
def test_fields_are_read_as_the_decoder_reads_them(fields: dict[str, Any], ascii_only: bool, indent: int | None) -> None:
    data = json.dumps(fields, ensure_ascii=ascii_only, indent=indent).encode("utf-8")
    assert COMPILED._layout.parts
    expected = COMPILED._layout.parts[0].program
    scope = COMPILED.scope(Recipient(1, 17, "ann@shore.example", data), composed_at=COMPOSED_AT)
    assert scope["subscriber"] == {**msgspec.json.decode(data), "id": 17, "email": "ann@shore.example"}
    assert text_of(data) == normalised(expected.render(scope)) + "\n"


@settings(max_examples=500, deadline=None)
@given(OBJECTS, CHANGES)
@example({"a": 1}, [(4, ord("0"), False)])
def test_data_that_the_decoder_refuses_is_refused(fields: dict[str, Any], changes: list[tuple[int, int, bool]]) -> None:
    data = bytearray(msgspec.json.encode(fields))
    for at, octet, instead in changes:
        at %= len(data)
        data[at : at + instead] = bytes([octet])
    try:
        sound = isinstance(msgspec.json.decode(bytes(data)), dict)
        at_fault = ""
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        sound, at_fault = False, str(error)
    [answer] = COMPILED.build([Recipient(1, 17, "ann@shore.example", bytes(data))], composed_at=COMPOSED_AT, attempt=1)
    if isinstance(answer, Invalid):
        assert not sound or "NUL" in answer.reason or "cannot be rendered" in answer.reason, (bytes(data), answer)
    else:
        assert sound, (bytes(data), at_fault)


@pytest.mark.parametrize("data", ODD, ids=lambda data: ascii(data[:20]))
def test_odd_json_is_read_or_refused_as_the_decoder_does(data: bytes) -> None:
    try:
        value = msgspec.json.decode(data) if data else {}
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        value = None
    [answer] = COMPILED.build([Recipient(1, 17, "ann@shore.example", data)], composed_at=COMPOSED_AT, attempt=1)
    assert isinstance(answer, Invalid) is not isinstance(value, dict)
    if isinstance(value, dict):
        shown = value.get("a", "")
        assert text_of(data).startswith("[" if isinstance(shown, list) else f"[{shown}|")


def test_a_field_of_ten_thousand_names_is_found() -> None:
    compiled = campaign(text="{{ subscriber.f9999 }}{{ subscriber.f1 }}", html="", subject="s")
    for count in (10_000, 3, 5000, 10_000):
        data = msgspec.json.encode({f"f{number}": number for number in range(count)})
        assert said(parsed(one(compiled, Recipient(1, 1, "a@b.example", data))[2])) == ("99991\n" if count == 10_000 else "1\n")


def test_names_are_numbered_once() -> None:
    names = Names()
    assert [names.slot("a"), names.slot("b"), names.slot("a")] == [0, 1, 0]
    assert [names.slot("First_Name", loose=True), names.slot("firstname", loose=True)] == [2, 2]
    assert loosely("First_Name") == "firstname"


def test_a_base_url_without_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="500 octets"):
        Row(Names(), b"https://" + b"x" * 600)
