"""Turns blocks of journal records into lines of accounting files: PowerMTA's 23 columns, as its consumers know them.

Files, names and rotation belong to `journal.accounting_files`.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free
from libc.stdint cimport int64_t
from libc.string cimport memchr, memcmp

from ext.journal_record cimport DIAGNOSTIC, FRAME, Outcome, Slice, is_outcome, is_terminal, open_outcome, record_end
from ext.text_output cimport Clock, Output, put, put_char, put_day_and_time, put_int, reserve, sane, start_output, two

from ext.journal_record import Garbage

cdef extern from *:
    """
    #include <stdint.h>
    #include <time.h>

    static int sluice_local_time(int64_t seconds, int *fields) {
        time_t t = (time_t)seconds;
        struct tm out;
        if (!localtime_r(&t, &out)) return -1;
        fields[0] = out.tm_year + 1900; fields[1] = out.tm_mon + 1; fields[2] = out.tm_mday;
        fields[3] = out.tm_hour; fields[4] = out.tm_min; fields[5] = out.tm_sec;
        fields[6] = (int)(out.tm_gmtoff / 60);
        return 0;
    }
    """
    int sluice_local_time(int64_t seconds, int *fields) noexcept nogil

# RFC 3463 §3, in the words PowerMTA's users know where those are known
_STATUS_TEXTS = {
    "0.0": "undefined status",
    "1.0": "unknown address-related status",
    "1.1": "bad destination mailbox address",
    "1.2": "bad destination system address",
    "1.3": "bad destination mailbox address syntax",
    "1.4": "destination mailbox address ambiguous",
    "1.5": "destination address valid",
    "1.6": "destination mailbox has moved, no forwarding address",
    "1.7": "bad sender's mailbox address syntax",
    "1.8": "bad sender's system address",
    "2.0": "mailbox-related failure",
    "2.1": "mailbox disabled, not accepting messages",
    "2.2": "mailbox full",
    "2.3": "message length exceeds administrative limit",
    "2.4": "mailing list expansion problem",
    "3.0": "unknown mail system-related status",
    "3.1": "mail system full",
    "3.2": "system not accepting network messages",
    "3.3": "system not capable of selected features",
    "3.4": "message too big for system",
    "3.5": "system incorrectly configured",
    "4.0": "unknown network-related status",
    "4.1": "no answer from host",
    "4.2": "bad connection",
    "4.3": "directory server failure",
    "4.4": "unable to route",
    "4.5": "mail system congestion",
    "4.6": "routing loop detected",
    "4.7": "delivery time expired",
    "5.0": "protocol-related failure",
    "5.1": "invalid command",
    "5.2": "syntax error",
    "5.3": "too many recipients",
    "5.4": "invalid command arguments",
    "5.5": "wrong protocol version",
    "6.0": "unknown media-related status",
    "6.1": "media not supported",
    "6.2": "conversion required and prohibited",
    "6.3": "conversion required but not supported",
    "6.4": "conversion with loss performed",
    "6.5": "conversion failed",
    "7.0": "other or undefined security status",
    "7.1": "delivery not authorized",
    "7.2": "mailing list expansion prohibited",
    "7.3": "security conversion required but not possible",
    "7.4": "security features not supported",
    "7.5": "cryptographic failure",
    "7.6": "cryptographic algorithm not supported",
    "7.7": "message integrity failure",
}
cdef dict _status_cells = {}


def status_text(str code not None) -> str:
    """A status in PowerMTA's form: `5.1.1 (bad destination mailbox address)`."""
    cdef str detail
    if code == "2.0.0":
        return "2.0.0 (success)"
    detail = _STATUS_TEXTS.get(code[2:])
    if code[:2] not in ("2.", "4.", "5.") or detail is None:
        detail = _STATUS_TEXTS.get(code[2:4] + "0", "undefined status")
    return f"{code} ({detail})"


def csv_line(list cells not None) -> bytes:
    """One line of a file, LF included: each cell (str) cleaned and quoted as `csv_lines` does it (S15)."""
    return b",".join([encoded_cell((<str?>cell).encode("utf-8", "replace")) for cell in cells]) + b"\n"


