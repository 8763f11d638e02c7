"""The MIME frame of a message: content headers, boundaries, what stands between and behind the parts, attachments (RFC 2045, 2046)."""

import binascii
import hashlib
import re
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple
from urllib.parse import quote

from domain.campaign import Attachment
from domain.errors import Invalid
from domain.forwarding import MAX_LINE_OCTETS
from ext import header

MAX_ATTACHMENTS: Final = 50
MAX_FILENAME_BYTES: Final = 200  # in UTF-8

_TYPE: Final = re.compile(r"[a-z0-9][a-z0-9!#$&^_.+-]{0,63}/[a-z0-9][a-z0-9!#$&^_.+-]{0,63}").fullmatch  # RFC 6838 §4.2
_CONTENT_ID: Final = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]{1,100}(?:@[A-Za-z0-9.-]{1,100})?").fullmatch
_PLAIN_NAME: Final = re.compile(
    r"[A-Za-z0-9!#$&+,.=@^_`~()-](?:[A-Za-z0-9 !#$&+,.=@^_`~()-]{0,58}[A-Za-z0-9!#$&+,.=@^_`~()-])?"
).fullmatch  # needs no RFC 2231
_BASE64_LINE: Final = 57  # octets that become 76 characters
_LINE_END: Final = re.compile(r"\r\n?|\n")


Coding = Literal["quoted-printable", "base64", "8bit"]


class Body(NamedTuple):
    """One body part: `text/<kind>` in UTF-8, and its content transfer encoding."""

    kind: str
    coding: Coding = "quoted-printable"


def boundary(campaign_id: int, version: int) -> bytes:
    """The same for every message of a campaign; "=_" cannot occur in quoted-printable text, so it needs no search."""
    return b"=_" + hashlib.sha256(b"%d.%d" % (campaign_id, version)).hexdigest()[:24].encode("ascii")


def frame(bodies: Sequence[Body], mark: bytes, attachments: Sequence[Attachment] = ()) -> tuple[bytes, list[bytes]]:
    """The rest of the header block with all that stands before the first body, and what stands behind each body.

    As few multiparts as they need: multipart/mixed( multipart/alternative( text, AMP, multipart/related( HTML, inline
    attachments ) ), other attachments ). Without bodies there is an empty text part. Raises Invalid naming the field for a
    file name, type or Content-ID that cannot stand in a header.
    """
    check(attachments)
    inline = (
        [each for each in attachments if each.content_id] if any(body.kind == "html" for body in bodies) else []
    )  # only HTML names them
    others = [each for each in attachments if each not in inline]
    heads = [_head(body) for body in bodies] or [_head(Body("plain"))]
    end = b""
    if inline:
        heads[-1] = _open(b"related", mark + b".r", b'; type="text/html"') + heads[-1]
        end = _close(mark + b".r", inline)
    before = heads[0]
    if len(heads) > 1:
        outer = mark + b".a" if attachments else mark
        before = _open(b"alternative", outer) + before
        end += _close(outer)
        heads = [b"\r\n--%b\r\n" % outer + head for head in heads]
    if others:
        before, end = _open(b"mixed", mark) + before, end + _close(mark, others)
    behind = [*heads[1:], end or b"\r\n"]
    return (before, behind) if bodies else (before + behind[0], [])


def _head(body: Body) -> bytes:
    names = body.kind.encode("ascii"), body.coding.encode("ascii")
    return b'Content-Type: text/%b; charset="utf-8"\r\nContent-Transfer-Encoding: %b\r\n\r\n' % names


def coding(text: str) -> Coding:
    """The encoding of a part with this text that any server takes: base64 where it is shorter, one octet in five or more is not ASCII."""
    octets = text.encode("utf-8")
    return "base64" if 5 * sum(octet > 127 for octet in octets) >= len(octets) > 0 else "quoted-printable"


