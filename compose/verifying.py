"""Looks at the DKIM signatures of a message as a receiver does (RFC 6376 §6, relaxed/relaxed; RFC 8463).

Apart from the signer on purpose: written from the RFC, in plain Python, sharing no canonicalisation with `ext.dkim`, so that a mistake
there is seen here. For single messages; nothing of it is on the send path.
"""

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key

MIN_RSA_BITS: Final = 1024  # RFC 8301 §3.2

_BLANKS = re.compile(rb"[ \t]+")
_SIGNATURE = re.compile(rb"([;\s]b\s*=)[^;]*")


class Verdict(NamedTuple):
    """What one signature is worth; `reason` is empty when it is good."""

    domain: str
    selector: str
    algorithm: str
    headers: tuple[str, ...]  # signed fields, lower case, in the order of h=
    reason: str

    @property
    def good(self) -> bool:
        """Whether it verifies."""
        return not self.reason


def verdicts(message: bytes, records: Mapping[str, str]) -> list[Verdict]:
    """One verdict per DKIM-Signature field, from the top. `records`: TXT records by name, lower case."""
    head, _, body = message.partition(b"\r\n\r\n")
    fields = split_fields(head + b"\r\n")
    return [_judge(field, fields, body, records) for field in fields if field.lower().startswith(b"dkim-signature:")]


def split_fields(head: bytes) -> list[bytes]:
    """The fields of a header block, folding and final CRLF kept."""
    return re.findall(rb"[^\r\n]+\r\n(?:[ \t][^\r\n]*\r\n)*", head)


def tags(text: str) -> dict[str, str]:
    """A tag=value list (RFC 6376 §3.2); blanks inside values are dropped, as base64 and h= want it."""
    pairs = (part.partition("=") for part in text.split(";"))
    return {name.strip(): re.sub(r"\s+", "", value) for name, mark, value in pairs if mark}


def _judge(field: bytes, fields: list[bytes], body: bytes, records: Mapping[str, str]) -> Verdict:
    said = tags(field.partition(b":")[2].decode("latin-1"))
    names = tuple(name.lower() for name in said.get("h", "").split(":"))
    about = (said.get("d", ""), said.get("s", ""), said.get("a", ""), names)
    try:
        _check(said, names, field, fields, body, records)
    except (ValueError, InvalidSignature) as error:
        return Verdict(*about, reason=str(error) or "the signature is not of this header")
    return Verdict(*about, reason="")


def _check(
    said: dict[str, str], names: tuple[str, ...], field: bytes, fields: list[bytes], body: bytes, records: Mapping[str, str]
) -> None:
    if said.get("c") != "relaxed/relaxed" or "l" in said:
        raise ValueError("it is not relaxed/relaxed over the whole body")
    if base64.b64encode(hashlib.sha256(relaxed_body(body)).digest()).decode() != said.get("bh"):
        raise ValueError("the body is not the one that was signed")
    name = f"{said.get('s', '')}._domainkey.{said.get('d', '')}".lower()
    if name not in records:
        raise ValueError(f"there is no record {name}")
    key = public_key(records[name])
    signed = b"".join(_chosen(names, fields)) + relaxed_field(_SIGNATURE.sub(rb"\1", field)).removesuffix(b"\r\n")
    try:
        octets = base64.b64decode(said.get("b", ""), validate=True)
    except binascii.Error:
        raise ValueError("b= is not base64") from None
    if isinstance(key, rsa.RSAPublicKey) and said.get("a") == "rsa-sha256":
        key.verify(octets, signed, PKCS1v15(), SHA256())
    elif isinstance(key, ed25519.Ed25519PublicKey) and said.get("a") == "ed25519-sha256":
        key.verify(octets, hashlib.sha256(signed).digest())
    else:
        raise ValueError(f"the record's key is not for {said.get('a', 'no algorithm')}")


def _chosen(names: tuple[str, ...], fields: list[bytes]) -> list[bytes]:
    """The signed fields in their order, of several of one name the last first; a name without a field stands for its absence (§5.4.2)."""
    left: dict[str, list[bytes]] = {}
    for field in fields:
        left.setdefault(field.partition(b":")[0].strip().decode("latin-1").lower(), []).append(field)
    return [relaxed_field(left[name].pop()) for name in names if left.get(name)]


def relaxed_field(field: bytes) -> bytes:
    """RFC 6376 §3.4.2."""
    name, _, value = field.partition(b":")
    return name.strip().lower() + b":" + _BLANKS.sub(b" ", value.replace(b"\r\n", b"")).strip(b" ") + b"\r\n"


def relaxed_body(body: bytes) -> bytes:
    """RFC 6376 §3.4.4."""
    lines = [_BLANKS.sub(b" ", line).rstrip(b" ") for line in body.split(b"\r\n")]
    while lines and not lines[-1]:
        lines.pop()
    return b"".join(line + b"\r\n" for line in lines)


def public_key(record: str) -> rsa.RSAPublicKey | ed25519.Ed25519PublicKey:
    """The key of a DKIM record. Raises ValueError saying what is wrong with it."""
    said = tags(record)
    if said.get("v", "DKIM1") != "DKIM1":
        raise ValueError("it is no DKIM1 record")
    if not said.get("p"):
        raise ValueError("the key was withdrawn (empty p=)" if "p" in said else "there is no key (p=) in it")
    try:
        octets = base64.b64decode(said["p"], validate=True)
    except binascii.Error:
        raise ValueError("its p= is not base64") from None
    if said.get("k", "rsa") == "ed25519":
        return ed25519.Ed25519PublicKey.from_public_bytes(octets)
    key = load_der_public_key(octets)
    if not isinstance(key, rsa.RSAPublicKey):
        raise ValueError("its key is no RSA key")
    if key.key_size < MIN_RSA_BITS:
        raise ValueError(f"its key has {key.key_size} bits; receivers take {MIN_RSA_BITS} or more")
    return key
