"""The signed links of the web side: unsubscribe and web view; builds them and reads them back (S4).

A token is base64url of varint(user) varint(campaign) varint(number) and the first 128 bits of HMAC-SHA256 over them. Each
purpose has a key of its own (`Keyring.derive("unsubscribe")`, `Keyring.derive("web-view")`), so a token of one purpose means
nothing to another. Campaign and number name the row of `recipients`, which knows the subscriber.
"""

import base64
import hmac
from typing import Final, NamedTuple

MAC_BYTES: Final = 16
MAX_TOKEN_CHARACTERS: Final = 64  # three varints of at most 9 + 9 + 5 octets and the MAC make 52

PATHS: Final[dict[str, str]] = {"unsubscribe": "/u/", "web-view": "/w/"}  # purpose -> path below the base URL


class LinkParts(NamedTuple):
    """Whose link it is: tenant, campaign, and the recipient's number within the campaign."""

    user_id: int
    campaign_id: int
    number: int


def varint(value: int) -> bytes:
    """`value` >= 0 in groups of seven bits, lowest first, the high bit set on all but the last."""
    if value < 0:
        raise ValueError(f"a token holds no negative number, got {value}")
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varints(data: bytes, count: int) -> tuple[int, ...] | None:
    """The `count` numbers `data` consists of, or None when it is anything else; not necessarily canonical."""
    values = []
    value = shift = 0
    for octet in data:
        value |= (octet & 0x7F) << shift
        shift += 7
        if octet < 0x80:
            values.append(value)
            value = shift = 0
    return tuple(values) if len(values) == count and not shift else None


def token(key: bytes, parts: LinkParts) -> str:
    """The token for `parts`, at most 52 characters of [A-Za-z0-9_-]."""
    payload = b"".join(map(varint, parts))
    return base64.urlsafe_b64encode(payload + hmac.digest(key, payload, "sha256")[:MAC_BYTES]).rstrip(b"=").decode("ascii")


def build(key: bytes, base_url: str, parts: LinkParts, purpose: str = "unsubscribe") -> str:
    """The URL `<base_url>/u/<token>` (unsubscribe) or `<base_url>/w/<token>` (web-view); `key` is that purpose's."""
    return base_url.rstrip("/") + PATHS[purpose] + token(key, parts)


def read(key: bytes, text: str) -> LinkParts | None:
    """The parts of a token, or None when it was not built with `key`, in exactly this spelling.

    The token is built anew from what it claims and compared in constant time, so a changed, cut or longer token, another
    spelling of the same octets and another purpose's token are all refused alike.
    """
    if not MAC_BYTES < len(text) <= MAX_TOKEN_CHARACTERS or not text.isascii():
        return None
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)
    except ValueError:
        return None
    values = read_varints(data[:-MAC_BYTES], 3)
    if values is None:
        return None
    parts = LinkParts(*values)
    return parts if hmac.compare_digest(token(key, parts).encode("ascii"), text.encode("ascii")) else None
