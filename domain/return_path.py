"""The signed return path (VERP): builds the MAIL FROM address of one recipient and reads it back from a bounce (S3, B13).

`b-<token>@<MFROM domain>`, where the token is base32 in lower case, because mail systems may change the case of a local part:
varint(user) varint(campaign) varint(number) varint(day) and the first 96 bits of HMAC-SHA256 over them. The same form with
the prefix `u-` and the "unsubscribe" key is the mailto address of List-Unsubscribe. A local part has at most 64 octets.
"""

import base64
import hmac
from typing import Final, NamedTuple

from domain.links import read_varints, varint

MAC_BYTES: Final = 12
BOUNCE: Final = "b-"
UNSUBSCRIBE: Final = "u-"
MAX_LOCAL_PART_OCTETS: Final = 64  # RFC 5321 §4.5.3.1.1


class ReturnPath(NamedTuple):
    """Whose mail it was, and the day (days since 1970-01-01 UTC) on which it was composed."""

    user_id: int
    campaign_id: int
    number: int
    day: int


def token(key: bytes, path: ReturnPath) -> str:
    """The signed part: at most 61 characters of [a-z2-7]."""
    payload = b"".join(map(varint, path))
    return base64.b32encode(payload + hmac.digest(key, payload, "sha256")[:MAC_BYTES]).rstrip(b"=").decode("ascii").lower()


def build(key: bytes, domain: str, path: ReturnPath, prefix: str = BOUNCE) -> str:
    """The address `<prefix><token>@<domain>`; `key` is `Keyring.derive("return-path")`, or "unsubscribe" with that prefix."""
    return f"{prefix}{token(key, path)}@{domain}"


def read(key: bytes, address: str, prefix: str = BOUNCE) -> ReturnPath | None:
    """What a return path (a whole address or its local part, in any case) says, or None when `key` did not sign it.

    How old it may be is the caller's rule: `day` is in the answer.
    """
    local = address.rpartition("@")[0] if "@" in address else address
    if len(local) > MAX_LOCAL_PART_OCTETS or not local.isascii():
        return None
    local = local.lower()
    if not local.startswith(prefix):
        return None
    text = local[len(prefix) :]
    try:
        data = base64.b32decode(text.upper() + "=" * (-len(text) % 8))
    except ValueError:
        return None
    values = read_varints(data[:-MAC_BYTES], 4)
    if values is None:
        return None
    path = ReturnPath(*values)
    return path if hmac.compare_digest(token(key, path).encode("ascii"), text.encode("ascii")) else None
