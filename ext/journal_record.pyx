# cython: language_level=3
"""Packs, checks and unpacks journal records, and turns blocks of them into COPY rows and accounting file lines.

Owns the byte format of a record; files, cursors and tables belong to `journal` and `store`. A record is

    u32 length of the payload | u32 CRC-32C of the payload | payload            (all numbers little-endian)
    payload: u8 kind, u8 0, i16 attempt, i32 batch, i32 number, i32 position, i32 epoch, i32 connection,
             i64 campaign, i64 delivery server, i64 at                           48 bytes: the whole of an intent
    outcome: i64 queued at, i64 first attempt at, i64 due at, i64 size,
             then ten strings, each u16 length and UTF-8, in the order of domain.accounting.AccountingRecord

Times are POSIX microseconds. Kinds `i` (intent) and `w` (intent withdrawn: nothing of it left) are the journal's own; the
others are those of domain.states. A record never holds invalid UTF-8, and every number fits its column in PostgreSQL, so
nothing that was journalled can be refused by the ledger.
"""

from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from libc.stdint cimport int16_t, int32_t, int64_t, uint16_t, uint32_t
from libc.string cimport memchr, memcpy

cdef extern from *:
    """
    #include <stdint.h>
    #include <stddef.h>
    #include <string.h>
    #include <time.h>
    #if defined(__x86_64__)
    #include <immintrin.h>
    #elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
    #include <arm_acle.h>
    #endif
    #if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
    #error "the journal format is little-endian"
    #endif

    /* 9999-12-31 23:59:59.999999: the last instant that PostgreSQL and a four-digit year can both show */
    #define SLUICE_LAST_MICROSECOND INT64_C(253402300799999999)

    static uint32_t sluice_crc_table[8][256];
    static int sluice_crc_hardware = 0;

    static void sluice_crc_setup(void) {
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t c = i;
            for (int k = 0; k < 8; k++) c = (c >> 1) ^ (0x82F63B78u & (0u - (c & 1u)));
            sluice_crc_table[0][i] = c;
        }
        for (int t = 1; t < 8; t++)
            for (uint32_t i = 0; i < 256; i++) {
                uint32_t c = sluice_crc_table[t - 1][i];
                sluice_crc_table[t][i] = (c >> 8) ^ sluice_crc_table[0][c & 0xff];
            }
    #if defined(__x86_64__)
        sluice_crc_hardware = __builtin_cpu_supports("sse4.2") ? 1 : 0;
    #endif
    }

    static uint32_t sluice_crc_software(const unsigned char *p, size_t n) {
        uint32_t c = 0xffffffffu;
        while (n >= 8) {
            uint32_t a, b;
            memcpy(&a, p, 4); memcpy(&b, p + 4, 4);
            a ^= c;
            c = sluice_crc_table[7][a & 0xff] ^ sluice_crc_table[6][(a >> 8) & 0xff] ^ sluice_crc_table[5][(a >> 16) & 0xff]
              ^ sluice_crc_table[4][a >> 24] ^ sluice_crc_table[3][b & 0xff] ^ sluice_crc_table[2][(b >> 8) & 0xff]
              ^ sluice_crc_table[1][(b >> 16) & 0xff] ^ sluice_crc_table[0][b >> 24];
            p += 8; n -= 8;
        }
        while (n--) c = (c >> 8) ^ sluice_crc_table[0][(c ^ *p++) & 0xff];
        return ~c;
    }

    #if defined(__x86_64__)
    __attribute__((target("sse4.2"))) static uint32_t sluice_crc_sse(const unsigned char *p, size_t n) {
        uint64_t c = 0xffffffffu, v;
        while (n >= 8) { memcpy(&v, p, 8); c = _mm_crc32_u64(c, v); p += 8; n -= 8; }
        uint32_t d = (uint32_t)c;
        while (n--) d = _mm_crc32_u8(d, *p++);
        return ~d;
    }
    #endif

    static uint32_t sluice_crc(const unsigned char *p, size_t n) {
    #if defined(__x86_64__)
        if (sluice_crc_hardware) return sluice_crc_sse(p, n);
    #elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
        uint32_t c = 0xffffffffu; uint64_t v;
        while (n >= 8) { memcpy(&v, p, 8); c = __crc32cd(c, v); p += 8; n -= 8; }
        while (n--) c = __crc32cb(c, *p++);
        return ~c;
    #endif
        return sluice_crc_software(p, n);
    }

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
    int64_t SLUICE_LAST_MICROSECOND
    void sluice_crc_setup() noexcept nogil
    uint32_t sluice_crc(const unsigned char *p, size_t n) noexcept nogil
    uint32_t sluice_crc_software(const unsigned char *p, size_t n) noexcept nogil
    int sluice_local_time(int64_t seconds, int *fields) noexcept nogil
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL

sluice_crc_setup()

cdef enum:
    FRAME = 8
    HEAD = 48
    OUTCOME_HEAD = 80
    STRINGS = 10
    DIAGNOSTIC = 3
    LONGEST_STRING = 1000
    LONGEST_DIAGNOSTIC = 512
    LONGEST_PAYLOAD = 32768

LONGEST_RECORD = LONGEST_PAYLOAD + FRAME

cdef struct Slice:
    const char *start
    Py_ssize_t size

cdef struct Outcome:
    char kind
    int16_t attempt
    int32_t batch
    int32_t number
    int32_t position
    int32_t epoch
    int32_t connection
    int64_t campaign
    int64_t delivery_server
    int64_t at
    int64_t queued_at
    int64_t first_attempt_at
    int64_t due_at
    int64_t size
    Slice text[STRINGS]


class Garbage(ValueError):
    """Bytes that are no record stand where one must start. `offset` counts from the start of the block that was given."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        super().__init__(f"no journal record at offset {offset}")