cdef bytes status_cell(bytes status, char kind):
    """The finished dsnStatus cell, quoted when its text has a comma."""
    cdef str code = status.decode("utf-8")
    if not code:
        code = "2.0.0" if kind == b"d" else "4.0.0" if kind == b"t" or kind == b"u" else "5.0.0"
    return encoded_cell(status_text(code).encode())


cdef inline char written_kind(Outcome *o) noexcept nogil:
    """PowerMTA has no letter for an expiry: it writes a bounce."""
    return b"b" if o.kind == b"x" else o.kind


cdef bytes encoded_cell(bytes raw):
    cdef Output out
    cdef Slice text
    text.start = PyBytes_AS_STRING(raw)
    text.size = PyBytes_GET_SIZE(raw)
    start_output(&out, 2 * text.size + 16)
    try:
        put_cell(&out, b"", 0, text)
        return PyBytes_FromStringAndSize(out.start, out.used)
    finally:
        PyMem_Free(out.start)


cdef void put_local(Output *out, Clock *clock, int64_t microseconds) noexcept nogil:
    """`YYYY-MM-DD HH:MM:SS+ZZZZ` in local time, worked out once per second; nothing for 0 = not known."""
    cdef int64_t second
    cdef int fields[7]
    cdef int offset
    if microseconds <= 0:
        return
    second = sane(microseconds) // 1000000
    if clock.second != second:
        if sluice_local_time(second, fields) != 0 or fields[0] > 9999:
            clock.second = -1
            return
        put_day_and_time(clock.text, fields[0], fields[1], fields[2], fields[3], fields[4], fields[5])
        offset = fields[6]
        clock.text[19] = b"-" if offset < 0 else b"+"
        if offset < 0:
            offset = -offset
        two(clock.text + 20, offset // 60)
        two(clock.text + 22, offset % 60)
        clock.second = second
    put(out, clock.text, 24)


cdef int blank_at(const unsigned char *p, Py_ssize_t left) noexcept nogil:
    """How many bytes at `p` are one control character, line separator or direction mark (S15); 0: an ordinary one."""
    if p[0] < 0x20 or p[0] == 0x7F:
        return 1
    if p[0] == 0xC2 and left > 1 and 0x80 <= p[1] <= 0x9F:  # C1
        return 2
    if p[0] == 0xE2 and left > 2:
        if p[1] == 0x80 and 0xA8 <= p[2] <= 0xAE:  # U+2028, U+2029, U+202A..U+202E
            return 3
        if p[1] == 0x81 and 0xA6 <= p[2] <= 0xA9:  # U+2066..U+2069
            return 3
    return 0


cdef void put_cell(Output *out, const char *prefix, Py_ssize_t prefix_size, Slice text) noexcept nogil:
    """One cell on one line: RFC 4180 quotes only when needed, a leading ' where a spreadsheet would see a formula (S15)."""
    cdef const unsigned char *p = <const unsigned char *>text.start
    cdef Py_ssize_t i = 0
    cdef Py_ssize_t run
    cdef int blank
    cdef bint quoted = memchr(p, b",", text.size) != NULL or memchr(p, b'"', text.size) != NULL
    if quoted:
        put_char(out, b'"')
    put(out, prefix, prefix_size)
    if prefix_size == 0 and text.size > 0:
        if p[0] == b"=" or p[0] == b"+" or p[0] == b"-" or p[0] == b"@" or p[0] == b"\t" or p[0] == b"\r":
            put_char(out, b"'")
    while i < text.size:
        # most bytes are printable ASCII: they are copied in runs
        run = i
        while i < text.size and 0x20 <= p[i] < 0x7F and p[i] != 0x22:
            i += 1
        if i > run:
            put(out, text.start + run, i - run)
            continue
        if p[i] == b'"':
            put(out, b'""', 2)
            i += 1
            continue
        blank = blank_at(p + i, text.size - i)
        if blank:
            put_char(out, b" ")
            i += blank
        else:
            put_char(out, <char>p[i])
            i += 1
    if quoted:
        put_char(out, b'"')


cdef bytes known_status_cell(Slice code, char kind):
    """`status_cell`, worked out once."""
    cdef bytes status = PyBytes_FromStringAndSize(code.start, code.size)
    cdef tuple key = (status, kind)
    cdef bytes cell = _status_cells.get(key)
    if cell is None:
        if len(_status_cells) > 4096:  # peers choose these codes
            _status_cells.clear()
        cell = _status_cells[key] = status_cell(status, kind)
    return cell


cdef int put_line(Output *out, Clock *logged, Clock *queued, Outcome *o, bytes cell) except -1:
    cdef char kind = written_kind(o)
    cdef Slice vmta
    cdef Py_ssize_t i
    put_char(out, kind)
    put_char(out, b",")
    put_local(out, logged, o.at)
    put_char(out, b",")
    put_local(out, queued, o.queued_at)
    put_char(out, b",")
    put_cell(out, b"", 0, o.text[1])
    put_char(out, b",")
    put_cell(out, b"", 0, o.text[0])
    if kind == b"d":
        put(out, b",,relayed,", 10)
    elif is_terminal(kind):
        put(out, b",,failed,", 9)
    else:
        put(out, b",,delayed,", 10)
    put(out, PyBytes_AS_STRING(cell), PyBytes_GET_SIZE(cell))
    put_char(out, b",")
    if o.text[DIAGNOSTIC].size:
        put_cell(out, b"smtp;", 5, o.text[DIAGNOSTIC])
    put_char(out, b",")
    put_cell(out, b"", 0, o.text[5])
    put_char(out, b",")
    if kind != b"d":
        if o.text[4].size == 0 and o.kind == b"x":
            put(out, b"message-expired", 15)
        else:
            put_cell(out, b"", 0, o.text[4])
    put(out, b",api,,smtp,", 11)
    put_cell(out, b"", 0, o.text[6])
    put_char(out, b",")
    put_cell(out, b"", 0, o.text[7])
    put_char(out, b",")
    put_cell(out, b"", 0, o.text[8])
    put_char(out, b",")
    if kind == b"d":
        put_int(out, o.size)
    put_char(out, b",")
    vmta.start = o.text[9].start
    vmta.size = 0
    for i in range(o.text[9].size - 1, -1, -1):
        if o.text[9].start[i] == b"/":
            vmta.start = o.text[9].start + i + 1
            vmta.size = o.text[9].size - i - 1
            break
    # the default virtual MTA is `{default}` in the queue's name and empty in its own column
    if not (vmta.size == 9 and vmta.start[:9] == b"{default}"):
        put_cell(out, b"", 0, vmta)
    put(out, b",c", 2)
    put_int(out, o.campaign)
    put(out, b",,", 2)
    put_cell(out, b"", 0, o.text[9])
    put(out, b",\n", 2)
    return 0


def csv_lines(bytes block not None, str kinds not None):
    """The accounting file lines (23 columns, LF) of the outcomes whose PowerMTA type is a letter of `kinds`.

    An expiry (`x`) is a `b` line, as PowerMTA writes it. Times are local, `YYYY-MM-DD HH:MM:SS+ZZZZ`. Raises Garbage.
    """
    cdef const unsigned char *start = <const unsigned char *>PyBytes_AS_STRING(block)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(block)
    cdef Py_ssize_t offset = 0
    cdef Py_ssize_t end
    cdef Outcome o
    cdef Output out
    cdef Clock logged, queued
    cdef Slice last_status
    cdef char last_kind = 0
    cdef bytes cell = b""
    cdef bytes letters = kinds.encode()
    cdef const char *wanted = PyBytes_AS_STRING(letters)
    cdef size_t wanted_size = PyBytes_GET_SIZE(letters)
    logged.second = -1
    queued.second = -1
    start_output(&out, size + 4096)
    try:
        while offset < size:
            end = record_end(start, offset, size)
            if end <= 0:
                raise Garbage(offset)
            if is_outcome(<char>start[offset + FRAME]):
                reserve(&out, 4 * (end - offset) + 1024)  # quotes are doubled, and the queue's name is written in two cells
                open_outcome(start + offset + FRAME, &o)
                if memchr(wanted, written_kind(&o), wanted_size) != NULL:
                    # most lines have the status of the line before
                    if (
                        written_kind(&o) != last_kind
                        or o.text[2].size != last_status.size
                        or memcmp(o.text[2].start, last_status.start, last_status.size) != 0
                    ):
                        last_kind, last_status = written_kind(&o), o.text[2]
                        cell = known_status_cell(last_status, last_kind)
                    put_line(&out, &logged, &queued, &o, cell)
            offset = end
        return PyBytes_FromStringAndSize(out.start, out.used)
    finally:
        PyMem_Free(out.start)
