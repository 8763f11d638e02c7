"""compose.signing_lanes: the same octets as OpenSSL where the library is there, and OpenSSL's where it is not or fails."""

import ctypes
import functools
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA256

from compose import signing_lanes
from compose.signing import DkimSigner, SigningKey
from compose.signing_lanes import LANES, LaneKey, Lanes

DIGESTS = [bytes([number]) * 32 for number in range(20)]


@functools.cache
def private(bits: int = 2048) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, bits)


def by_openssl(key: rsa.RSAPrivateKey, digests: list[bytes]) -> list[bytes]:
    return [key.sign(digest, PKCS1v15(), Prehashed(SHA256())) for digest in digests]


class Library:
    """What crypto_mb's functions do, by plain arithmetic; from round `faulty_from` on one lane is wrong."""

    def __init__(self, faulty_from: int = 10**9, faulty_lane: int = 0, refuses: bool = False) -> None:
        self.rounds = 0
        self.faulty_from = faulty_from
        self.faulty_lane = faulty_lane
        self.refuses = refuses

    def sign(self, source: Any, target: Any, p: Any, q: Any, dp: Any, dq: Any, iq: Any, bits: int, *rest: None) -> int:
        self.rounds += 1
        if self.refuses:
            return 1
        half = bits // 16
        for lane in range(LANES):
            parts = [int.from_bytes(ctypes.string_at(part[lane], half), "little") for part in (p, q, dp, dq, iq)]
            message = int.from_bytes(ctypes.string_at(source[lane], bits // 8), "big")
            m1, m2 = pow(message, parts[2], parts[0]), pow(message, parts[3], parts[1])
            made = m2 + parts[1] * (parts[4] * (m1 - m2) % parts[0])
            if self.rounds >= self.faulty_from and lane == self.faulty_lane:
                made ^= 1
            ctypes.memmove(target[lane], made.to_bytes(bits // 8, "big"), bits // 8)
        return 0

    def verify(self, source: Any, target: Any, modulus: Any, bits: int, *rest: None) -> int:
        for lane in range(LANES):
            n = int.from_bytes(ctypes.string_at(modulus[lane], bits // 8), "little")
            back = pow(int.from_bytes(ctypes.string_at(source[lane], bits // 8), "big"), 65537, n)
            ctypes.memmove(target[lane], back.to_bytes(bits // 8, "big"), bits // 8)
        return 0


def lanes(library: Library) -> Lanes:
    return Lanes(library.sign, library.verify, frozenset({1024, 2048}))


def test_a_turn_signs_one_round_where_there_are_lanes_and_more_where_there_are_none():
    in_lanes = SigningKey("garden.example", "s1", "rsa-sha256", private(1024), lanes=lanes(Library()))
    alone = SigningKey("garden.example", "s2", "rsa-sha256", private(1024))
    assert DkimSigner([in_lanes]).at_once == DkimSigner([alone, in_lanes]).at_once == LANES
    assert DkimSigner([alone]).at_once > LANES


@pytest.mark.parametrize("bits", [1024, 2048])
def test_padding_and_key_are_handed_over_as_the_library_wants_them(bits):
    assert lanes(Library()).sign(LaneKey(private(bits)), DIGESTS[:9]) == by_openssl(private(bits), DIGESTS[:8])
    assert lanes(Library()).sign(LaneKey(private(bits)), DIGESTS[:12]) == by_openssl(private(bits), DIGESTS[:12])


@pytest.mark.parametrize("count", range(20))
def test_any_number_of_messages_gets_the_octets_of_openssl(count):
    library = Library()
    key = SigningKey("garden.example", "s1", "rsa-sha256", private(1024), lanes=lanes(library))
    assert key.sign(DIGESTS[:count]) == by_openssl(private(1024), DIGESTS[:count])
    assert library.rounds == count // LANES + (count % LANES >= signing_lanes.WORTH_IT)


@pytest.mark.parametrize("lane", range(LANES))
def test_a_wrong_signature_is_never_handed_out_and_switches_the_lanes_off(lane):
    library = Library(faulty_from=3, faulty_lane=lane)
    made = lanes(library)
    key = SigningKey("garden.example", "s1", "rsa-sha256", private(1024), lanes=made)
    right = by_openssl(private(1024), DIGESTS[:8])
    for _ in range(4):
        assert key.sign(DIGESTS[:8]) == right
    assert library.rounds == 3, "switched off for good"
    assert not made.takes(private(1024))


def test_a_library_that_refuses_is_not_asked_again():
    library = Library(refuses=True)
    key = SigningKey("garden.example", "s1", "rsa-sha256", private(1024), lanes=lanes(library))
    for _ in range(2):
        assert key.sign(DIGESTS[:8]) == by_openssl(private(1024), DIGESTS[:8])
    assert library.rounds == 1


def test_sizes_without_lanes_and_rare_exponents_are_left_to_openssl():
    assert not lanes(Library()).takes(private(3072))
    assert not lanes(Library()).takes(rsa.generate_private_key(3, 2048))
    assert lanes(Library()).takes(private(2048))


@pytest.mark.skipif(signing_lanes.load() is None, reason="no ipp-crypto, or no AVX-512 IFMA")
@pytest.mark.parametrize("bits", [1024, 2048])
def test_the_real_library_gives_the_octets_of_openssl(bits):
    found = signing_lanes.load()
    assert found is not None
    if not found.takes(private(bits)):
        pytest.skip(f"no lanes for {bits} bits")
    for _ in range(3):
        assert found.sign(LaneKey(private(bits)), DIGESTS[:16]) == by_openssl(private(bits), DIGESTS[:16])