def crc32c(bytes data not None):
    """CRC-32C (Castagnoli, RFC 3720 appendix B.4) of `data`; the hardware instruction where the CPU has one."""
    return sluice_crc(<const unsigned char *>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))


def crc32c_by_table(bytes data not None):
    """The same number without the hardware instruction: what other machines compute, kept comparable by the tests."""
    return sluice_crc_software(<const unsigned char *>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))


# --- packing ----------------------------------------------------------------------------------------------------------

cdef inline int32_t fit32(int64_t value) noexcept nogil:
    if value > 2147483647:
        return 2147483647
    if value < -2147483648:
        return -2147483648
    return <int32_t>value


cdef inline int16_t fit16(int64_t value) noexcept nogil:
    return <int16_t>(32767 if value > 32767 else 0 if value < 0 else value)


cdef inline void put_head(
    unsigned char *out, char kind, int64_t campaign, int64_t batch, int64_t number, int64_t position, int64_t attempt,
    int64_t epoch, int64_t connection, int64_t delivery_server, int64_t at,
) noexcept nogil:
    cdef int16_t short_value = fit16(attempt)
    cdef int32_t value[5]
    out[0] = <unsigned char>kind
    out[1] = 0
    memcpy(out + 2, &short_value, 2)
    value[0] = fit32(batch)
    value[1] = fit32(number)
    value[2] = fit32(position)
    value[3] = fit32(epoch)
    value[4] = fit32(connection)
    memcpy(out + 4, value, 20)
    memcpy(out + 24, &campaign, 8)
    memcpy(out + 32, &delivery_server, 8)
    memcpy(out + 40, &at, 8)


cdef inline void seal(unsigned char *record, uint32_t length) noexcept nogil:
    cdef uint32_t crc = sluice_crc(record + FRAME, length)
    memcpy(record, &length, 4)
    memcpy(record + 4, &crc, 4)


cdef bytes packed_intent(
    char kind, int64_t campaign, int64_t batch, int64_t number, int64_t position, int64_t attempt, int64_t epoch,
    int64_t connection, int64_t delivery_server, int64_t at,
):
    cdef bytes record = PyBytes_FromStringAndSize(NULL, FRAME + HEAD)
    cdef unsigned char *out = <unsigned char *>PyBytes_AS_STRING(record)
    put_head(out + FRAME, kind, campaign, batch, number, position, attempt, epoch, connection, delivery_server, at)
    seal(out, HEAD)
    return record


def pack_intent(
    int64_t campaign_id, int64_t batch, int64_t number, int64_t position, int64_t attempt, int64_t epoch, int64_t connection,
    int64_t delivery_server_id, int64_t at, /,
):
    """The framed record (56 bytes) of an intent, R10. Arguments as in domain.accounting.Intent; `at` in microseconds."""
    return packed_intent(b"i", campaign_id, batch, number, position, attempt, epoch, connection, delivery_server_id, at)


