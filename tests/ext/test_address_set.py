"""ext.address_set beside a plain set and the rules of domain.suppression_key."""

import os
import struct
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domain import address
from domain.suppression_key import covering, parse
from ext.address_set import AddressSet


class Recipient(NamedTuple):
    email: str


LOCALS = st.sampled_from(["anna", "Info", "a+b", "x.y", "jürgen", "JÜRGEN"])
DOMAINS = st.sampled_from(["a.example", "b.a.example", "c.b.a.example", "bücher.example", "other.example"])
ADDRESSES = st.builds(lambda local, domain: f"{local}@{domain}", LOCALS, DOMAINS)
ENTRIES = st.one_of(
    ADDRESSES,
    DOMAINS,
    DOMAINS.map(lambda domain: f"*@*.{domain}"),
    LOCALS.map(lambda local: f"{local}@*"),
)
SCOPES = st.sampled_from([(0, 0), (1, 0), (1, 5), (1, 6), (2, 0), (2, 7)])


def made() -> AddressSet:
    return AddressSet(os.urandom(16), address.key)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.booleans(), SCOPES, ENTRIES), max_size=40), st.lists(ADDRESSES, min_size=1, max_size=10))
def test_it_holds_what_a_plain_set_holds_and_covers_what_the_rules_say(changes, asked):
    fast, slow = made(), set()
    for adding, scope, entry in changes:
        key = parse(entry)
        if adding:
            assert fast.add(scope[0], scope[1], key) is ((*scope, key) not in slow)
            slow.add((*scope, key))
        else:
            assert fast.discard(scope[0], scope[1], key) is ((*scope, key) in slow)
            slow.discard((*scope, key))
    assert len(fast) == len(slow)
    recipients = [Recipient(email) for email in asked]
    for user, list_id in ((1, 5), (1, 9), (2, 7), (3, 0)):
        scopes = {(0, 0), (user, 0), (user, list_id)}
        expected = [
            i
            for i, recipient in enumerate(recipients)
            if any((*scope, key) in slow for scope in scopes for key in covering(address.key(recipient.email)))
        ]
        assert fast.suppressed(user, list_id, recipients, list(range(len(asked)))) == expected


def test_many_come_and_go_without_a_trace():
    fast = made()
    keys = [f"user{i}@d{i % 97}.example" for i in range(20_000)]
    for key in keys:
        assert fast.add(1, 0, key)
    for key in keys[::2]:
        assert fast.discard(1, 0, key)
    recipients = [Recipient(key.upper()) for key in keys]
    assert fast.suppressed(1, 3, recipients, list(range(len(keys)))) == list(range(1, len(keys), 2))
    for key in keys[1::2]:
        fast.discard(1, 0, key)
    assert len(fast) == 0
    assert fast.suppressed(1, 3, recipients, [0, 1, 2]) == []


def copy_of(rows: list[tuple[int, int, bool, str]]) -> bytes:
    data = b"PGCOPY\n\xff\r\n\x00" + struct.pack(">ii", 0, 0)
    for user, list_id, removed, key in rows:
        text = key.encode()
        data += struct.pack(">hiqiqi?i", 4, 8, user, 8, list_id, 1, removed, len(text)) + text
    return data + b"\xff\xff"


def test_a_copy_may_be_cut_at_every_octet():
    data = copy_of([(1, 0, False, "a@b.example"), (0, 0, False, "@c.example"), (1, 0, True, "a@b.example"), (2, 9, False, "ü@d.example")])
    asked = [Recipient("a@b.example"), Recipient("x@c.example"), Recipient("ü@d.example")]
    for cut in range(len(data) + 1):
        fast = made()
        fast.begin_copy()
        fast.feed_copy(data[:cut])
        fast.feed_copy(data[cut:])
        assert len(fast) == 2
        assert fast.suppressed(2, 9, asked, [0, 1, 2]) == [1, 2]


@pytest.mark.parametrize(
    "data",
    [b"nonsense that is no copy at all", copy_of([(1, 0, False, "a@b.example")])[:19] + b"\x00\x03" + b"\x00" * 60],
)
def test_anything_but_such_a_copy_is_refused(data):
    fast = made()
    fast.begin_copy()
    with pytest.raises(ValueError, match="COPY"):
        fast.feed_copy(data)


def test_texts_that_are_no_addresses_break_nothing():
    fast = AddressSet(os.urandom(16), lambda email: email)
    for key in ("a@b.example", "@b.example", "a@*", "@*.b.example", "*@other.example"):
        fast.add(0, 0, key)
    odd = ["", "@", "a@", "@b", "no at", "ü", "x" * 5000 + "@b.example", "x" * 1023 + "@", "x" * 1022 + "@", "x" * 1024, "@" * 1020]
    assert fast.suppressed(1, 1, [Recipient(text) for text in odd], list(range(len(odd)))) == [2]  # a@ is covered by a@*
    some = [Recipient("@b.example"), Recipient("q@b.example"), Recipient("*@other.example"), Recipient("q@other.example")]
    assert fast.suppressed(1, 1, some, [0, 1, 2, 3]) == [0, 1, 2]  # an address may be a star: it is no pattern
    with pytest.raises(ValueError, match="16 octets"):
        AddressSet(b"short", address.key)