def coding_8bit(text: str) -> Coding:
    """The encoding where the server offers 8BITMIME (RFC 6152): 8bit for text beyond ASCII whose lines are short enough."""
    if text.isascii() or any(len(line.encode("utf-8")) > MAX_LINE_OCTETS for line in _LINE_END.split(text)):
        return coding(text)
    return "8bit"


def check(attachments: Sequence[Attachment]) -> None:
    """Raises Invalid("attachments", ...) for what could not be sent."""
    if len(attachments) > MAX_ATTACHMENTS:
        raise Invalid("attachments", f"there are {len(attachments)}, at most {MAX_ATTACHMENTS} are allowed")
    seen: set[str] = set()
    for each in attachments:
        if not 1 <= len(each.filename.encode("utf-8", "replace")) <= MAX_FILENAME_BYTES or "/" in each.filename:
            raise Invalid("filename", f"must be a name without a path, of 1 to {MAX_FILENAME_BYTES} bytes", each.filename[:80])
        try:
            header.check(each.filename)
            each.filename.encode("utf-8")
        except ValueError:
            raise Invalid("filename", "contains a control character", each.filename[:80]) from None
        if _TYPE(each.content_type) is None or each.content_type.startswith(("multipart/", "message/")):
            raise Invalid("content_type", 'must be a media type of a file, such as "application/pdf"', each.content_type[:80])
        if each.content_id and _CONTENT_ID(each.content_id) is None:
            raise Invalid("content_id", 'may have letters, digits, .-_ and one @; the HTML says "cid:..."', each.content_id[:80])
        if each.content_id in seen:
            raise Invalid("content_id", "is there twice", each.content_id)
        seen.update({each.content_id} - {""})


def _open(kind: bytes, mark: bytes, parameters: bytes = b"") -> bytes:
    return b'Content-Type: multipart/%b;\r\n boundary="%b"%b\r\n\r\n--%b\r\n' % (kind, mark, parameters, mark)


def _close(mark: bytes, files: Sequence[Attachment] = ()) -> bytes:
    return b"".join(b"\r\n--%b\r\n%b" % (mark, _file(each)) for each in files) + b"\r\n--%b--\r\n" % mark


def _file(attachment: Attachment) -> bytes:
    lines = [f"Content-Type: {attachment.content_type}", "Content-Transfer-Encoding: base64"]
    if attachment.content_id:
        lines.append(f"Content-ID: <{attachment.content_id}>")
    lines.append(f"Content-Disposition: {'inline' if attachment.content_id else 'attachment'}")
    head = "\r\n".join(lines).encode("ascii") + b"".join(_parameter(b"filename", attachment.filename))
    return head + b"\r\n\r\n" + base64_lines(attachment.content)


def _parameter(name: bytes, value: str) -> list[bytes]:
    """A parameter as a line of its own, in pieces of RFC 2231 §3-4 where it is long or not plain ASCII."""
    if _PLAIN_NAME(value):
        return [b';\r\n %b="%b"' % (name, value.encode("ascii"))]
    encoded = "utf-8''" + quote(value, safe="!#$&+-.^_`|~")
    pieces: list[bytes] = []
    while encoded:
        size = 60
        if len(encoded) > size and "%" in encoded[size - 2 : size]:  # never cut an escape
            size = encoded.index("%", size - 2)
        pieces.append(encoded[:size].encode("ascii"))
        encoded = encoded[size:]
    if len(pieces) == 1:
        return [b";\r\n %b*=%b" % (name, pieces[0])]
    return [b";\r\n %b*%d*=%b" % (name, number, piece) for number, piece in enumerate(pieces)]


def base64_lines(content: bytes) -> bytes:
    """Base64 in lines of 76 characters, without the last line's end (RFC 2045 §6.8)."""
    view = memoryview(content)
    return b"\r\n".join(
        binascii.b2a_base64(view[start : start + _BASE64_LINE], newline=False) for start in range(0, len(content), _BASE64_LINE)
    )
