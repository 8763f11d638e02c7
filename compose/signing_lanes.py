"""Eight RSA signatures at once on processors with AVX-512 IFMA, by Intel's crypto_mb: three times the rate of one after the other.

Optional: the extra `dkim-lanes` brings `ipp-crypto` (Apache-2.0) and the run-time libraries it needs (Intel's licence). Found and tried
out at run time; without it, or on another processor, OpenSSL signs one by one. The octets are the same either way (RFC 8017 §8.2).
"""

import ctypes
import functools
import importlib.metadata
import os
import threading
from pathlib import Path
from typing import Any, Final

import structlog
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA256

log = structlog.get_logger(__name__)

LANES: Final = 8
WORTH_IT: Final = 3  # a round takes as long as two and a half single signatures, however many lanes are filled
SWITCH: Final = "SLUICE_DKIM_LANES"
_PADDING: Final = PKCS1v15()
_PREHASHED: Final = Prehashed(SHA256())

# RSA size -> its number in the list for which crypto_mb tells how many lanes at once it has code for on this processor. At 3072 bits
# its code was slower than OpenSSL's, at 4096 not much faster.
_ALGORITHMS: Final = {1024: 0, 2048: 1}
_NEEDED: Final = ("libintlc.so.5", "libirng.so", "libimf.so", "libsvml.so")  # in the order in which they need each other
_DIGEST_INFO: Final = bytes.fromhex("3031300d060960864801650304020105000420")  # SHA-256, RFC 8017 §9.2
_EXPONENT: Final = 65537  # the only one its function for public keys knows

_EightPointers = ctypes.c_void_p * LANES


class LaneKey:
    """An RSA key as crypto_mb takes it: its parts as little-endian words, the same in all lanes. `repr` shows no key."""

    __slots__ = ("_parts", "bits", "modulus", "octets", "padding", "pointers")

    def __init__(self, private: rsa.RSAPrivateKey) -> None:
        numbers = private.private_numbers()
        self.bits = private.key_size
        self.octets = self.bits // 8
        self.padding = b"\x00\x01" + b"\xff" * (self.octets - 3 - len(_DIGEST_INFO) - 32) + b"\x00" + _DIGEST_INFO
        half = self.octets // 2
        parts = [(value, half) for value in (numbers.p, numbers.q, numbers.dmp1, numbers.dmq1, numbers.iqmp)]
        parts.append((numbers.public_numbers.n, self.octets))
        self._parts = [ctypes.create_string_buffer(value.to_bytes(octets, "little"), octets) for value, octets in parts]
        *self.pointers, self.modulus = [_EightPointers(*[ctypes.addressof(part)] * LANES) for part in self._parts]


class Lanes:
    """The library, loaded and tried out: `sign` is its function for private keys in their parts, `verify` that for public ones."""

    def __init__(self, sign: Any, verify: Any, sizes: frozenset[int]) -> None:
        self.sizes = sizes
        self._sign = sign
        self._verify = verify
        self._lock = threading.Lock()  # the buffers are shared and the call lets other threads run
        self._in, self._out, self._back = (ctypes.create_string_buffer(LANES * 512) for _ in range(3))
        starts = [ctypes.addressof(buffer) for buffer in (self._in, self._out, self._back)]
        # octets of a key -> where its eight messages stand, where their signatures come, and what these turn back into
        self._places = {
            size: [_EightPointers(*range(start, start + LANES * size, size)) for start in starts] for size in (bits // 8 for bits in sizes)
        }
        self._failed = False

    def takes(self, private: rsa.RSAPrivateKey) -> bool:
        """Whether such a key can be signed with here: both primes must be half as long as it, the public exponent the usual one."""
        bits = private.key_size
        if self._failed or bits not in self.sizes:
            return False
        numbers = private.private_numbers()
        return numbers.p.bit_length() == numbers.q.bit_length() == bits // 2 and numbers.public_numbers.e == _EXPONENT

    def sign(self, key: LaneKey, digests: list[bytes]) -> list[bytes]:
        """The signatures of the first of these SHA-256 hashes, in order; those that are left over are for another way to sign.

        Left over are the last one or two, if so many do not fill a round, and all when the library has failed. Every signature is
        verified, in lanes as well: all eight for little more than OpenSSL takes for one. A wrong one switches the lanes off for good: a
        signature made by a faulty processor can give the key away, and must not be sent.
        """
        signatures: list[bytes] = []
        with self._lock:
            for at in range(0, len(digests), LANES):
                round_of = digests[at : at + LANES]
                if self._failed or len(round_of) < WORTH_IT:
                    break
                made = self._round(key, round_of + [round_of[0]] * (LANES - len(round_of)))
                if made is None:
                    self._failed = True
                    log.error("8-lane signing gave a wrong signature and is switched off; OpenSSL signs from now on")
                    return []
                signatures += made[: len(round_of)]
        return signatures

    def _round(self, key: LaneKey, digests: list[bytes]) -> list[bytes] | None:
        size = key.octets
        total = LANES * size
        messages, signatures, back = self._places[size]
        padded = key.padding + key.padding.join(digests)
        ctypes.memmove(self._in, padded, total)
        if (
            self._sign(messages, signatures, *key.pointers, key.bits, None, None) != 0
            or self._verify(signatures, back, key.modulus, key.bits, None, None) != 0
            or ctypes.string_at(self._back, total) != padded
        ):
            return None
        text = ctypes.string_at(self._out, total)
        return [text[at : at + size] for at in range(0, total, size)]


def _paths() -> list[Path] | None:
    """Where the libraries lie that the two packages brought; None when one is missing."""
    found: dict[str, Path] = {}
    for package in ("ipp-crypto", "intel-cmplr-lib-rt"):
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            return None
        found |= {file.name: Path(str(file.locate())) for file in files if file.name.startswith("lib")}
    wanted = [*_NEEDED, "libcrypto_mb.so"]
    return [found[name] for name in wanted] if all(name in found for name in wanted) else None


@functools.cache
def load() -> Lanes | None:
    """The lanes of this machine; None without the extra, without the processor for it, or when a trial gives other octets than OpenSSL.

    None, too, where SLUICE_DKIM_LANES is `off`: to compare, or to do without a library of others.
    """
    paths = _paths()
    if paths is None or os.environ.get(SWITCH) == "off":
        return None
    try:
        library = None
        for path in paths:
            library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        sign, verify = library.mbx_rsa_private_crt_mb8, library.mbx_rsa_public_mb8  # type: ignore[union-attr]
        lanes_for = library.mbx_get_algo_info  # type: ignore[union-attr]
    except (OSError, AttributeError) as error:
        log.warning("ipp-crypto is installed but cannot be used; OpenSSL signs", reason=str(error))
        return None
    for function, pointers in ((sign, 7), (verify, 3)):
        function.restype = ctypes.c_uint32
        function.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    lanes_for.restype = ctypes.c_int64
    lanes_for.argtypes = [ctypes.c_int]
    sizes = frozenset(bits for bits, algorithm in _ALGORITHMS.items() if lanes_for(algorithm) & LANES)
    if not sizes:
        return None
    lanes = Lanes(sign, verify, sizes)
    for bits in sizes:
        private = rsa.generate_private_key(65537, bits)
        digests = [bytes([number]) * 32 for number in range(LANES)]
        if lanes.sign(LaneKey(private), digests) != [private.sign(digest, _PADDING, _PREHASHED) for digest in digests]:
            log.error("8-lane signing does not agree with OpenSSL on this machine and is not used")
            return None
    log.info("RSA signs in 8 lanes", sizes=sorted(sizes))
    return lanes
