"""The signed links of the web side: unsubscribe, web view, clicks and opens; builds them and reads them back (S4).

A token is base64url of varint(user) varint(campaign) varint(number) and the first 128 bits of HMAC-SHA256 over them. Each
purpose has a key of its own (`Keyring.derive("unsubscribe")`, `Keyring.derive("web-view")`), so a token of one purpose means
nothing to another. Campaign and number name the row of `recipients`, which knows the subscriber.

A click is `/c/<token><link part>`: the token is the same in every link of a message, the part says which link of the campaign it is
and is the same for all recipients. A link with merge tags is followed by `/` and its own address, signed together with both.
"""

import base64
import hmac
from typing import Final, NamedTuple

MAC_BYTES: Final = 16
MAX_DESTINATION_CHARACTERS: Final = 4096
MAX_TOKEN_CHARACTERS: Final = 64  # three varints of at most 9 + 9 + 5 octets and the MAC make 52

LINK_PART_CHARACTERS: Final = 8
LINK_MAC_BYTES: Final = 4  # no proof of who: it tells a link number of ours from a changed one

# purpose -> path below the base URL
PATHS: Final[dict[str, str]] = {"unsubscribe": "/u/", "web-view": "/w/", "click": "/c/", "open": "/o/", "abuse": "/a/", "postback": "/s/"}


class LinkParts(NamedTuple):
    """Whose link it is: tenant, campaign, and the recipient's number within the campaign."""

    user_id: int
    campaign_id: int
    number: int


def is_web_address(text: str) -> bool:
    """An http or https URL, and no mail address."""
    return text.startswith(("http://", "https://"))


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


def link_part(key: bytes, user_id: int, campaign_id: int, link: int) -> str:
    """Eight characters for link 1..65535 of a campaign; `key` is `Keyring.derive("click-link")`."""
    number = link.to_bytes(2, "big")
    mac = hmac.digest(key, varint(user_id) + varint(campaign_id) + number, "sha256")[:LINK_MAC_BYTES]
    return base64.urlsafe_b64encode(number + mac).decode("ascii")


def read_click(key: bytes, link_key: bytes, text: str) -> tuple[LinkParts, int] | None:
    """Whose click it is and on which link of the campaign, or None when it is not one of ours."""
    parts = read(key, text[:-LINK_PART_CHARACTERS])
    if parts is None:
        return None
    part = text[-LINK_PART_CHARACTERS:]
    try:
        link = int.from_bytes(base64.b64decode(part, b"-_", validate=True)[:2], "big")
    except ValueError:
        return None
    same = hmac.compare_digest(link_part(link_key, parts.user_id, parts.campaign_id, link).encode("ascii"), part.encode("ascii"))
    return (parts, link) if same and link else None


def seal_destination(key: bytes, token_and_part: str, url: str) -> str:
    """The address of a personal link, signed together with the token before it: [A-Za-z0-9_-]. `key`: "click-destination"."""
    octets = url.encode("ascii")
    mac = hmac.digest(key, token_and_part.encode("ascii") + b"/" + octets, "sha256")[:MAC_BYTES]
    return base64.urlsafe_b64encode(mac + octets).rstrip(b"=").decode("ascii")


def read_destination(key: bytes, token_and_part: str, text: str) -> str | None:
    """The address that `seal_destination` put in, or None when it was not made for this token, in exactly this spelling."""
    if len(text) > MAX_DESTINATION_CHARACTERS or not text.isascii():
        return None
    try:
        url = base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)[MAC_BYTES:].decode("ascii")
    except ValueError:
        return None
    return url if hmac.compare_digest(seal_destination(key, token_and_part, url).encode("ascii"), text.encode("ascii")) else None


def with_parameter(url: str, name: str, value: str) -> str:
    """`url` with one more parameter in its query, before a fragment; one of this name that is there already is replaced.

    `name` and `value` are letters, digits, `-` and `_`.
    """
    base, mark, fragment = url.partition("#")
    path, question, query = base.partition("?")
    kept = [part for part in query.split("&") if part and part.partition("=")[0] != name] if question else []
    return f"{path}?{'&'.join([*kept, f'{name}={value}'])}{mark}{fragment}"
