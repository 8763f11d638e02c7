"""Signed tokens: numbers as varints and a cut HMAC-SHA256 over them, in base64url or lower-case base32.

The fast twin of `domain.links.token` and `domain.return_path.token`, which say what a token is and read it back.
"""

cimport cython

from ext.digest cimport hmac_key, hmac_short

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
        hmac_short(&self.key, data, length, data + length)
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
