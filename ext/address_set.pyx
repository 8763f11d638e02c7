# cython: language_level=3
"""A set of suppressed addresses and patterns under many scopes: 8 octets for each, asked for every recipient.

Every entry is the keyed 64-bit hash (SipHash-1-3) of its key, plus that of its scope, in one open-addressing table. With a million
entries one address in 10^13 is taken for another's; the hash key is random, so nobody can look for such a pair.

Keys are in lower case: `local@domain`; `@domain` (whoever has an address there); `@*.domain` (at any subdomain); `local@*` (at any
domain). No address looks like one of the last three. A scope is (user, list): (0, 0) the whole system, (user, 0) one user, (user, list) one list.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

cdef extern from *:
    """
    #define ADDRESS_SET_IS_ASCII(text) PyUnicode_IS_ASCII(text)
    """
    bint is_ascii "ADDRESS_SET_IS_ASCII"(object text)

cdef enum:
    LONGEST = 1024  # octets of a key; an address has at most 254, a local part beyond ASCII may grow when it is normalised
    SMALLEST = 1024  # slots


@cython.overflowcheck(False)  # of hashes, bits fall off and sums wrap round
cdef inline uint64_t _rotate(uint64_t x, int by) noexcept nogil:
    return x << by | x >> (64 - by)


@cython.overflowcheck(False)
cdef inline void _round(uint64_t* v) noexcept nogil:
    v[0] += v[1]
    v[1] = _rotate(v[1], 13) ^ v[0]
    v[0] = _rotate(v[0], 32)
    v[2] += v[3]
    v[3] = _rotate(v[3], 16) ^ v[2]
    v[0] += v[3]
    v[3] = _rotate(v[3], 21) ^ v[0]
    v[2] += v[1]
    v[1] = _rotate(v[1], 17) ^ v[2]
    v[2] = _rotate(v[2], 32)


@cython.overflowcheck(False)
cdef uint64_t _siphash(uint64_t k0, uint64_t k1, const char* data, Py_ssize_t length) noexcept nogil:
    """SipHash-1-3 of `length` octets."""
    cdef uint64_t[4] v
    cdef uint64_t word
    cdef Py_ssize_t at = 0
    v[0] = k0 ^ <uint64_t>0x736f6d6570736575
    v[1] = k1 ^ <uint64_t>0x646f72616e646f6d
    v[2] = k0 ^ <uint64_t>0x6c7967656e657261
    v[3] = k1 ^ <uint64_t>0x7465646279746573
    while length - at >= 8:
        memcpy(&word, data + at, 8)
        v[3] ^= word
        _round(v)
        v[0] ^= word
        at += 8
    word = 0
    memcpy(&word, data + at, length - at)
    word |= <uint64_t>(length & 0xFF) << 56
    v[3] ^= word
    _round(v)
    v[0] ^= word
    v[2] ^= 0xFF
    _round(v)
    _round(v)
    _round(v)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


@cython.overflowcheck(False)
cdef inline uint64_t _big_endian(const uint8_t* data, int octets) noexcept nogil:
    cdef uint64_t value = 0
    cdef int i
    for i in range(octets):
        value = value << 8 | data[i]
    return value


cdef inline int _form(const char* key, Py_ssize_t length) noexcept nogil:
    """0: one address; 1: `@domain`; 2: `local@*`; 3: `@*.domain`."""
    if length > 2 and key[0] == c"@":
        return 3 if key[1] == c"*" else 1
    if length > 2 and key[length - 1] == c"*" and key[length - 2] == c"@":
        return 2
    return 0


@cython.final
cdef class AddressSet:
    """`seed` is 16 random octets; `key_of` gives the key of an address beyond ASCII (ASCII ones are put into lower case here)."""

    cdef uint64_t* slots
    cdef Py_ssize_t mask, used
    cdef uint64_t k0, k1
    cdef Py_ssize_t[4] forms  # how many entries there are of each form: a form nobody uses is not looked up
    cdef dict scopes  # hash of the scope -> its entries; an empty scope is not looked up
    cdef object key_of
    cdef bytes carry  # of the COPY that is being read
    cdef bint begun

    def __cinit__(self, bytes seed not None, object key_of):
        if len(seed) != 16:
            raise ValueError(f"the seed has 16 octets, got {len(seed)}")
        memcpy(&self.k0, <const char*>seed, 8)
        memcpy(&self.k1, <const char*>seed + 8, 8)
        self.key_of = key_of
        self.scopes = {}
        self.carry = b""
        self.slots = <uint64_t*>calloc(SMALLEST, sizeof(uint64_t))
        if self.slots is NULL:
            raise MemoryError()
        self.mask = SMALLEST - 1

    def __dealloc__(self):
        free(self.slots)

    def __len__(self):
        """Entries of all scopes."""
        return self.used

    @property
    def table_bytes(self):
        """Octets the table takes."""
        return (self.mask + 1) * sizeof(uint64_t)

    # --- the table: linear probing from the low bits; 0 is an empty slot ------------------------------------------------------
    cdef uint64_t _scope(self, long long user_id, long long list_id) noexcept nogil:
        cdef long long[2] pair
        pair[0] = user_id
        pair[1] = list_id
        return _siphash(self.k1, self.k0, <const char*>pair, 16)

    cdef inline Py_ssize_t _find(self, uint64_t hash) noexcept nogil:
        """The slot that holds `hash`, or the empty one where it belongs."""
        cdef Py_ssize_t at = <Py_ssize_t>(hash & <uint64_t>self.mask)
        while self.slots[at] != 0 and self.slots[at] != hash:
            at = (at + 1) & self.mask
        return at

    cdef inline bint _holds(self, uint64_t hash) noexcept nogil:
        return self.slots[self._find(hash if hash else 1)] != 0

    cdef int _grow(self) except -1:
        cdef uint64_t* old = self.slots
        cdef Py_ssize_t size = self.mask + 1, at
        cdef uint64_t* wider = <uint64_t*>calloc(2 * size, sizeof(uint64_t))
        if wider is NULL:
            raise MemoryError()
        self.slots = wider
        self.mask = 2 * size - 1
        for at in range(size):
            if old[at]:
                self.slots[self._find(old[at])] = old[at]
        free(old)
        return 0

    @cython.overflowcheck(False)
    cdef bint _add(self, long long user_id, long long list_id, const char* key, Py_ssize_t length) except -1:
        cdef uint64_t scope = self._scope(user_id, list_id)
        cdef uint64_t hash = _siphash(self.k0, self.k1, key, length) + scope
        cdef Py_ssize_t at
        if not hash:
            hash = 1
        if 10 * (self.used + 1) > 7 * (self.mask + 1):
            self._grow()
        at = self._find(hash)
        if self.slots[at]:
            return False
        self.slots[at] = hash
        self.used += 1
        self.forms[_form(key, length)] += 1
        self.scopes[scope] = self.scopes.get(scope, 0) + 1
        return True

    @cython.overflowcheck(False)
    cdef bint _discard(self, long long user_id, long long list_id, const char* key, Py_ssize_t length) except -1:
        cdef uint64_t scope = self._scope(user_id, list_id)
        cdef uint64_t hash = _siphash(self.k0, self.k1, key, length) + scope
        cdef Py_ssize_t hole, at, home
        if not hash:
            hash = 1
        hole = self._find(hash)
        if not self.slots[hole]:
            return False
        at = hole
        while True:  # whoever was pushed on by the entry that goes moves up, so that no search ends at the hole
            at = (at + 1) & self.mask
            if not self.slots[at]:
                break
            home = <Py_ssize_t>(self.slots[at] & <uint64_t>self.mask)
            if (at - home) & self.mask >= (at - hole) & self.mask:
                self.slots[hole] = self.slots[at]
                hole = at
        self.slots[hole] = 0
        self.used -= 1
        self.forms[_form(key, length)] -= 1
        if self.scopes[scope] == 1:
            del self.scopes[scope]
        else:
            self.scopes[scope] -= 1
        return True

    # --- changes -----------------------------------------------------------------------------------------------------------------
    def add(self, long long user_id, long long list_id, str key not None) -> bool:
        """Add an entry; tells whether it is new."""
        cdef Py_ssize_t length
        cdef const char* text = PyUnicode_AsUTF8AndSize(key, &length)
        return self._add(user_id, list_id, text, length)

    def discard(self, long long user_id, long long list_id, str key not None) -> bool:
        """Take an entry out; tells whether it was there."""
        cdef Py_ssize_t length
        cdef const char* text = PyUnicode_AsUTF8AndSize(key, &length)
        return self._discard(user_id, list_id, text, length)

    def begin_copy(self) -> None:
        """Expect a COPY from its first octet."""
        self.carry = b""
        self.begun = False

    def feed_copy(self, bytes block not None) -> None:
        """Read a part of a PostgreSQL COPY in binary form, cut anywhere, of (user bigint, list bigint, removed boolean, key text).

        Raises ValueError on anything else.
        """
        cdef bytes data = self.carry + block if self.carry else block
        cdef const uint8_t* octets = <const uint8_t*>PyBytes_AS_STRING(data)
        cdef Py_ssize_t at = 0, end = PyBytes_GET_SIZE(data), length
        cdef long long user_id, list_id
        cdef bint removed
        if not self.begun:
            if end < 19:
                self.carry = data
                return
            if data[:11] != b"PGCOPY\n\xff\r\n\x00":
                raise ValueError("not a COPY in binary form")
            at = 19 + <Py_ssize_t>_big_endian(octets + 15, 4)
            self.begun = True
        while at + 2 <= end:
            if octets[at] == 0xFF and octets[at + 1] == 0xFF:
                at = end
                break
            # 2 octets count the fields; each has 4 of length in front: 2 + 12 + 12 + 5 + 4
            if at + 35 > end:
                break
            length = <Py_ssize_t>_big_endian(octets + at + 31, 4)
            if (
                _big_endian(octets + at, 2) != 4
                or _big_endian(octets + at + 2, 4) != 8
                or _big_endian(octets + at + 14, 4) != 8
                or _big_endian(octets + at + 26, 4) != 1
                or length > 1 << 20
            ):
                raise ValueError("the COPY does not have the columns user, list, removed, key")
            if at + 35 + length > end:
                break
            removed = octets[at + 30]
            user_id, list_id = <long long>_big_endian(octets + at + 6, 8), <long long>_big_endian(octets + at + 18, 8)
            if removed:
                self._discard(user_id, list_id, <const char*>(octets + at + 35), length)
            else:
                self._add(user_id, list_id, <const char*>(octets + at + 35), length)
            at += 35 + length
        self.carry = data[at:end]

    # --- questions ---------------------------------------------------------------------------------------------------------------
    def suppressed(self, long long user_id, long long list_id, list recipients not None, list indexes not None) -> list:
        """Those of `indexes` whose `recipients[index].email` this user may not mail on this list, in order."""
        cdef uint64_t[3] scopes
        cdef int count = 0, i
        cdef long long[6] pairs
        cdef uint64_t scope
        cdef list found = []
        if not self.used:
            return found
        pairs[0], pairs[1], pairs[2], pairs[3], pairs[4], pairs[5] = 0, 0, user_id, 0, user_id, list_id
        for i in range(3):
            scope = self._scope(pairs[2 * i], pairs[2 * i + 1])
            if scope in self.scopes:
                scopes[count] = scope
                count += 1
        if count:
            for index in indexes:
                if self._covered(scopes, count, recipients[index].email):
                    found.append(index)
        return found

    cdef bint _covered(self, const uint64_t* scopes, int count, str email) except -1:
        cdef char[LONGEST] key
        cdef Py_ssize_t length, at, dot
        cdef const char* text
        cdef char held
        cdef int i
        if not is_ascii(email):
            email = self.key_of(email)
        text = PyUnicode_AsUTF8AndSize(email, &length)
        if length >= LONGEST:
            return False  # no such key is ever kept
        at = -1
        for i in range(length):
            held = text[i]
            if c"A" <= held <= c"Z":
                held += 32
            elif held == c"@":
                at = i
            key[i] = held
        if self._any(scopes, count, key, length):
            return True
        if at < 0:
            return False
        if self.forms[1] and self._any(scopes, count, key + at, length - at):
            return True
        if self.forms[2]:
            held = key[at + 1]
            key[at + 1] = c"*"
            if self._any(scopes, count, key, at + 2):
                return True
            key[at + 1] = held
        if self.forms[3]:
            for dot in range(at + 2, length):
                if key[dot] == c".":  # the two octets before it are used up: `@*.domain`
                    key[dot - 2], key[dot - 1] = c"@", c"*"
                    if self._any(scopes, count, key + dot - 2, length - dot + 2):
                        return True
        return False

    @cython.overflowcheck(False)
    cdef inline bint _any(self, const uint64_t* scopes, int count, const char* key, Py_ssize_t length) noexcept nogil:
        cdef uint64_t hash = _siphash(self.k0, self.k1, key, length)
        cdef int i
        for i in range(count):
            if self._holds(hash + scopes[i]):
                return True
        return False
