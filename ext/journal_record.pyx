"""Packs, checks and unpacks journal records.

Owns the byte format of a record; what blocks of them become is in `ledger_rows` and `accounting_lines`, files and cursors belong to
`journal`. A record is

    u32 length of the payload | u32 CRC-32C of the payload | payload            (all numbers little-endian)
    payload: u8 kind, u8 0, i16 attempt, i32 batch, i32 number, i32 position, i32 epoch, i32 connection,
             i64 campaign, i64 delivery server, i64 at                           48 bytes: the whole of an intent
    outcome: i64 queued at, i64 first attempt at, i64 due at, i64 size,
             then ten strings, each u16 length and UTF-8, in the order of domain.accounting.AccountingRecord

Times are POSIX microseconds. Kinds `i` (intent) and `w` (intent withdrawn: nothing of it left) are the journal's own; the
others are those of domain.states. A record never holds invalid UTF-8, and every number fits its column in PostgreSQL, so
nothing that was journalled can be refused by the ledger.
"""

cimport cython

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport INT64_MAX, int16_t, int32_t, int64_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memset

cdef extern from *:
    """
    #include <stdint.h>
    #include <stddef.h>
    #include <string.h>
    #if defined(__x86_64__)
    #include <immintrin.h>
    #elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
    #include <arm_acle.h>
    #endif
    #if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
    #error "the journal format is little-endian"
    #endif

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
    """
    void sluice_crc_setup() noexcept nogil
    uint32_t sluice_crc(const unsigned char *p, size_t n) noexcept nogil
    uint32_t sluice_crc_software(const unsigned char *p, size_t n) noexcept nogil
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL

sluice_crc_setup()

LONGEST_RECORD = LONGEST_PAYLOAD + FRAME


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

cdef inline void put_head(unsigned char *out, const Outcome *o) noexcept nogil:
    cdef int32_t value[5]
    out[0] = <unsigned char>o.kind
    out[1] = 0
    memcpy(out + 2, &o.attempt, 2)
    value[0] = o.batch
    value[1] = o.number
    value[2] = o.position
    value[3] = o.epoch
    value[4] = o.connection
    memcpy(out + 4, value, 20)
    memcpy(out + 24, &o.campaign, 8)
    memcpy(out + 32, &o.delivery_server, 8)
    memcpy(out + 40, &o.at, 8)


cdef inline void seal(unsigned char *record, uint32_t length) noexcept nogil:
    cdef uint32_t crc = sluice_crc(record + FRAME, length)
    memcpy(record, &length, 4)
    memcpy(record + 4, &crc, 4)


cdef inline void put_intent(unsigned char *record, const Outcome *o) noexcept nogil:
    put_head(record + FRAME, o)
    seal(record, HEAD)


cdef inline Py_ssize_t outcome_length(const Outcome *o) noexcept nogil:
    cdef Py_ssize_t length = OUTCOME_HEAD + 2 * STRINGS
    cdef int i
    for i in range(STRINGS):
        length += o.text[i].size
    return length


cdef void put_outcome(unsigned char *record, const Outcome *o, Py_ssize_t length) noexcept nogil:
    cdef unsigned char *out = record + FRAME
    cdef int64_t value[4]
    cdef uint16_t size
    cdef int i
    put_head(out, o)
    value[0] = o.queued_at
    value[1] = o.first_attempt_at
    value[2] = o.due_at
    value[3] = o.size
    memcpy(out + HEAD, value, 32)
    out += OUTCOME_HEAD
    for i in range(STRINGS):
        size = <uint16_t>o.text[i].size
        memcpy(out, &size, 2)
        memcpy(out + 2, o.text[i].start, size)
        out += 2 + size
    seal(record, <uint32_t>length)


