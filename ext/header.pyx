"""Header fields: folding, encoded words, display names, and the refusal of what could break out of a field.

RFC 5322 §2.1.1 and §2.2.3 (lines, folding), RFC 2047 (encoded words), RFC 6532 (UTF-8 addresses). Text that holds a control
character, a line or paragraph separator, a bidirectional control, or an encoded word that hides one is refused with
Unsendable: never cleaned, because a cleaned value is still not what somebody meant to say. Lines have at most 76 octets
where there is a place to fold; an address or a URI is never cut.
"""

import base64
import quopri
import re

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdlib cimport free
from libc.string cimport memcpy

from ext.body cimport Wire, begin, put, put_bytes, reserve, utf8
from ext.body import Unsendable

MAX_TEXT_OCTETS = 998  # of one unstructured value or display name in UTF-8

cdef int LINE = 76
cdef Py_ssize_t MAX_OCTETS = MAX_TEXT_OCTETS
cdef object ENCODED_WORD = re.compile(r"=\?([^?\s]*)\?([A-Za-z])\?([^?]*)\?=")
cdef object BAD = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb]"
)
cdef object ATOMS = re.compile(r"[A-Za-z0-9!#$%&'*+\-/=?^_`{|}~]+(?: [A-Za-z0-9!#$%&'*+\-/=?^_`{|}~]+)*")


cdef unsigned char[256] AS_IS  # what stands for an octet in a Q word everywhere, also in a display name (RFC 2047 §5 (3)); 0: its code


cdef int _fill_table() except -1:
    cdef int octet
    for octet in b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!*+-/":
        AS_IS[octet] = octet
    AS_IS[32] = 95


_fill_table()


cdef str _name_of(str character):
    return f"U+{ord(character):04X}"


cdef enum:  # what a look at a text finds
    BEYOND_ASCII = 1   # a letter that is not ASCII
    WORD = 2           # "=?", as encoded words begin
    LOOSE_BLANK = 4    # a blank at the beginning, the end, or beside another one


cdef const unsigned char* _look(str text, Py_ssize_t* length, int* found) except NULL:
    """The UTF-8 octets of `text`, and what stands in it. Raises Unsendable when it may not stand in a header."""
    cdef const unsigned char* data
    cdef Py_ssize_t at
    cdef unsigned char octet, before = 32
    cdef bint bad = False
    found[0] = 0
    if len(text) > MAX_OCTETS:
        raise Unsendable(f"it has {len(text)} characters, at most {MAX_TEXT_OCTETS} octets are allowed")
    data = utf8(text, length)
    for at in range(length[0]):
        octet = data[at]
        if octet >= 127 or octet < 32:
            if octet <= 127:
                bad = True
            elif octet == 0xC2:
                bad = bad or data[at + 1] < 0xA0
            elif octet == 0xD8:
                bad = bad or data[at + 1] == 0x9C
            elif octet == 0xE2 or octet == 0xEF:  # the exact look is below
                bad = bad or data[at + 1] == 0x80 or data[at + 1] == 0x81 or data[at + 1] >= 0xBB
            found[0] |= BEYOND_ASCII
        elif octet == 63 and before == 61:
            found[0] |= WORD
        elif octet == 32 and before == 32:
            found[0] |= LOOSE_BLANK
        before = octet
    if before == 32:
        found[0] |= LOOSE_BLANK
    if bad:
        match = BAD.search(text)
        if match is not None:
            raise Unsendable(f"it holds {_name_of(match[0])}, which may not stand in a header")
    if found[0] & WORD:
        _check_words(text)
    return data


cdef int _check_words(str text) except -1:
    """Refuse an encoded word that decodes to what may not stand there: some readers decode wherever they look."""
    for charset, kind, coded in ENCODED_WORD.findall(text):
        try:
            data = coded.encode("utf-8")
            raw = base64.b64decode(data + b"==") if kind in "bB" else quopri.decodestring(data, header=True)
        except ValueError:
            raise Unsendable("it holds an encoded word that cannot be decoded") from None
        readings = [raw.decode("latin-1"), raw.decode("utf-8", "ignore")]
        try:
            readings.append(raw.decode(charset.partition("*")[0], "ignore"))  # UTF-7 hides controls in plain letters
        except (LookupError, ValueError):
            pass
        for seen in readings:
            found = BAD.search(seen)
            # Latin-1 shows the control octets of every charset, but calls halves of UTF-8 letters C1 controls
            if found is not None and not 0x80 <= ord(found[0]) <= 0x9F:
                raise Unsendable(f"it holds an encoded word that hides {_name_of(found[0])}")
    return 0


