"""The header functions that `ext.message` calls for each recipient."""

from ext.body cimport Wire

cdef int put_unstructured(Wire* wire, bytes name, str text) except -1
cpdef bytes unstructured(bytes name, str text)
cpdef bytes mailbox(bytes name, str display, bytes address)
cpdef check(str text)