@cython.final
cdef class Records:
    """Framed records on their way into the journal, one behind the other in memory that is used again."""

    def __dealloc__(self):
        free(self.start)

    def __len__(self):
        return self.used

    cdef unsigned char *room(self, Py_ssize_t size) except NULL:
        """Where the next `size` octets go; they count as written."""
        cdef unsigned char *grown
        cdef Py_ssize_t capacity = self.capacity
        if self.used + size > capacity:
            capacity = 2 * capacity + size + 4096
            grown = <unsigned char *>realloc(self.start, capacity)
            if grown == NULL:
                raise MemoryError
            self.start, self.capacity = grown, capacity
        self.used += size
        return self.start + self.used - size

    cdef int intend(self, const Outcome *o) except -1:
        """Append the record of an intent; only the head of `o` counts."""
        put_intent(self.room(FRAME + HEAD), o)
        return 0

    cdef int settle(self, const Outcome *o) except -1:
        """Append the record of an outcome; its texts are UTF-8 within the limits that `take_text` keeps."""
        cdef Py_ssize_t length = outcome_length(o)
        put_outcome(self.room(FRAME + length), o, length)
        return 0

    def append(self, bytes record not None):
        """Append one framed record."""
        cdef Py_ssize_t size = PyBytes_GET_SIZE(record)
        memcpy(self.room(size), PyBytes_AS_STRING(record), size)

    def take(self):
        """All of them, in order; afterwards there is none."""
        cdef Py_ssize_t size = self.used
        self.used = 0
        taken = PyBytes_FromStringAndSize(<const char *>self.start, size)
        if self.capacity > 1048576:  # a burst must not hold on to its memory
            free(self.start)
            self.start, self.capacity = NULL, 0
        return taken


cdef bytes packed_intent(
    char kind, int64_t campaign, int64_t batch, int64_t number, int64_t position, int64_t attempt, int64_t epoch,
    int64_t connection, int64_t delivery_server, int64_t at,
):
    cdef bytes record = PyBytes_FromStringAndSize(NULL, FRAME + HEAD)
    cdef Outcome o
    o.kind, o.campaign, o.delivery_server, o.at = kind, campaign, delivery_server, at
    o.batch, o.number, o.position, o.attempt = fit32(batch), fit32(number), fit32(position), fit16(attempt)
    o.epoch, o.connection = fit32(epoch), fit32(connection)
    put_intent(<unsigned char *>PyBytes_AS_STRING(record), &o)
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
    into.start = start
    into.size = cut(start, size, longest)
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
    cdef Outcome o
    cdef list kept = []
    cdef Py_ssize_t length
    cdef bytes record
    cdef Py_UCS4 letter
    if len(kind) != 1:
        raise ValueError(f"kind {kind!r} is no letter of d b x s c t u")
    letter = kind[0]
    if letter > 127 or not is_outcome(<char>letter):
        raise ValueError(f"kind {kind!r} is no letter of d b x s c t u")
    o.kind, o.campaign, o.delivery_server, o.at = <char>letter, campaign_id, delivery_server_id, at
    o.batch, o.number, o.position, o.attempt = fit32(batch), fit32(number), fit32(position), fit16(attempt)
    o.epoch, o.connection = fit32(epoch), fit32(connection)
    o.queued_at, o.first_attempt_at, o.due_at, o.size = queued_at, first_attempt_at, due_at, size
    take_text(recipient, &o.text[0], LONGEST_STRING, kept)
    take_text(sender, &o.text[1], LONGEST_STRING, kept)
    take_text(status, &o.text[2], LONGEST_STRING, kept)
    take_text(diagnostic, &o.text[DIAGNOSTIC], LONGEST_DIAGNOSTIC, kept)
    take_text(category, &o.text[4], LONGEST_STRING, kept)
    take_text(mta, &o.text[5], LONGEST_STRING, kept)
    take_text(source_ip, &o.text[6], LONGEST_STRING, kept)
    take_text(destination_ip, &o.text[7], LONGEST_STRING, kept)
    take_text(esmtp, &o.text[8], LONGEST_STRING, kept)
    take_text(queue, &o.text[9], LONGEST_STRING, kept)
    length = outcome_length(&o)
    record = PyBytes_FromStringAndSize(NULL, FRAME + length)
    put_outcome(<unsigned char *>PyBytes_AS_STRING(record), &o, length)
    return record


# --- reading ----------------------------------------------------------------------------------------------------------

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


def kinds(bytes block not None):
    """How many records of each kind a block of whole records holds. Raises Garbage."""
    cdef const unsigned char *start = <const unsigned char *>PyBytes_AS_STRING(block)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(block)
    cdef Py_ssize_t offset = 0
    cdef Py_ssize_t end
    cdef int64_t counts[128]
    cdef int kind
    memset(counts, 0, sizeof(counts))
    while offset < size:
        end = record_end(start, offset, size)
        if end <= 0:
            raise Garbage(offset)
        counts[start[offset + FRAME]] += 1  # a letter: `record_end` has looked at it
        offset = end
    return {chr(kind): counts[kind] for kind in range(128) if counts[kind]}


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

cdef struct Intent:
    int64_t order
    int64_t segment
    int64_t campaign
    int32_t number
    int16_t attempt
    unsigned char[FRAME + HEAD] record


