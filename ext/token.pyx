"""Signed tokens: numbers as varints and a cut HMAC-SHA256 over them, in base64url or lower-case base32; and sealed addresses.

The fast twin of `domain.links.token`, `domain.links.seal_destination` and `domain.return_path.token`, which say what they are and read
them back.
"""

cimport cython

from libc.string cimport memcpy, strncmp

from ext.body cimport Wire, put_plain, put_text, utf8
from ext.digest cimport hmac_key, hmac_text

cdef const char* BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
cdef const char* BASE32 = b"abcdefghijklmnopqrstuvwxyz234567"


@cython.final
cdef class Signer:
    """Signs with one key. `mac_octets` (10 to 32) of the MAC are kept. `plain`: without the processor's own instructions."""

    def __cinit__(self, bytes key not None, int mac_octets, *, bint base32=False, bint plain=False):
        if not 16 <= len(key) <= 64:
            raise ValueError(f"a key has 16 to 64 octets, got {len(key)}")
        if not 10 <= mac_octets <= 32:
            raise ValueError(f"10 to 32 octets of a MAC are kept, got {mac_octets}")
        hmac_key(&self.key, <const unsigned char*>key, len(key), plain)
        self.mac_octets = mac_octets
        self.base32 = base32

    cdef int write(self, const unsigned long long* numbers, int count, char* out) except -1:
        """Write the token for `count` <= 4 numbers to `out` (128 octets: 40 of numbers and 32 of MAC make 116 in base32); returns its length."""
        cdef unsigned char[96] data
        cdef unsigned long long number
        cdef int length = 0, at, bits = 0, width = 5 if self.base32 else 6, written = 0
        cdef unsigned int held = 0
        cdef const char* alphabet = BASE32 if self.base32 else BASE64
        for at in range(count):
            number = numbers[at]
            while number > 0x7F:
                data[length] = <unsigned char>(number & 0x7F | 0x80)
                length += 1
                number >>= 7
            data[length] = <unsigned char>number
            length += 1
        hmac_text(&self.key, data, length, data + length)
        length += self.mac_octets
        for at in range(length):
            held = (held << 8 | data[at]) & 0xFFFFF
            bits += 8
            while bits >= width:
                bits -= width
                out[written] = alphabet[held >> bits & ((1 << width) - 1)]
                written += 1
        if bits:
            out[written] = alphabet[held << (width - bits) & ((1 << width) - 1)]
            written += 1
        return written

    def sign(self, *numbers) -> str:
        """The token for one to four numbers, 0 <= number < 2**64."""
        cdef unsigned long long[4] values
        cdef char[128] out
        cdef int count = 0
        if not 1 <= len(numbers) <= 4:
            raise ValueError(f"a token holds one to four numbers, got {len(numbers)}")
        for number in numbers:
            values[count] = number
            count += 1
        return out[:self.write(values, count, out)].decode("ascii")


cdef enum:
    MOST_WHOLE = 2000   # characters of an address before anything is added to it, as in compose.link_rewriting
    MOST_URL = 3000     # with its utm parameters; sealed it stays below domain.links.MAX_DESTINATION_CHARACTERS
    SEAL_OCTETS = 16    # as domain.links.MAC_BYTES

cdef unsigned char[256] IN_URL  # 1: may stand in a host name, 2: behind it


cdef int _fill_table() except -1:
    cdef int octet
    for octet in range(256):
        IN_URL[octet] = 0
    for octet in b"ABCDEFGHIJKLMNOPQRSTUVWXYZ!#$%&'()*+,/:;=?@[]~":
        IN_URL[octet] = 2
    for octet in b"abcdefghijklmnopqrstuvwxyz0123456789._-":
        IN_URL[octet] = 3
    return 0


_fill_table()