cdef int _encoded_words(Wire* wire, const unsigned char* source, Py_ssize_t length, int column) except -1:
    """Write UTF-8 as encoded words on lines of at most 76 octets, the first of which starts at `column`.

    Q or B, whichever is shorter; a letter is never cut between two words.
    """
    cdef Py_ssize_t at = 0, end, step, position
    cdef int special = 0, room, used, width, written = 0
    cdef bint as_base64
    cdef char* out
    if length > MAX_OCTETS:
        raise Unsendable(f"it has {length} octets, at most {MAX_TEXT_OCTETS} are allowed")
    reserve(wire, length * 8 + 64)   # an octet is three, and around every 45 of them stand 15
    out = <char*>wire.data + wire.length
    for at in range(length):
        special += AS_IS[source[at]] == 0
    as_base64 = special * 6 > length  # Q costs 2 more octets for each special one, B a third more for all
    at = 0
    while at < length:
        room = LINE - column - 12  # "=?utf-8?q?" and "?="
        used = 0
        end = at
        while end < length:
            step = end + 1
            while step < length and (source[step] & 0xC0) == 0x80:
                step += 1
            if as_base64:
                width = <int>((step - at + 2) // 3 * 4)
            else:
                width = used
                for position in range(end, step):
                    width += 1 if AS_IS[source[position]] else 3
            if width > room:
                break
            used = width
            end = step
        if at or end == at:  # a new line; the first too, when not one letter fits behind the field name
            memcpy(out + written, b"\r\n ", 3)
            written += 3
        column = 1
        if end == at:
            continue
        memcpy(out + written, b"=?utf-8?b?" if as_base64 else b"=?utf-8?q?", 10)
        written += 10
        written += _base64(source + at, end - at, out + written) if as_base64 else _q(source + at, end - at, out + written)
        memcpy(out + written, b"?=", 2)
        written += 2
        at = end
    wire.length += written
    return 0


cdef int _q(const unsigned char* source, Py_ssize_t length, char* out) noexcept:
    cdef const char* digits = b"0123456789ABCDEF"
    cdef int written = 0
    cdef Py_ssize_t at
    for at in range(length):
        if AS_IS[source[at]]:
            out[written] = AS_IS[source[at]]
        else:
            out[written] = 61
            out[written + 1] = digits[source[at] >> 4]
            out[written + 2] = digits[source[at] & 15]
            written += 2
        written += 1
    return written


cdef int _base64(const unsigned char* source, Py_ssize_t length, char* out) noexcept:
    cdef const char* digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    cdef int written = 0
    cdef Py_ssize_t at = 0
    cdef unsigned int three
    while at < length:
        three = source[at] << 16
        if at + 1 < length:
            three |= source[at + 1] << 8
        if at + 2 < length:
            three |= source[at + 2]
        out[written] = digits[three >> 18]
        out[written + 1] = digits[three >> 12 & 63]
        out[written + 2] = digits[three >> 6 & 63] if at + 1 < length else 61
        out[written + 3] = digits[three & 63] if at + 2 < length else 61
        written += 4
        at += 3
    return written


cdef bytes _folded(bytes text, int column):
    """`text`, whose words are parted by single blanks, on lines of at most 76 octets; None when a word is too long."""
    cdef list lines = [], words = []
    for word in text.split(b" "):
        if len(word) >= LINE:
            return None
        if column + len(word) + 1 > LINE and (words or lines):
            lines.append(b" ".join(words))
            words = []
            column = 1
        elif column + len(word) > LINE:
            return None
        words.append(word)
        column += len(word) + 1
    lines.append(b" ".join(words))
    return b"\r\n ".join(lines)


cdef int put_unstructured(Wire* wire, bytes name, str text) except -1:
    """Write what `unstructured` answers."""
    cdef Py_ssize_t length
    cdef int found
    cdef const unsigned char* data = _look(text, &length, &found)
    cdef bytes folded
    if length > MAX_OCTETS:
        raise Unsendable(f"it has {length} octets, at most {MAX_TEXT_OCTETS} are allowed")
    put_bytes(wire, name)
    put(wire, <const unsigned char*>b": ", 2)
    if found == 0 and len(name) + 2 + length <= LINE:
        put(wire, data, length)
    else:
        folded = _folded(data[:length], <int>len(name) + 2) if found == 0 else None
        if folded is not None:
            put_bytes(wire, folded)
        else:
            _encoded_words(wire, data, length, <int>len(name) + 2)
    return put(wire, <const unsigned char*>b"\r\n", 2)


cpdef bytes unstructured(bytes name, str text):
    """The whole field `name: text` with its CR LF, folded, in encoded words where ASCII is not enough.

    Raises Unsendable (UnicodeEncodeError on a lone surrogate) when `text` may not stand in a header or is too long.
    """
    cdef Wire wire
    begin(&wire)
    try:
        put_unstructured(&wire, name, text)
        return PyBytes_FromStringAndSize(<const char*>wire.data, wire.length)
    finally:
        free(wire.data)


cdef bytes _words(bytes data, int column):
    cdef Wire wire
    begin(&wire)
    try:
        _encoded_words(&wire, data, len(data), column)
        return PyBytes_FromStringAndSize(<const char*>wire.data, wire.length)
    finally:
        free(wire.data)


cpdef bytes mailbox(bytes name, str display, bytes address):
    """The whole field `name: display <address>` with its CR LF; without a display name `name: address`.

    `address` is taken as it is. Raises Unsendable as `unstructured` does.
    """
    cdef bytes data, shown = None
    cdef Py_ssize_t length
    cdef int found
    if not display:
        return name + b": " + address + b"\r\n"
    _look(display, &length, &found)
    data = display.encode("utf-8")
    if found == 0 and len(name) + 4 + length <= LINE - 2:
        if ATOMS.fullmatch(display):
            shown = data
        else:
            shown = b'"' + data.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'
    if shown is None or len(name) + 2 + len(shown) > LINE:
        shown = _words(data, len(name) + 2)
    tail = len(shown) - shown.rfind(b"\n") - 1 if b"\n" in shown else len(name) + 2 + len(shown)
    return name + b": " + shown + (b" " if tail + len(address) + 3 <= LINE else b"\r\n ") + b"<" + address + b">\r\n"


cpdef check(str text):
    """Raise Unsendable when `text` may not stand in a header; the rules are those of `unstructured`."""
    cdef Py_ssize_t length
    cdef int found
    _look(text, &length, &found)
    if length > MAX_OCTETS:
        raise Unsendable(f"it has {length} octets, at most {MAX_TEXT_OCTETS} are allowed")
