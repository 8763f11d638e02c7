"""SmtpReply and EnhancedStatus: what a server answered (RFC 5321 §4.2, RFC 3463)."""

import re

import msgspec

_ENHANCED = re.compile(r"^([245])\.(\d{1,3})\.(\d{1,3})(?=\s|$)")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
MAX_TEXT_BYTES = 512  # S15: what is kept of a reply


class EnhancedStatus(msgspec.Struct, frozen=True, order=True):
    """`class.subject.detail` of RFC 3463."""

    klass: int
    subject: int
    detail: int

    def __str__(self) -> str:
        return f"{self.klass}.{self.subject}.{self.detail}"


class SmtpReply(msgspec.Struct, frozen=True):
    """A complete reply. `text` is one line: the lines joined by a space, without code and separators."""

    code: int
    text: str

    @property
    def enhanced(self) -> EnhancedStatus:
        """The enhanced status it carries, or the one its code implies (x.0.0)."""
        match = _ENHANCED.match(self.text)
        if match and int(match[1]) == self.code // 100:
            return EnhancedStatus(int(match[1]), int(match[2]), int(match[3]))
        return EnhancedStatus(self.code // 100, 0, 0)

    def __str__(self) -> str:
        return f"{self.code} {self.text}".rstrip()


def one_line(raw: bytes) -> str:
    """Make the text of a reply fit for a log line and a CSV cell: one line, no control characters, at most 512 bytes (S15).

    Bytes that are not UTF-8 are read as Latin-1: nothing a server says is lost, nothing it says can break a line.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    text = _CONTROL.sub(" ", text).strip()
    if len(text) * 4 > MAX_TEXT_BYTES:
        text = text.encode("utf-8", "replace")[:MAX_TEXT_BYTES].decode("utf-8", "ignore")
    return text
