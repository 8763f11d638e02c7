"""A COPY of recipients becomes the packed list that msgspec would have made of them, however it is cut."""

import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.campaign import Recipient
from ext.recipient_rows import RecipientRows

HEAD = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
END = b"\xff\xff"


def row(number: int, subscriber: int, email: str, data: bytes) -> bytes:
    octets = email.encode()
    return (
        struct.pack("!hiiiq", 4, 4, number, 8, subscriber) + struct.pack("!i", len(octets)) + octets + struct.pack("!i", len(data)) + data
    )


def taken(rows: RecipientRows) -> list[Recipient]:
    return msgspec.msgpack.decode(rows.packed(), type=list[Recipient])


@given(
    st.lists(st.tuples(st.integers(1, 2**62), st.text(max_size=300), st.binary(max_size=400)), max_size=20),
    st.integers(1, 2**31 - 30),
    st.integers(0, 2**20 - 1),
    st.integers(1, 500),
)
def test_those_that_are_not_done_are_packed_with_their_positions(
    people: list[tuple[int, str, bytes]], first: int, bits: int, cut: int
) -> None:
    done = bits.to_bytes(3)
    copy = HEAD + b"".join(row(first + i, *person) for i, person in enumerate(people)) + END
    rows = RecipientRows(done, first)
    for start in range(0, len(copy), cut):
        rows.feed_copy(copy[start : start + cut])
    left = [i for i in range(len(people)) if not done[i >> 3] & (0x80 >> (i & 7))]
    assert rows.positions == left
    assert taken(rows) == [Recipient(first + i, *people[i]) for i in left]


def test_an_address_of_any_length_gets_through() -> None:
    people = [(1, 7, "a" * 100_000, b"x" * 200_000), (2, 8, "", b"")]
    rows = RecipientRows(b"\0", 1)
    rows.feed_copy(HEAD + b"".join(row(*person) for person in people) + END)
    assert taken(rows) == [Recipient(*person) for person in people]


@pytest.mark.parametrize(
    "copy",
    [
        b"",
        HEAD,
        b"x" * 30,
        HEAD + row(1, 1, "a@b.example", b"{}"),
        HEAD + struct.pack("!hii", 3, 4, 1) + bytes(30) + END,
        HEAD + row(9, 1, "a@b.example", b"{}") + END,
        HEAD + row(0, 1, "a@b.example", b"{}") + END,
        HEAD + row(1, 1, "a@b.example", b"{}")[:-6] + b"\xff\xff\xff\xff" + END,
    ],
)
def test_anything_else_is_refused_at_the_end(copy: bytes) -> None:
    rows = RecipientRows(b"\0", 1)
    rows.feed_copy(copy)
    with pytest.raises(ValueError, match="not a whole COPY"):
        rows.packed()
