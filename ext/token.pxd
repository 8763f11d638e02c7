"""Signer: what `ext.template` calls for each recipient."""

from ext.digest cimport HmacKey


cdef class Signer:
    cdef HmacKey key
    cdef bint base32
    cdef int mac_octets

    cdef int write(self, const unsigned long long* numbers, int count, char* out) except -1
