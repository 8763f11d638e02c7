"""ext.dkim: canonical forms as an independent library makes them, and the fields around a signature."""

import base64
import hashlib
import re

import pytest
from dkim.canonicalization import Relaxed
from hypothesis import example, given
from hypothesis import strategies as st

from ext import body, dkim

KEY = (b"rsa-sha256", b"garden.example", b"s1", 256)
HEADER = b"From: a@garden.example\r\nTo: b@shore.example\r\nSubject: x\r\n"

lines = st.lists(st.sampled_from([b"a", b" ", b"  ", b"\t", b"\r\n", b"=20", b".", b"\xc3\xa4", b"\r", b"b c"]), max_size=40).map(b"".join)


def prepared(message: bytes, *keys: tuple[bytes, bytes, bytes, int]) -> tuple[list[bytes], list[bytes]]:
    hashes, [fields] = dkim.Fields(list(keys or [KEY])).prepare([message], 1_772_600_767)
    if isinstance(fields, ValueError):
        raise fields
    return [digest for [digest] in hashes], fields


def tag(field: bytes, name: bytes) -> bytes:
    found = re.search(rb"[:;\s]" + name + rb"=([^;]*)", field)
    assert found is not None
    return re.sub(rb"\s", b"", found[1])


@given(lines)
@example(b"")
@example(b"\r\n")
@example(b" \r\n\t\r\n")
@example(b"a\r\n\r\n\r\n")
@example(b"no end")
@example(b"a \t b \r\nc\r\n")
def test_the_relaxed_body_is_what_dkimpy_makes_of_it(text):
    if text.endswith((b" ", b"\t")):
        text += b"\r\n"  # a line that has blanks at its end and no end: no message has one
    assert dkim.relaxed_body(text) == Relaxed.canonicalize_body(text)


@given(lines)
def test_a_body_that_needs_no_relaxing_is_told_from_one_that_does(text):
    if dkim.is_relaxed(text):
        assert re.sub(rb"(\r\n)+\Z", b"\r\n", text) in (dkim.relaxed_body(text), b"\r\n")


@given(st.sampled_from([b"Subject", b"SUBJECT ", b"X-a\t"]), lines.map(lambda text: re.sub(rb"[\r\n]+(?![ \t])|\r(?!\n)", b"", text)))
@example(b"Subject", b"  two \r\n\tlines\t ")
@example(b"Subject", b"")
def test_the_relaxed_header_is_what_dkimpy_makes_of_it(name, value):
    [(canonical_name, canonical_value)] = Relaxed.canonicalize_headers([(name, value)])
    assert dkim.relaxed_header(name + b":" + value) + b"\r\n" == canonical_name + b":" + canonical_value


@given(st.lists(st.text(max_size=200).map(lambda text: text.replace("\0", "")), max_size=5))
def test_what_our_encoder_writes_needs_no_relaxing(values):
    # The shortcut of the hot path: the body hash is taken over the octets as they stand
    coded = body.joined(["<p>", *values, " \n"])
    assert dkim.is_relaxed(coded + b"\r\n")
    assert dkim.relaxed_body(coded + b"\r\n") == Relaxed.canonicalize_body(coded + b"\r\n")


@pytest.mark.parametrize("size", [0, 1, 2, 53, 54, 55, 56, 57, 61, 62, 63, 64, 65, 117, 118, 119, 120, 126, 127, 128, 10_000, 100_001])
def test_the_body_hash_is_sha_256_of_the_relaxed_body(size):
    text = b"x" * max(0, size - 2) + b"\r\n" if size else b""
    digests, [field] = prepared(HEADER + b"\r\n" + text)
    assert tag(field, b"bh") == base64.b64encode(hashlib.sha256(Relaxed.canonicalize_body(text)).digest())
    assert len(digests[0]) == 32


SIZES = st.one_of(st.integers(0, 300), st.sampled_from([4095, 4096, 10_000, 10_055, 10_056]))


@given(st.lists(st.tuples(SIZES, st.booleans()), max_size=9))
@example([(10_000, False), (0, False)])
@example([(200, False), (100, True), (120, False), (64, False)])
def test_bodies_hashed_side_by_side_get_the_hashes_they_have_alone(group):
    # Two bodies go through the processor together, however long each is; those that need the relaxed form first do not take part
    bodies = [(bytes([97 + at % 26]) * size + b" " * wide + b"\r\n") for at, (size, wide) in enumerate(group)]
    _, fields = dkim.Fields([KEY]).prepare([HEADER + b"\r\n" + text for text in bodies], 7)
    assert [tag(made[0], b"bh") for made in fields if not isinstance(made, ValueError)] == [
        base64.b64encode(hashlib.sha256(Relaxed.canonicalize_body(text)).digest()) for text in bodies
    ]