@cython.overflowcheck(False)
cdef inline uint64_t intent_hash(int64_t campaign, int32_t number, int16_t attempt) noexcept nogil:
    cdef uint64_t mixed = (<uint64_t>campaign << 40 ^ <uint64_t>attempt << 32 ^ <uint64_t>number) * <uint64_t>0x9E3779B97F4A7C15ULL
    return mixed >> 32 ^ mixed


cdef uint64_t hash_of(const Intent *intent) noexcept nogil:
    return intent_hash(intent.campaign, intent.number, intent.attempt)


cdef class OpenIntents:
    """Which intents have had no outcome yet, as far as the journal was fed to it, in order. Feeding a block twice is harmless.

    A table in place of a dict: every message of an engine goes in and out of it once.
    """

    cdef Intent *table  # linear probing; a place whose `order` is 0 is free
    cdef uint64_t mask
    cdef int64_t count
    cdef int64_t orders

    def __cinit__(self):
        self.mask = 255
        self.table = <Intent *>calloc(self.mask + 1, sizeof(Intent))
        if self.table == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.table)

    def __len__(self):
        return self.count

    cdef uint64_t place(self, int64_t campaign, int32_t number, int16_t attempt) noexcept nogil:
        """Where the intent is, or the free place where it would be."""
        cdef uint64_t at = intent_hash(campaign, number, attempt) & self.mask
        while self.table[at].order and not (
            self.table[at].number == number and self.table[at].campaign == campaign and self.table[at].attempt == attempt
        ):
            at = (at + 1) & self.mask
        return at

    cdef int grow(self) except -1:
        cdef Intent *old = self.table
        cdef uint64_t last = self.mask, i
        self.table = <Intent *>calloc(2 * (last + 1), sizeof(Intent))
        if self.table == NULL:
            self.table = old
            raise MemoryError
        self.mask = 2 * last + 1
        for i in range(last + 1):
            if old[i].order:
                self.table[self.place(old[i].campaign, old[i].number, old[i].attempt)] = old[i]
        free(old)
        return 0

    @cython.overflowcheck(False)
    cdef void remove(self, uint64_t hole) noexcept nogil:
        """Free a place, and move up those behind it that would not be found any more."""
        cdef uint64_t at = hole
        while True:
            at = (at + 1) & self.mask
            if self.table[at].order == 0:
                break
            if (at - hash_of(&self.table[at])) & self.mask >= (at - hole) & self.mask:
                self.table[hole] = self.table[at]
                hole = at
        self.table[hole].order = 0
        self.count -= 1

    def feed(self, bytes block not None, int64_t segment):
        """Take in a block of whole records that stands in segment number `segment`. Raises Garbage."""
        cdef const unsigned char *start = <const unsigned char *>PyBytes_AS_STRING(block)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(block)
        cdef Py_ssize_t offset = 0
        cdef Py_ssize_t end
        cdef const unsigned char *payload
        cdef int16_t attempt
        cdef int32_t number
        cdef int64_t campaign
        cdef uint64_t at
        while offset < size:
            end = record_end(start, offset, size)
            if end <= 0:
                raise Garbage(offset)
            payload = start + offset + FRAME
            memcpy(&attempt, payload + 2, 2)
            memcpy(&number, payload + 8, 4)
            memcpy(&campaign, payload + 24, 8)
            if 2 * <uint64_t>self.count > self.mask:
                self.grow()
            at = self.place(campaign, number, attempt)
            if payload[0] == b"i":
                if not self.table[at].order:
                    self.orders += 1
                    self.count += 1
                    self.table[at].order = self.orders
                    self.table[at].campaign, self.table[at].number, self.table[at].attempt = campaign, number, attempt
                self.table[at].segment = segment
                memcpy(self.table[at].record, start + offset, FRAME + HEAD)
            elif self.table[at].order:
                self.remove(at)
            offset = end

    cdef list in_order(self, int64_t before):
        """The framed records of those in a segment with a number below `before`, oldest first."""
        cdef list found = []
        cdef uint64_t at
        for at in range(self.mask + 1):
            if self.table[at].order and self.table[at].segment < before:
                found.append((self.table[at].order, PyBytes_FromStringAndSize(<const char *>self.table[at].record, FRAME + HEAD)))
        found.sort()
        return [record for _, record in found]

    def records(self):
        """Their fields, as `unpack` gives them, oldest first."""
        return [unpack(record[FRAME:]) for record in self.in_order(INT64_MAX)]

    def before(self, int64_t segment):
        """The framed records of those that stand in a segment with a smaller number."""
        return self.in_order(segment)