def pack_withdrawal(
    int64_t campaign_id, int64_t batch, int64_t number, int64_t position, int64_t attempt, int64_t epoch, int64_t connection,
    int64_t delivery_server_id, int64_t at, /,
):
    """The framed record that takes an intent back: the message certainly did not leave whole, so it is not in doubt."""
    return packed_intent(b"w", campaign_id, batch, number, position, attempt, epoch, connection, delivery_server_id, at)


cdef int take_text(str text, Slice *into, Py_ssize_t longest, list kept) except -1:
    """Point `into` at the UTF-8 of `text`, cut to `longest` bytes between two characters."""
    cdef Py_ssize_t size = 0
    cdef const char *start
    cdef bytes replaced
    if text is None:
        raise TypeError("a text field of a journal record is None")
    try:
        start = PyUnicode_AsUTF8AndSize(text, &size)
    except UnicodeEncodeError:  # lone surrogates have no UTF-8, and PostgreSQL would refuse whatever stood for them
        replaced = text.encode("utf-8", "replace")
        kept.append(replaced)
        start = PyBytes_AS_STRING(replaced)
        size = PyBytes_GET_SIZE(replaced)
    if size > longest:
        size = longest
        while size > 0 and (start[size] & 0xC0) == 0x80:
            size -= 1
    into.start = start
    into.size = size
    return 0


def pack_outcome(
    str kind not None, int64_t campaign_id, int64_t batch, int64_t number, int64_t position, int64_t attempt, int64_t epoch,
    int64_t connection, int64_t delivery_server_id, int64_t at, int64_t queued_at, int64_t first_attempt_at, int64_t due_at,
    int64_t size, str recipient, str sender, str status, str diagnostic, str category, str mta, str source_ip,
    str destination_ip, str esmtp, str queue, /,
):
    """The framed record of one outcome. Arguments in the order of domain.accounting.AccountingRecord; times in microseconds.

    `position` -1 means that no bit of a batch belongs to it. Strings are cut to 1000 bytes, `diagnostic` to 512 (S15);
    lone surrogates become `?`. Raises ValueError on a kind that is none of d b x s c t u.
    """
    cdef Slice text[STRINGS]
    cdef list kept = []
    cdef Py_ssize_t length = OUTCOME_HEAD
    cdef int64_t value[4]
    cdef uint16_t string_size
    cdef bytes record
    cdef unsigned char *out
    cdef int i
    cdef Py_UCS4 letter
    if len(kind) != 1:
        raise ValueError(f"kind {kind!r} is no letter of d b x s c t u")
    letter = kind[0]
    if letter > 127 or not is_outcome(<char>letter):
        raise ValueError(f"kind {kind!r} is no letter of d b x s c t u")
    take_text(recipient, &text[0], LONGEST_STRING, kept)
    take_text(sender, &text[1], LONGEST_STRING, kept)
    take_text(status, &text[2], LONGEST_STRING, kept)
    take_text(diagnostic, &text[3], LONGEST_DIAGNOSTIC, kept)
    take_text(category, &text[4], LONGEST_STRING, kept)
    take_text(mta, &text[5], LONGEST_STRING, kept)
    take_text(source_ip, &text[6], LONGEST_STRING, kept)
    take_text(destination_ip, &text[7], LONGEST_STRING, kept)
    take_text(esmtp, &text[8], LONGEST_STRING, kept)
    take_text(queue, &text[9], LONGEST_STRING, kept)
    for i in range(STRINGS):
        length += 2 + text[i].size
    record = PyBytes_FromStringAndSize(NULL, FRAME + length)
    out = <unsigned char *>PyBytes_AS_STRING(record)
    put_head(
        out + FRAME, <char>letter, campaign_id, batch, number, position, attempt, epoch, connection, delivery_server_id, at
    )
    value[0] = queued_at
    value[1] = first_attempt_at
    value[2] = due_at
    value[3] = size
    memcpy(out + FRAME + HEAD, value, 32)
    out += FRAME + OUTCOME_HEAD
    for i in range(STRINGS):
        string_size = <uint16_t>text[i].size
        memcpy(out, &string_size, 2)
        memcpy(out + 2, text[i].start, string_size)
        out += 2 + string_size
    seal(<unsigned char *>PyBytes_AS_STRING(record), <uint32_t>length)
    return record


# --- reading ----------------------------------------------------------------------------------------------------------

cdef inline bint is_outcome(char kind) noexcept nogil:
    return kind == b"d" or kind == b"b" or kind == b"x" or kind == b"s" or kind == b"c" or kind == b"t" or kind == b"u"


