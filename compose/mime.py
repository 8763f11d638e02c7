"""The MIME frame of a message: content headers, boundaries, and what stands between and behind the parts (RFC 2045, 2046)."""

import hashlib
from typing import Final, NamedTuple

PART: Final = b'Content-Type: text/%b; charset="utf-8"\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n'


class MimeFrame(NamedTuple):
    """Octets around the quoted-printable text part and HTML part, of which one may be absent."""

    headers: bytes  # the rest of the header block and all up to the first part's text
    between: bytes
    end: bytes


def boundary(campaign_id: int, version: int) -> bytes:
    """The same for every message of a campaign; "=_" cannot occur in quoted-printable text, so it needs no search."""
    return b"=_" + hashlib.sha256(b"%d.%d" % (campaign_id, version)).hexdigest()[:24].encode("ascii")


def frame(*, text: bool, html: bool, mark: bytes) -> MimeFrame:
    """multipart/alternative of text and HTML, or the one part there is; an empty text part when there is neither."""
    if not (text and html):
        return MimeFrame(PART % (b"html" if html else b"plain"), b"", b"\r\n")
    headers = b'Content-Type: multipart/alternative;\r\n boundary="%b"\r\n\r\n--%b\r\n' % (mark, mark) + PART % b"plain"
    return MimeFrame(headers, b"\r\n--%b\r\n" % mark + PART % b"html", b"\r\n--%b--\r\n" % mark)
