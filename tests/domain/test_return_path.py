"""domain.return_path: addresses that read back in any case, fit a local part, and cannot be forged."""

import string

from hypothesis import example, given
from hypothesis import strategies as st

from domain import links, return_path

KEY = b"k" * 32
PATH = return_path.ReturnPath(3, 70_000, 12_345_678, 20_516)


@given(
    st.binary(min_size=32, max_size=32),
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**35 - 1),
    st.integers(0, 2**21 - 1),
)
@example(KEY, 2**63 - 1, 2**63 - 1, 2**35 - 1, 2**21 - 1)
def test_an_address_reads_back_in_any_case_and_fits_a_local_part(key, user, campaign, number, day):
    path = return_path.ReturnPath(user, campaign, number, day)
    address = return_path.build(key, "bounce.example", path)
    local = address.partition("@")[0]
    assert len(local) <= return_path.MAX_LOCAL_PART_OCTETS
    for spelled in (address, address.upper(), address.title(), local):
        assert return_path.read(key, spelled) == path


def test_the_mac_has_at_least_80_bits():
    assert return_path.MAC_BYTES * 8 >= 80


def test_another_key_or_prefix_is_refused():
    address = return_path.build(KEY, "x.example", PATH)
    assert return_path.read(b"j" * 32, address) is None
    assert return_path.read(KEY, address, return_path.UNSUBSCRIBE) is None
    assert return_path.read(KEY, return_path.build(KEY, "x.example", PATH, return_path.UNSUBSCRIBE), return_path.UNSUBSCRIBE) == PATH


def test_an_address_altered_in_any_character_is_refused():
    local = return_path.build(KEY, "x.example", PATH).partition("@")[0]
    for at in range(len(local)):
        for other in string.ascii_lowercase + string.digits + "-=_ \0é\u212a":
            if other != local[at]:
                assert return_path.read(KEY, local[:at] + other + local[at + 1 :]) is None


def test_an_address_cut_or_extended_is_refused():
    local = return_path.build(KEY, "x.example", PATH).partition("@")[0]
    for length in range(len(local)):
        assert return_path.read(KEY, local[:length]) is None
    for other in (local + "a", local + "=", "b-" + local, local + "+tag", local.removeprefix("b-")):
        assert return_path.read(KEY, other) is None


@given(st.text(max_size=80) | st.just("b-" + "a" * 70_000) | st.text(st.sampled_from("abc234@-"), max_size=70))
def test_what_is_no_return_path_is_refused(text):
    assert return_path.read(KEY, text) is None


def test_a_link_token_is_no_return_path():
    assert return_path.read(KEY, "b-" + links.token(KEY, links.LinkParts(1, 2, 3)).lower()) is None
