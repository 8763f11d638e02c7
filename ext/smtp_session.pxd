# What the C level of smtp_session shows to turn_steps; the words are explained in smtp_session.pyx.

from ext.smtp_protocol cimport SmtpProtocol


cdef class SmtpSession:
    cdef readonly object turn
    cdef readonly object owner
    cdef readonly object facts
    cdef readonly long connection_id
    cdef readonly SmtpProtocol protocol
    cdef readonly object transport
    cdef readonly double deadline
    cdef readonly double last_activity
    cdef readonly double command_timeout
    cdef readonly double final_dot_timeout
    cdef readonly bint paused
    cdef readonly bint ended
    cdef readonly bint graceful
    cdef readonly bint violated
    cdef int descriptor  # of a plain TCP transport, to write without it; -1: only the transport may write
    cdef bint asked
    cdef Py_ssize_t unread
    cdef object __weakref__

    cdef int open_room(self) noexcept
    cdef int take(self, list messages) except -1
    cdef int turned(self) except -1
    cdef int _flush(self) except -1
    cdef int _write(self, bytes commands) except -1
    cdef int _arm(self) except -1
    cdef int _ask(self) except -1
    cdef str _closing_reason(self)
    cdef str _lost_reason(self, str what)
    cdef int _end(self, str reason, bint violation) except -1