cdef inline bint is_terminal(char kind) noexcept nogil:
    return kind == b"d" or kind == b"b" or kind == b"x" or kind == b"s" or kind == b"c"


cdef bint well_formed(const unsigned char *payload, Py_ssize_t length) noexcept nogil:
    """Tell whether the payload's strings end exactly where it ends."""
    cdef Py_ssize_t at = OUTCOME_HEAD
    cdef uint16_t size
    cdef int i
    if payload[0] == b"i" or payload[0] == b"w":
        return length == HEAD
    if not is_outcome(<char>payload[0]):
        return False
    for i in range(STRINGS):
        if at + 2 > length:
            return False
        memcpy(&size, payload + at, 2)
        at += 2 + size
    return at == length


cdef Py_ssize_t record_end(const unsigned char *block, Py_ssize_t offset, Py_ssize_t end) noexcept nogil:
    """Where the record at `offset` ends; 0 when `end` comes first; -1 when no record can start there."""
    cdef uint32_t length, crc
    if end - offset < FRAME:
        return 0
    memcpy(&length, block + offset, 4)
    if length < HEAD or length > LONGEST_PAYLOAD:
        return -1
    if end - offset - FRAME < <Py_ssize_t>length:
        return 0
    memcpy(&crc, block + offset + 4, 4)
    # the shape first: it is cheaper than the checksum when a whole file is searched for the next record
    if not well_formed(block + offset + FRAME, length) or crc != sluice_crc(block + offset + FRAME, length):
        return -1
    return offset + FRAME + length


cdef void open_outcome(const unsigned char *payload, Outcome *into) noexcept nogil:
    cdef Py_ssize_t at = OUTCOME_HEAD
    cdef uint16_t size
    cdef int i
    into.kind = <char>payload[0]
    memcpy(&into.attempt, payload + 2, 2)
    memcpy(&into.batch, payload + 4, 4)
    memcpy(&into.number, payload + 8, 4)
    memcpy(&into.position, payload + 12, 4)
    memcpy(&into.epoch, payload + 16, 4)
    memcpy(&into.connection, payload + 20, 4)
    memcpy(&into.campaign, payload + 24, 8)
    memcpy(&into.delivery_server, payload + 32, 8)
    memcpy(&into.at, payload + 40, 8)
    if not is_outcome(into.kind):
        return
    memcpy(&into.queued_at, payload + 48, 8)
    memcpy(&into.first_attempt_at, payload + 56, 8)
    memcpy(&into.due_at, payload + 64, 8)
    memcpy(&into.size, payload + 72, 8)
    for i in range(STRINGS):
        memcpy(&size, payload + at, 2)
        into.text[i].start = <const char *>payload + at + 2
        into.text[i].size = size
        at += 2 + size


cdef tuple as_tuple(Outcome *o):
    cdef str kind = chr(o.kind)
    if not is_outcome(o.kind):
        return (
            kind, o.campaign, o.batch, o.number, o.position, o.attempt, o.epoch, o.connection, o.delivery_server, o.at,
        )
    return (
        kind, o.campaign, o.batch, o.number, o.position, o.attempt, o.epoch, o.connection, o.delivery_server, o.at,
        o.queued_at, o.first_attempt_at, o.due_at, o.size,
        o.text[0].start[: o.text[0].size].decode("utf-8"), o.text[1].start[: o.text[1].size].decode("utf-8"),
        o.text[2].start[: o.text[2].size].decode("utf-8"), o.text[3].start[: o.text[3].size].decode("utf-8"),
        o.text[4].start[: o.text[4].size].decode("utf-8"), o.text[5].start[: o.text[5].size].decode("utf-8"),
        o.text[6].start[: o.text[6].size].decode("utf-8"), o.text[7].start[: o.text[7].size].decode("utf-8"),
        o.text[8].start[: o.text[8].size].decode("utf-8"), o.text[9].start[: o.text[9].size].decode("utf-8"),
    )


def unpack(bytes payload not None):
    """The fields of one payload (a record without its frame), in packing order, kind first: 10 for intents, 24 for outcomes.

    Raises Garbage when it is not the payload of a record.
    """
    cdef const unsigned char *start = <const unsigned char *>PyBytes_AS_STRING(payload)
    cdef Outcome outcome
    if PyBytes_GET_SIZE(payload) < HEAD or not well_formed(start, PyBytes_GET_SIZE(payload)):
        raise Garbage(0)
    open_outcome(start, &outcome)
    return as_tuple(&outcome)


