"""Private keys for DKIM: made, read from PEM with a reason for every refusal, and parsed once for signing. No error shows key material."""

import re
from typing import Final, NamedTuple, TypeAlias

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from domain import dkim
from domain.errors import Invalid

PrivateKey: TypeAlias = rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey

MAX_PEM_CHARACTERS: Final = 20_000
PUBLIC_EXPONENT: Final = 65537
ED25519_BITS: Final = 256
SIGNATURE_OCTETS_ED25519: Final = 64
RSA_SIZES: Final = (1024, 2048, 3072, 4096)

_BEGIN = re.compile(r"-----BEGIN ([A-Z0-9 ]{1,60})-----")


class KeyPair(NamedTuple):
    """A key pair in the form it is stored in."""

    algorithm: dkim.Algorithm
    bits: int
    private_key: bytes  # PKCS #8, DER
    public_key: bytes  # DER SubjectPublicKeyInfo (RSA) or 32 octets (Ed25519)


def make(algorithm: dkim.Algorithm, bits: int = dkim.ADVISED_RSA_BITS) -> KeyPair:
    """A new key pair; RSA takes about 0.1 s of CPU at 2048 bits, seconds at 4096. Raises Invalid for a size that is not offered."""
    if algorithm == dkim.ED25519:
        return _pair(ed25519.Ed25519PrivateKey.generate())
    if bits not in RSA_SIZES:
        raise Invalid("bits", f"must be one of {', '.join(map(str, RSA_SIZES))}", bits)
    return _pair(rsa.generate_private_key(PUBLIC_EXPONENT, bits))


def read_pem(text: str, field: str = "private_key") -> KeyPair:
    """Read a private key in PEM (PKCS #1 or PKCS #8, no password). Raises Invalid(field, what is wrong with it) (bad input 43)."""
    if len(text) > MAX_PEM_CHARACTERS:
        raise Invalid(field, f"is longer than {MAX_PEM_CHARACTERS} characters")
    begun = _BEGIN.search(text)
    if begun is None:
        raise Invalid(field, "is no PEM text: it must begin with -----BEGIN PRIVATE KEY----- or -----BEGIN RSA PRIVATE KEY-----")
    kind = begun[1]
    if not kind.endswith("PRIVATE KEY"):
        raise Invalid(field, f"holds a {kind.lower()}; a private key is needed to sign")
    if kind == "ENCRYPTED PRIVATE KEY" or "ENCRYPTED" in text[begun.end() : begun.end() + 200]:
        raise Invalid(field, "is protected by a password; take it off first: openssl pkey -in KEY -out PLAIN")
    if f"-----END {kind}-----" not in text[begun.end() :]:
        raise Invalid(field, f"is cut off: -----END {kind}----- is missing")
    if kind == "OPENSSH PRIVATE KEY":
        raise Invalid(field, "is in OpenSSH's format; convert it first: ssh-keygen -p -m PKCS8 -f KEY")
    try:
        # Bits that are too few are refused below, in words; here the parser may refuse them in its own
        key = serialization.load_pem_private_key(text[begun.start() :].encode("utf-8", "replace"), password=None)
    except TypeError:
        raise Invalid(field, "is protected by a password; take it off first: openssl pkey -in KEY -out PLAIN") from None
    except UnsupportedAlgorithm:
        raise Invalid(field, "is of a kind that DKIM does not know; it must be RSA or Ed25519") from None
    except ValueError as error:
        if re.search(r"key.?size|too small", str(error), re.IGNORECASE):
            raise Invalid(field, f"has fewer than {dkim.MIN_RSA_BITS} bits, which receivers refuse (RFC 8301)") from None
        raise Invalid(field, "cannot be read: it is damaged or cut off") from None
    if isinstance(key, rsa.RSAPrivateKey):
        if key.key_size < dkim.MIN_RSA_BITS:
            raise Invalid(field, f"has {key.key_size} bits; receivers refuse fewer than {dkim.MIN_RSA_BITS} (RFC 8301)")
        if key.key_size > dkim.MAX_RSA_BITS:
            raise Invalid(field, f"has {key.key_size} bits; receivers need not take more than {dkim.MAX_RSA_BITS} (RFC 8301)")
        return _pair(key)
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return _pair(key)
    raise Invalid(field, f"is {type(key).__name__.removesuffix('PrivateKey').lstrip('_')}; it must be RSA or Ed25519")


def parse(private_key: bytes) -> PrivateKey:
    """A stored key, ready to sign. It was checked when it came in, so the primes are not tested again: 0.1 ms instead of some.

    Raises ValueError without key material when it is damaged.
    """
    key = serialization.load_der_private_key(private_key, password=None, unsafe_skip_rsa_key_validation=True)
    if not isinstance(key, rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey):
        raise ValueError("it is neither RSA nor Ed25519")
    return key


def signature_octets(key: PrivateKey) -> int:
    """The length of every signature of `key`."""
    return (key.key_size + 7) // 8 if isinstance(key, rsa.RSAPrivateKey) else SIGNATURE_OCTETS_ED25519


def warnings(algorithm: str, bits: int) -> list[str]:
    """What speaks against a key that is taken nevertheless."""
    if algorithm == dkim.RSA and bits < dkim.ADVISED_RSA_BITS:
        return [f"{bits} bits are taken by receivers but can be broken; use {dkim.ADVISED_RSA_BITS} (RFC 8301)"]
    if algorithm == dkim.ED25519:
        return ["many receivers do not know Ed25519 yet: keep an RSA key active beside it (RFC 8463)"]
    return []


def _pair(key: PrivateKey) -> KeyPair:
    private = key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    if isinstance(key, rsa.RSAPrivateKey):
        public = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        return KeyPair("rsa-sha256", key.key_size, private, public)
    public = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return KeyPair("ed25519-sha256", ED25519_BITS, private, public)