cdef bint _stands(const unsigned char* text, Py_ssize_t length) noexcept:
    """Tell whether an address is surely whole and followed as it is: http or https, a plain host, no octet to be encoded."""
    cdef Py_ssize_t at, start
    cdef bint secure
    if length < 8 or strncmp(<const char*>text, b"http", 4):
        return False
    secure = text[4] == 115
    at = 4 + secure
    if length < at + 4 or text[at] != 58 or text[at + 1] != 47 or text[at + 2] != 47:
        return False
    at += 3
    start = at
    while at < length and IN_URL[text[at]] & 1:
        at += 1
    if at == start:
        return False
    if at < length and text[at] == 58:
        at += 1
        start = at
        while at < length and 48 <= text[at] <= 57 and at - start < 4:
            at += 1
        if at == start or text[start] == 48:
            return False
    if at < length and text[at] != 47 and text[at] != 63 and text[at] != 35:
        return False
    while at < length:
        if not IN_URL[text[at]]:
            return False
        at += 1
    return True


@cython.final
cdef class Sealer:
    """Writes the followed link to an address: `prefix`, the recipient's token, `part`, and the address, signed together with both.

    `untouched`: addresses get nothing added, so one that `write` knows for good needs no look by anybody else.
    """

    def __cinit__(self, bytes key not None, bytes prefix not None, bytes part not None, bint untouched):
        if not 16 <= len(key) <= 64:
            raise ValueError(f"a key has 16 to 64 octets, got {len(key)}")
        if len(part) > 16:
            raise ValueError(f"a link part has at most 16 octets, got {len(part)}")
        hmac_key(&self.key, <const unsigned char*>key, len(key), False)
        self.prefix = prefix
        self.part = part
        self.untouched = untouched

    cdef int write(self, Wire* wire, const char* token, int size, str text) except -1:
        """Write the link for an address as it stands in an attribute, where `&` is `&amp;`. False: somebody else has to judge it."""
        cdef unsigned char[MOST_URL] url
        cdef Py_ssize_t length, at = 0, taken = 0
        cdef const unsigned char* source
        if not self.untouched or not text.isascii() or len(text) > MOST_WHOLE:
            return False
        source = utf8(text, &length)
        while at < length:
            url[taken] = source[at]
            if source[at] == 38:
                if strncmp(<const char*>source + at, b"&amp;", 5):
                    return False
                at += 4
            at += 1
            taken += 1
        if not _stands(url, taken):
            return False
        self.put(wire, token, size, url, taken)
        return True

    cdef int seal(self, Wire* wire, const char* token, int size, str url) except -1:
        """Write the link for an address of at most 3,000 ASCII characters that has been judged."""
        cdef Py_ssize_t length
        cdef const unsigned char* source = utf8(url, &length)
        if length > MOST_URL or not url.isascii():
            raise ValueError("an address to be sealed has at most 3,000 ASCII characters")
        return self.put(wire, token, size, source, length)

    cdef int put(self, Wire* wire, const char* token, int size, const unsigned char* url, Py_ssize_t length) except -1:
        cdef unsigned char[MOST_URL + 176] data  # token and part of at most 144 octets, "/", the address; later MAC and address
        cdef unsigned char[MOST_URL * 2] out
        cdef unsigned char[32] mac
        cdef Py_ssize_t part = len(self.part), at, written = 0
        cdef unsigned int held = 0
        cdef int bits = 0
        if size > 128:
            raise ValueError("a token has at most 128 characters")
        memcpy(data, token, size)
        memcpy(data + size, <const char*>self.part, part)
        data[size + part] = 47
        memcpy(data + size + part + 1, url, length)
        put_text(wire, <const unsigned char*>self.prefix, len(self.prefix), False)
        put_plain(wire, data, size + part)
        put_text(wire, data + size + part, 1, False)
        hmac_text(&self.key, data, size + part + 1 + length, mac)
        memcpy(data, mac, SEAL_OCTETS)
        memcpy(data + SEAL_OCTETS, url, length)
        length += SEAL_OCTETS
        for at in range(length):
            held = (held << 8 | data[at]) & 0xFFFFF
            bits += 8
            while bits >= 6:
                bits -= 6
                out[written] = BASE64[held >> bits & 63]
                written += 1
        if bits:
            out[written] = BASE64[held << (6 - bits) & 63]
            written += 1
        return put_plain(wire, out, written)
