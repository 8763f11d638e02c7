"""A growing buffer of text lines, and numbers and instants written into it: held by the modules that turn records into lines.

`reserve` makes room for a whole line at once; what writes into the line after that checks nothing.
"""

from cpython.mem cimport PyMem_Malloc, PyMem_Realloc
from libc.stdint cimport int64_t
from libc.string cimport memcpy

cdef extern from *:
    """
    #ifndef SLUICE_TEXT_OUTPUT
    #define SLUICE_TEXT_OUTPUT
    /* 9999-12-31 23:59:59.999999: the last instant that PostgreSQL and a four-digit year can both show */
    #define SLUICE_LAST_MICROSECOND INT64_C(253402300799999999)
    #endif
    """
    int64_t SLUICE_LAST_MICROSECOND


cdef struct Output:
    char *start
    Py_ssize_t used
    Py_ssize_t size


cdef inline int start_output(Output *out, Py_ssize_t expected) except -1:
    out.used = 0
    out.size = expected
    out.start = <char *>PyMem_Malloc(expected)
    if out.start == NULL:
        raise MemoryError
    return 0


cdef inline int reserve(Output *out, Py_ssize_t more) except -1:
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


cdef inline void put_int(Output *out, int64_t value) noexcept nogil:
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


cdef inline void put_day_and_time(char *into, int year, int month, int day, int hour, int minute, int second) noexcept nogil:
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