def whole(bytes block not None, Py_ssize_t offset=0):
    """Where the last whole record from `offset` on ends. Less than len(block): the rest is the start of one more record.

    Raises Garbage (with the offset in the block) where no record can start.
    """
    cdef const unsigned char *start = <const unsigned char *>PyBytes_AS_STRING(block)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(block)
    cdef Py_ssize_t end
    if offset < 0 or offset > size:
        raise ValueError(f"offset {offset} is outside the block of {size} bytes")
    while offset < size:
        end = record_end(start, offset, size)
        if end < 0:
            raise Garbage(offset)
        if end == 0:
            break
        offset = end
    return offset


def scan(bytes block not None, Py_ssize_t offset=0):
    """Every whole record from `offset` on as tuples (see `unpack`), and where the last one ends. Raises as `whole` does."""
    cdef const unsigned char *start = <const unsigned char *>PyBytes_AS_STRING(block)
    cdef Py_ssize_t end = whole(block, offset)
    cdef Outcome outcome
    cdef list records = []
    while offset < end:
        open_outcome(start + offset + FRAME, &outcome)
        records.append(as_tuple(&outcome))
        offset = record_end(start, offset, end)
    return records, end


def find(bytes block not None, Py_ssize_t offset=0):
    """Where the next valid record starts at or after `offset`, -1 when none does: tells garbage in the middle from a torn tail."""
    cdef const unsigned char *start = <const unsigned char *>PyBytes_AS_STRING(block)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(block)
    if offset < 0:
        raise ValueError("offset is negative")
    with nogil:
        while offset < size:
            if record_end(start, offset, size) > 0:
                break
            offset += 1
    return offset if offset < size else -1


# --- intents without an outcome -----------------------------------------------------------------------------------------

cdef class OpenIntents:
    """Which intents have had no outcome yet, as far as the journal was fed to it, in order. Feeding a block twice is harmless."""

    cdef dict _open

    def __cinit__(self):
        self._open = {}

    def __len__(self):
        return len(self._open)

    def feed(self, bytes block not None, segment):
        """Take in a block of whole records that stands in segment number `segment`. Raises Garbage."""
        cdef const unsigned char *start = <const unsigned char *>PyBytes_AS_STRING(block)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(block)
        cdef Py_ssize_t offset = 0
        cdef Py_ssize_t end
        cdef const unsigned char *payload
        cdef int16_t attempt
        cdef int32_t number
        cdef int64_t campaign
        cdef tuple key
        while offset < size:
            end = record_end(start, offset, size)
            if end <= 0:
                raise Garbage(offset)
            payload = start + offset + FRAME
            memcpy(&attempt, payload + 2, 2)
            memcpy(&number, payload + 8, 4)
            memcpy(&campaign, payload + 24, 8)
            key = (campaign, number, attempt)
            if payload[0] == b"i":
                self._open[key] = (segment, PyBytes_FromStringAndSize(<const char *>start + offset, end - offset))
            else:
                self._open.pop(key, None)
            offset = end

    def records(self):
        """Their fields, as `unpack` gives them, oldest first."""
        return [unpack(record[FRAME:]) for _, record in self._open.values()]

    def before(self, segment):
        """The framed records of those that stand in a segment with a smaller number."""
        return [record for held_in, record in self._open.values() if held_in < segment]


# --- output ---------------------------------------------------------------------------------------------------------------

cdef struct Output:
    char *start
    Py_ssize_t used
    Py_ssize_t size


cdef int reserve(Output *out, Py_ssize_t more) except -1:
    cdef Py_ssize_t size = out.size
    cdef char *start
    if out.used + more <= size:
        return 0
    while size < out.used + more:
        size = size * 2 + 4096
    start = <char *>PyMem_Realloc(out.start, size)
    if start == NULL:
        raise MemoryError
    out.start = start
    out.size = size
    return 0


cdef inline void put(Output *out, const char *start, Py_ssize_t size) noexcept nogil:
    memcpy(out.start + out.used, start, size)
    out.used += size


cdef inline void put_char(Output *out, char value) noexcept nogil:
    out.start[out.used] = value
    out.used += 1


