"""Signer and Sealer: what `ext.recipient` and `ext.template` call for each recipient."""

from ext.body cimport Wire
from ext.digest cimport HmacKey


cdef class Signer:
    cdef HmacKey key
    cdef bint base32
    cdef int mac_octets

    cdef int write(self, const unsigned long long* numbers, int count, char* out) except -1


cdef class Sealer:
    cdef HmacKey key
    cdef bytes prefix, part
    cdef bint untouched

    cdef int write(self, Wire* wire, const char* token, int size, str text) except -1
    cdef int seal(self, Wire* wire, const char* token, int size, str url) except -1
    cdef int put(self, Wire* wire, const char* token, int size, const unsigned char* url, Py_ssize_t length) except -1
