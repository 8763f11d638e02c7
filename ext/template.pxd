"""Program: what `ext.message` calls for each recipient."""

from ext.body cimport Wire
from ext.recipient cimport Row


cdef class Program


cdef class Frame:
    cdef Wire* wire
    cdef list pieces, scopes, loops
    cdef dict globals, locals, counters
    cdef object context
    cdef Program program
    cdef Row row   # None: the variables are in `globals`
    cdef Py_ssize_t steps, passes, written, limit

    cdef int count(self, Py_ssize_t steps) except -1
    cdef int count_loop(self, Py_ssize_t passes) except -1
    cdef dict variables(self)
    cdef dict common(self)
    cdef object foreign(self)
    cdef int push(self, dict namespace, object loop) except -1
    cdef int pop(self, object loop) except -1
    cdef object lookup(self, str name)
    cdef int write(self, object text, bint escape) except -1
    cdef int within(self) except -1


cdef class Operation:
    cdef public Py_ssize_t at   # where it stands in the source, for errors; -1: nowhere

    cdef int run(self, Frame frame) except -1


cdef class Block(Operation):
    cdef list operations


cdef class Program:
    cdef Block block
    cdef object make_context
    cdef readonly Py_ssize_t at   # where the last rendering stood when it failed
    cdef Frame frame  # the last one, to be used again

    cdef Frame start(self, dict scope, Row row)
    cdef int write(self, Row row, Wire* wire) except -1
    cdef str text_of(self, Row row)
    cpdef str render(self, dict scope)
    cdef str collect(self, Frame frame)
