"""Turns blocks of journal records into rows for the accounting table, and into all else the ledger must write.

The one place that decides which of two words about a recipient counts (P1). Tables and transactions belong to `store`.
"""

from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free
from libc.stdint cimport int32_t, int64_t

from ext.journal_record cimport FRAME, Outcome, Slice, fit16, fit32, is_outcome, is_terminal, open_outcome, record_end
from ext.text_output cimport Clock, Output, put, put_char, put_day_and_time, put_int, reserve, sane, start_output

from ext.journal_record import Garbage


cdef void put_utc(Output *out, Clock *clock, int64_t microseconds) noexcept nogil:
    """`YYYY-MM-DD HH:MM:SS.ffffff+00`; the part before the dot is worked out once per second."""
    cdef int64_t second, day, era, day_of_era, year_of_era, day_of_year, shifted_month
    cdef int of_day, fraction, i
    microseconds = sane(microseconds)
    second = microseconds // 1000000
    fraction = <int>(microseconds % 1000000)
    if clock.second != second:
        day = second // 86400
        of_day = <int>(second % 86400)
        # days to civil date in the Gregorian calendar, years counted from March
        day += 719468
        era = day // 146097
        day_of_era = day - era * 146097
        year_of_era = (day_of_era - day_of_era // 1460 + day_of_era // 36524 - day_of_era // 146096) // 365
        day_of_year = day_of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
        shifted_month = (5 * day_of_year + 2) // 153
        put_day_and_time(
            clock.text,
            <int>(year_of_era + era * 400 + (1 if shifted_month >= 10 else 0)),
            <int>(shifted_month + 3 if shifted_month < 10 else shifted_month - 9),
            <int>(day_of_year - (153 * shifted_month + 2) // 5 + 1),
            of_day // 3600,
            of_day // 60 % 60,
            of_day % 60,
        )
        clock.second = second
    put(out, clock.text, 19)
    put_char(out, b".")
    for i in range(6):
        out.start[out.used + 5 - i] = <char>(48 + fraction % 10)
        fraction //= 10
    out.used += 6
    put(out, b"+00", 3)


cdef void put_copy_text(Output *out, Slice text) noexcept nogil:
    cdef Py_ssize_t i = 0
    cdef Py_ssize_t run
    cdef unsigned char c
    while i < text.size:
        run = i
        while i < text.size and (<unsigned char>text.start[i] > 0x5C or 0x20 <= <unsigned char>text.start[i] < 0x5C):
            i += 1
        put(out, text.start + run, i - run)
        if i == text.size:
            return
        c = <unsigned char>text.start[i]
        i += 1
        if c == b"\\":
            put(out, b"\\\\", 2)
        elif c == b"\t":
            put(out, b"\\t", 2)
        elif c == b"\n":
            put(out, b"\\n", 2)
        elif c == b"\r":
            put(out, b"\\r", 2)
        elif c == 0:  # PostgreSQL has no NUL in text
            put_char(out, b" ")
        else:
            put_char(out, <char>c)


cdef void put_copy_row(Output *out, Clock *clock, Outcome *o, char kind) noexcept nogil:
    """campaign_id number attempt kind at batch delivery_server_id connection size status category diagnostic mta recipient."""
    put_int(out, o.campaign)
    put_char(out, b"\t")
    put_int(out, o.number)
    put_char(out, b"\t")
    put_int(out, o.attempt)
    put_char(out, b"\t")
    put_char(out, kind)
    put_char(out, b"\t")
    put_utc(out, clock, o.at)
    put_char(out, b"\t")
    put_int(out, o.batch)
    put_char(out, b"\t")
    put_int(out, o.delivery_server)
    put_char(out, b"\t")
    put_int(out, o.connection)
    put_char(out, b"\t")
    put_int(out, fit32(o.size))
    put_char(out, b"\t")
    put_copy_text(out, o.text[2])
    put_char(out, b"\t")
    put_copy_text(out, o.text[4])
    put_char(out, b"\t")
    put_copy_text(out, o.text[3])
    put_char(out, b"\t")
    put_copy_text(out, o.text[5])
    put_char(out, b"\t")
    put_copy_text(out, o.text[0])
    put_char(out, b"\n")


cdef inline int wants_bit(Outcome *o) noexcept nogil:
    """Whether it settles this attempt: a terminal record, or one that says when the next attempt is due."""
    return o.position >= 0 and (is_terminal(o.kind) or o.due_at > 0)


def touched(bytes block not None):
    """What a block of whole records is about: (sorted (campaign, batch) whose progress it moves, sorted campaigns).

    Raises Garbage.
    """
    cdef const unsigned char *start = <const unsigned char *>PyBytes_AS_STRING(block)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(block)
    cdef Py_ssize_t offset = 0
    cdef Py_ssize_t end
    cdef Outcome o
    cdef set batches = set()
    cdef set campaigns = set()
    cdef int64_t last_campaign = 0
    cdef int32_t last_batch = 0
    cdef bint any_batch = False
    cdef bint any_campaign = False
    while offset < size:
        end = record_end(start, offset, size)
        if end <= 0:
            raise Garbage(offset)
        open_outcome(start + offset + FRAME, &o)
        offset = end
        if not is_outcome(o.kind):
            continue
        if not any_campaign or o.campaign != last_campaign:
            campaigns.add(o.campaign)
            any_campaign = True
            any_batch = any_batch and o.campaign == last_campaign
            last_campaign = o.campaign
        if wants_bit(&o) and (not any_batch or o.batch != last_batch):
            batches.add((o.campaign, o.batch))
            any_batch = True
            last_batch = o.batch
    return sorted(batches), sorted(campaigns)


cdef inline int kind_index(char kind) noexcept nogil:
    if kind == b"d":
        return 0
    if kind == b"b":
        return 1
    if kind == b"x":
        return 2
    if kind == b"s":
        return 3
    if kind == b"c":
        return 4
    if kind == b"t":
        return 5
    return 6


def copy_rows(bytes block not None, dict done not None, campaigns):
    """Rows for the accounting table, and all else the ledger must write, from a block of whole records.

    `done`: (campaign, batch) -> (bytearray, bits): progress as it stands, most significant bit first; the bits of this block
    are set in place. `campaigns`: the campaigns that exist. Returns (rows, retries, totals, strays):
    rows      bytes in COPY text format, columns as `put_copy_row` names them. A terminal record whose bit is already set is
              the second word about that recipient and becomes `u`: P1 allows one terminal record
    retries   tuples (campaign, number, attempt that is due, due at, first attempt at), times in microseconds
    totals    campaign -> [d, b, x, s, c, t, u] rows written
    strays    records of campaigns or batches that are gone; no row is made of them
    Raises Garbage.
    """
    cdef const unsigned char *start = <const unsigned char *>PyBytes_AS_STRING(block)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(block)
    cdef Py_ssize_t offset = 0
    cdef Py_ssize_t end, strays = 0, bits = 0
    cdef Outcome o
    cdef Output out
    cdef Clock clock
    cdef list retries = []
    cdef dict totals = {}
    cdef list counts = None
    cdef tuple found
    cdef bytearray bitmap = None
    cdef unsigned char *cell
    cdef unsigned char mask
    cdef char kind
    cdef int64_t bitmap_campaign = 0, counted_campaign = 0
    cdef int32_t bitmap_batch = 0
    cdef bint bitmap_known = False, counted_known = False
    clock.second = -1
    start_output(&out, size + 4096)
    try:
        while offset < size:
            end = record_end(start, offset, size)
            if end <= 0:
                raise Garbage(offset)
            reserve(&out, 2 * (end - offset) + 512)
            open_outcome(start + offset + FRAME, &o)
            offset = end
            if not is_outcome(o.kind):
                continue
            if not counted_known or o.campaign != counted_campaign:
                counted_campaign = o.campaign
                counted_known = True
                counts = totals.get(o.campaign)
                if counts is None and o.campaign in campaigns:
                    counts = totals[o.campaign] = [0, 0, 0, 0, 0, 0, 0]
            if counts is None:
                strays += 1
                continue
            kind = o.kind
            if wants_bit(&o):
                if not bitmap_known or o.campaign != bitmap_campaign or o.batch != bitmap_batch:
                    bitmap_known = True
                    bitmap_campaign = o.campaign
                    bitmap_batch = o.batch
                    found = done.get((o.campaign, o.batch))
                    if found is None:
                        bitmap = None
                    else:
                        bitmap = found[0]
                        bits = found[1]
                        if len(bitmap) * 8 < bits:
                            raise ValueError("bitmap is shorter than its number of bits")
                if bitmap is None or o.position >= bits:
                    strays += 1
                    continue
                cell = <unsigned char *>PyByteArray_AS_STRING(bitmap) + (o.position >> 3)
                mask = <unsigned char>(0x80 >> (o.position & 7))
                if cell[0] & mask:
                    if is_terminal(kind):
                        kind = b"u"
                else:
                    cell[0] |= mask
                    if not is_terminal(kind):
                        retries.append((
                            o.campaign, o.number, fit16(o.attempt + 1), sane(o.due_at),
                            sane(o.first_attempt_at if o.first_attempt_at > 0 else o.at),
                        ))
            counts[kind_index(kind)] += 1
            put_copy_row(&out, &clock, &o, kind)
        return PyBytes_FromStringAndSize(out.start, out.used), retries, totals, strays
    finally:
        PyMem_Free(out.start)