cdef void put_int(Output *out, int64_t value) noexcept nogil:
    cdef char digits[24]
    cdef int at = 24
    cdef bint negative = value < 0
    cdef unsigned long long rest = <unsigned long long>(-(value + 1)) + 1 if negative else <unsigned long long>value
    while True:
        at -= 1
        digits[at] = <char>(48 + rest % 10)
        rest //= 10
        if rest == 0:
            break
    if negative:
        at -= 1
        digits[at] = b"-"
    put(out, digits + at, 24 - at)


cdef inline void two(char *into, int value) noexcept nogil:
    into[0] = <char>(48 + value // 10)
    into[1] = <char>(48 + value % 10)


cdef void put_day_and_time(char *into, int year, int month, int day, int hour, int minute, int second) noexcept nogil:
    """`YYYY-MM-DD HH:MM:SS`, 19 bytes."""
    two(into, year // 100)
    two(into + 2, year % 100)
    into[4] = b"-"
    two(into + 5, month)
    into[7] = b"-"
    two(into + 8, day)
    into[10] = b" "
    two(into + 11, hour)
    into[13] = b":"
    two(into + 14, minute)
    into[16] = b":"
    two(into + 17, second)


cdef struct Clock:
    int64_t second
    char text[24]
    int size


cdef inline int64_t sane(int64_t microseconds) noexcept nogil:
    return 0 if microseconds < 0 else SLUICE_LAST_MICROSECOND if microseconds > SLUICE_LAST_MICROSECOND else microseconds


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


# --- PostgreSQL: rows for COPY ---------------------------------------------------------------------------------------------

cdef void put_copy_text(Output *out, Slice text) noexcept nogil:
    cdef Py_ssize_t i
    cdef char c
    for i in range(text.size):
        c = text.start[i]
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
            put_char(out, c)


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


cdef Py_ssize_t start_output(Output *out, Py_ssize_t expected) except -1:
    out.used = 0
    out.size = expected
    out.start = <char *>PyMem_Malloc(expected)
    if out.start == NULL:
        raise MemoryError
    return 0


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


# --- accounting files: PowerMTA's 23 columns -------------------------------------------------------------------------------

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


cdef bytes status_cell(bytes status, char kind):
    """The finished dsnStatus cell: `5.1.1 (bad destination mailbox address)`, quoted when its text has a comma."""
    cdef str code = status.decode("utf-8")
    cdef str detail
    if not code:
        code = "2.0.0" if kind == b"d" else "4.0.0" if kind == b"t" or kind == b"u" else "5.0.0"
    if code == "2.0.0":
        return b"2.0.0 (success)"
    detail = _STATUS_TEXTS.get(code[2:])
    if code[:2] not in ("2.", "4.", "5.") or detail is None:
        detail = _STATUS_TEXTS.get(code[2:4] + "0", "undefined status")
    return encoded_cell(f"{code} ({detail})".encode())


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
    cdef int blank
    cdef bint quoted = memchr(p, b",", text.size) != NULL or memchr(p, b'"', text.size) != NULL
    if quoted:
        put_char(out, b'"')
    put(out, prefix, prefix_size)
    if prefix_size == 0 and text.size > 0:
        if p[0] == b"=" or p[0] == b"+" or p[0] == b"-" or p[0] == b"@" or p[0] == b"\t" or p[0] == b"\r":
            put_char(out, b"'")
    while i < text.size:
        # most bytes are printable ASCII
        if 0x20 <= p[i] < 0x7F:
            if p[i] == b'"':
                put_char(out, b'"')
            put_char(out, <char>p[i])
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


cdef int put_line(Output *out, Clock *logged, Clock *queued, Outcome *o) except -1:
    cdef char kind = b"b" if o.kind == b"x" else o.kind
    cdef bytes status = PyBytes_FromStringAndSize(o.text[2].start, o.text[2].size)
    cdef tuple key = (status, kind)
    cdef bytes cell = _status_cells.get(key)
    cdef Slice vmta
    cdef Py_ssize_t i
    if cell is None:
        if len(_status_cells) > 4096:  # peers choose these codes
            _status_cells.clear()
        cell = _status_cells[key] = status_cell(status, kind)
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
                reserve(&out, 2 * (end - offset) + 1024)
                open_outcome(start + offset + FRAME, &o)
                if memchr(wanted, b"b" if o.kind == b"x" else o.kind, wanted_size) != NULL:
                    put_line(&out, &logged, &queued, &o)
            offset = end
        return PyBytes_FromStringAndSize(out.start, out.used)
    finally:
        PyMem_Free(out.start)