def test_a_body_that_is_not_ours_gets_the_real_relaxed_form():
    _, [ours] = prepared(HEADER + b"\r\na b\r\n\r\nc\r\n")
    _, [theirs] = prepared(HEADER + b"\r\na  \t b \r\n\t\r\nc\t\r\n\r\n \r\n")
    _, [other] = prepared(HEADER + b"\r\na b\r\nc\r\n")
    assert tag(ours, b"bh") == tag(theirs, b"bh") != tag(other, b"bh")


def test_what_is_covered():
    head = (
        b"X-Mailer: none\r\n"
        b"LIST-Unsubscribe: <https://x.example/u>\r\nList-Unsubscribe-Post: List-Unsubscribe=One-Click\r\nList-Help: <x>\r\n"
        b"Feedback-ID: a:b:c:sender\r\nCFBL-Address: fbl@garden.example; report=arf\r\nCFBL-Feedback-ID: 1\r\nMIME-Version: 1.0\r\n"
        b"Received: by us\r\nReturn-Path: <x>\r\nReply-To: c@garden.example\r\nListing: no\r\n"
    )
    _, [field] = prepared(HEADER + head + b"Date: today\r\nMessage-ID: <1@x>\r\n\r\nx\r\n")
    names = tag(field, b"h").split(b":")
    covered = [b"list-unsubscribe", b"list-unsubscribe-post", b"list-help", b"feedback-id", b"cfbl-address", b"cfbl-feedback-id"]
    assert sorted(names) == sorted([*dkim.ONCE_MORE, *dkim.ONCE_MORE, *covered, b"mime-version", b"reply-to"])
    assert b"l=" not in field.replace(b"rel", b"")


def test_fields_that_are_absent_are_named_once_so_that_none_can_be_added():
    _, [field] = prepared(b"From: a@garden.example\r\n\r\nx\r\n")
    assert sorted(tag(field, b"h").split(b":")) == sorted([b"from", *dkim.ONCE_MORE])


def test_the_length_of_a_field_depends_on_the_key_alone():
    fields = dkim.Fields([KEY])
    lengths = set()
    for number in range(5):
        message = HEADER + b"\r\n" + b"y" * number * 37 + b"\r\n"
        _, unfinished = fields.prepare([message], 1_772_600_767 + number)
        [whole] = fields.complete([message], unfinished, [[bytes([number]) * 256]])
        assert isinstance(whole, bytes)
        assert whole.endswith(message)
        field = whole[: -len(message)]
        assert all(len(line) <= 78 for line in field.split(b"\r\n"))
        assert not re.search(rb"(?<!\r)\n|\r(?!\n)|\r\n(?![ ])(?!\Z)", field)
        lengths.add(len(field))
    assert len(lengths) == 1


@pytest.mark.parametrize(
    "message",
    [
        b"", b"From: x", b"From: x\r\n", b"From: x\n\nbody", b" From: x\r\n\r\n", b"From: x\r\nno colon\r\n\r\n", b"Subject: x\r\n\r\n",
        b"\r\nbody", b"A: b\r\n" * 600 + b"From: x\r\n\r\n",
    ],
)  # fmt: skip
def test_a_message_without_a_proper_header_is_refused(message):
    with pytest.raises(ValueError, match="header|From|line"):
        prepared(message)


def test_signatures_of_the_wrong_length_or_number_are_refused():
    fields = dkim.Fields([KEY])
    message = HEADER + b"\r\n"
    _, unfinished = fields.prepare([message], 1)
    wrong: list[list[list[bytes]]] = [[], [[]], [[b"x" * 255]], [[b"x" * 256] * 2], [[b"x" * 256]] * 2]
    for signatures in wrong:
        with pytest.raises(ValueError, match="signature"):
            fields.complete([message], unfinished, signatures)


def test_a_group_is_prepared_and_completed_as_its_messages_are_alone():
    messages = [HEADER + b"\r\nfirst\r\n", b"no header", HEADER + b"\r\nsecond\r\n"]
    fields = dkim.Fields([KEY, (b"ed25519-sha256", b"garden.example", b"e", 64)])
    hashes, unfinished = fields.prepare(messages, 7)
    assert [len(of_key) for of_key in hashes] == [2, 2]
    signatures = [[bytes([number]) * size for number in (1, 2)] for size in (256, 64)]
    answers = fields.complete(messages, unfinished, signatures)
    assert isinstance(answers[1], ValueError)
    for row, at in enumerate((0, 2)):
        alone = fields.prepare([messages[at]], 7)
        assert alone[0] == [[of_key[row]] for of_key in hashes]
        assert fields.complete([messages[at]], alone[1], [[of_key[row]] for of_key in signatures]) == [answers[at]]
