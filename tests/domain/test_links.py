"""domain.links: tokens read back, and every other spelling of them is refused."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain import links

KEY = b"k" * 32
PARTS = links.LinkParts(3, 70_000, 12_345_678)
NUMBERS = st.integers(0, 2**62)
ALPHABET = string.ascii_letters + string.digits + "-_"


@given(st.binary(min_size=32, max_size=32), NUMBERS, NUMBERS, NUMBERS)
def test_a_token_reads_back_with_its_own_key_only(key, user, campaign, number):
    parts = links.LinkParts(user, campaign, number)
    text = links.token(key, parts)
    assert links.read(key, text) == parts
    assert links.read(key[1:] + bytes([key[0] ^ 1]), text) is None
    assert len(text) <= links.MAX_TOKEN_CHARACTERS
    assert set(text) <= set(ALPHABET)


def test_a_url_carries_the_token_below_the_path_of_its_purpose():
    assert links.build(KEY, "https://go.example/", PARTS) == f"https://go.example/u/{links.token(KEY, PARTS)}"
    assert links.build(KEY, "https://go.example", PARTS, "web-view") == f"https://go.example/w/{links.token(KEY, PARTS)}"


def test_a_token_altered_in_any_character_is_refused():
    text = links.token(KEY, PARTS)
    for at in range(len(text)):
        for other in ALPHABET + "=+/ \0é":
            if other != text[at]:
                assert links.read(KEY, text[:at] + other + text[at + 1 :]) is None


def test_a_token_cut_extended_or_spelled_otherwise_is_refused():
    text = links.token(KEY, PARTS)
    for other in (
        text[:-1],
        text[1:],
        text + "A",
        text + "=",
        text + "==",
        "A" + text,
        text + "\n",
        text.swapcase(),
        f" {text}",
        f"{text}%3D",
    ):
        assert links.read(KEY, other) is None
    for length in range(len(text)):
        assert links.read(KEY, text[:length]) is None


@given(st.text(max_size=80) | st.text(st.sampled_from(ALPHABET), max_size=80) | st.just("A" * 65536))
def test_what_is_no_token_is_refused(text):
    assert links.read(KEY, text) is None


def test_a_longer_spelling_of_a_number_is_refused():
    import base64
    import hmac

    payload = b"\x83\x00" + links.varint(PARTS.campaign_id) + links.varint(PARTS.number)  # 3, in two octets
    text = base64.urlsafe_b64encode(payload + hmac.digest(KEY, payload, "sha256")[: links.MAC_BYTES]).rstrip(b"=").decode()
    assert links.read(KEY, text) is None


def test_a_token_holds_no_negative_number():
    with pytest.raises(ValueError, match="negative"):
        links.token(KEY, links.LinkParts(-1, 2, 3))
