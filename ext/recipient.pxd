"""Row: filled by `ext.message` for each recipient, read by the operations of `ext.template`."""

from ext.token cimport Signer

cdef object MISSING  # what stands for a value that there is not

cdef enum Held:
    ABSENT   # the data has no such field
    TEXT     # a text whose octets stand as they are, in the data or beside it
    NUMBER   # an integer, likewise
    VALUE    # any other JSON value
    OBJECT   # made already: in `Row.values`

cdef enum Purpose:
    UNSUBSCRIBE, WEB_VIEW, CLICK, OPEN, PURPOSES

cdef struct Slot:
    Held held
    const unsigned char* start
    Py_ssize_t length

cdef struct Known:  # a field name that was met in the data
    const unsigned char* start
    Py_ssize_t length
    int exact, loose   # slots; -1: nobody asks for it

cdef struct Written:
    int prefix, length   # octets of the base URL with its path, and of all; 0: not written yet
    char[704] text


cdef class Names:
    cdef dict exact, loose
    cdef int count

    cdef int slots(self, str name, int* exact, int* loose) except -1


cdef class Row:
    cdef public object decode, decode_value
    cdef public dict shared
    cdef public Signer unsubscribe_signer, web_view_signer, click_signer, open_signer
    cdef readonly object subscriber_id
    cdef Names names
    cdef Slot* slot
    cdef int email_slot, id_slot
    cdef list values, kept
    cdef Known* known
    cdef int known_count, known_room
    cdef dict known_at
    cdef int* expected
    cdef unsigned char* plain   # the texts of this row that have escapes in its data, written out
    cdef Py_ssize_t plain_used, plain_room
    cdef str email
    cdef bytes data
    cdef dict whole, made
    cdef unsigned long long[4] numbers
    cdef Written[4] written

    cdef int read(self, object recipient, str email, bint needs_data) except -1
    cdef int scan(self) except -1
    cdef int unescape(self, Slot* slot) except -1
    cdef int name_of(self, const unsigned char* start, Py_ssize_t length) except -1
    cdef int spread(self) except -1
    cdef int own(self) except -1
    cdef dict subscriber(self)
    cdef object value(self, int number)
    cdef dict scope(self)
    cdef const char* token(self, Purpose purpose, int* length) except NULL
    cdef const char* url(self, Purpose purpose, int* length) except NULL
    cdef object url_text(self, Purpose purpose)
    cdef object token_text(self, Purpose purpose)
