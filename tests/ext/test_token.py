"""ext.token: the same tokens as `domain.links` and `domain.return_path`, the slow twins that also read them."""

import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain import links, return_path
from ext.token import Signer

KEYS = st.binary(min_size=32, max_size=32)
NUMBERS = st.integers(0, 2**63 - 1)


@given(KEYS, NUMBERS, NUMBERS, st.integers(0, 2**31))
def test_link_tokens_are_those_of_domain_links(key, user, campaign, number):
    text = Signer(key, links.MAC_BYTES).sign(user, campaign, number)
    assert text == links.token(key, links.LinkParts(user, campaign, number))
    assert links.read(key, text) == (user, campaign, number)


@given(KEYS, NUMBERS, NUMBERS, st.integers(0, 2**31), st.integers(0, 2**20))
def test_return_path_tokens_are_those_of_domain_return_path(key, user, campaign, number, day):
    text = Signer(key, return_path.MAC_BYTES, base32=True).sign(user, campaign, number, day)
    assert text == return_path.token(key, return_path.ReturnPath(user, campaign, number, day))
    assert return_path.read(key, f"b-{text}@x.example") == (user, campaign, number, day)


@given(st.binary(min_size=16, max_size=64), st.integers(10, 32))
def test_a_mac_is_hmac_sha256_for_any_key_and_any_number_of_octets_kept(key, kept):
    import base64

    text = Signer(key, kept).sign(5)
    data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    assert data == b"\x05" + hmac.digest(key, b"\x05", hashlib.sha256)[:kept]


def test_the_plain_and_the_processors_own_hash_agree():
    signer = Signer(b"k" * 32, 32)
    other = Signer(b"k" * 32, 32, plain=True)
    for number in range(1000):
        assert signer.sign(number, 2**63) == other.sign(number, 2**63)


@pytest.mark.parametrize(("key", "kept"), [(b"short", 16), (b"k" * 65, 16), (b"k" * 32, 9), (b"k" * 32, 33)])
def test_a_key_or_length_out_of_bounds_is_refused(key, kept):
    with pytest.raises(ValueError, match="octets"):
        Signer(key, kept)


def test_a_token_holds_one_to_four_numbers_of_64_bits():
    signer = Signer(b"k" * 32, 16)
    for numbers in ((), (1, 2, 3, 4, 5)):
        with pytest.raises(ValueError, match="one to four"):
            signer.sign(*numbers)
    for number in (-1, 2**64):
        with pytest.raises(OverflowError):
            signer.sign(number)
