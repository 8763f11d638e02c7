# cython: language_level=3
"""Drives one SmtpProtocol from the callbacks of a transport, TCP or TLS. No asyncio object per message.

Replies are read as they come and become Outcomes in `turn.outcomes`; the turn (one per event-loop iteration, shared by
all sessions of an engine) settles them, fills `room`, writes the journal and only then calls `flush`: content never
leaves before the outcomes and intents of its turn are recorded (R1, R10). Only QUIT on an idle connection is written
outside `flush`, because no message hangs on it.

The clock is CLOCK_MONOTONIC, as in `loop.time()`. `deadline` is data; the engine's timer calls `expire`.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.string cimport memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from ext.smtp_protocol cimport (
    AWAIT_BDAT,
    AWAIT_DOT,
    AWAIT_LONE_DOT,
    PHASE_CONTENT_C,
    PHASE_FINAL_C,
    SLOTS,
    STAGE_CONTENT_C,
    STAGE_DATA_C,
    STAGE_LOST_C,
    STAGE_MAIL_C,
    STAGE_RCPT_C,
    STAGE_UNSENT_C,
    Message,
    Outcome,
    SmtpProtocol,
)

# What a caller of sessions needs besides, under one import; a cimported type cannot be assigned to its own name.
globals().update(
    Message=Message, Outcome=Outcome,
    STAGE_MAIL=STAGE_MAIL_C, STAGE_RCPT=STAGE_RCPT_C, STAGE_DATA=STAGE_DATA_C, STAGE_CONTENT=STAGE_CONTENT_C,
    STAGE_LOST=STAGE_LOST_C, STAGE_UNSENT=STAGE_UNSENT_C,
)

cdef extern from "<sys/socket.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    int MSG_DONTWAIT, MSG_NOSIGNAL
    ssize_t sendmsg(int fd, const msghdr *message, int flags)

cdef double QUIT_TIMEOUT = 10.0  # the server has nothing of ours left when QUIT leaves
cdef double CLOSING_TIMEOUT = 5.0  # after a 421, for replies it may still owe


cdef inline double _now() noexcept:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <double> t.tv_sec + <double> t.tv_nsec * 1e-9


# One for all connections: a read is over before the next one begins.
_read_buffer = bytearray(65536)
_read_view = memoryview(_read_buffer)


@cython.auto_pickle(False)
cdef class _TlsReader:
    """Stands between a TLS transport and its session as a buffered protocol: without one, uvloop maps and unmaps 256 KiB of
    memory for every read of a few decrypted octets."""

    cdef SmtpSession session

    def __init__(self, SmtpSession session not None):
        self.session = session

    def connection_made(self, object transport):
        self.session.connection_made(transport)

    def get_buffer(self, Py_ssize_t hint):
        return _read_view

    def buffer_updated(self, Py_ssize_t count):
        self.session.data_received(bytes(_read_view[:count]))

    def data_received(self, bytes data not None):
        # asyncio's own TLS transport knows buffered protocols by their base class only.
        self.session.data_received(data)

    def eof_received(self):
        return self.session.eof_received()

    def connection_lost(self, object error):
        self.session.connection_lost(error)

    def pause_writing(self):
        self.session.pause_writing()

    def resume_writing(self):
        self.session.resume_writing()


@cython.auto_pickle(False)
cdef class SmtpSession:
    """One SMTP connection after its handshake, as a protocol for an asyncio or uvloop transport (duck typing).

    `turn` needs `outcomes` (a list), `ready(session)` and `closed(session, reason)`. `owner`, `connection_id` and `facts`
    are the caller's and never looked at. `ended`: nothing more comes of it; `graceful`: because of our QUIT, with nothing
    undecided; `violated`: because the peer broke the protocol (R6). Time-outs in seconds: `command_timeout` for the reply to a command and for a peer that stops reading,
    `final_dot_timeout` for the reply after content (RFC 5321 §4.5.3.2).
    """

    def __init__(
        self,
        object turn not None,
        object owner,
        *,
        bint pipelining,
        bint chunking,
        int window=4,
        int max_messages=0,
        double command_timeout=300.0,
        double final_dot_timeout=600.0,
        long connection_id=0,
        object facts=None,
    ):
        self.turn = turn
        self.owner = owner
        self.descriptor = -1
        self.facts = facts
        self.connection_id = connection_id
        self.protocol = SmtpProtocol(pipelining, chunking, window, max_messages)
        self.protocol.session = self
        self.command_timeout = command_timeout
        self.final_dot_timeout = final_dot_timeout

    def __repr__(self):
        state = "ended" if self.ended else f"{self.protocol.started} in flight"
        return f"<SmtpSession {self.connection_id}: {self.protocol.sent} sent, {state}>"

    # --- what the engine may ask --------------------------------------------------------------------------------------

    @property
    def room(self):
        """How many messages would leave at the next flush. 0 while ending, while the peer does not read, or at max_messages."""
        return self.open_room()

    cdef int open_room(self) noexcept:
        return 0 if self.ended or self.paused or self.transport is None else self.protocol._room()

    @property
    def in_flight(self):
        """Messages begun and not decided."""
        return self.protocol.started

    @property
    def sent(self):
        """Messages begun on this connection so far."""
        return self.protocol.sent

    @property
    def idle(self):
        """Open, with nothing held and nothing awaited."""
        return (
            not self.ended and self.transport is not None and self.protocol.count == 0
            and self.protocol.expected_count == 0 and not self.protocol.quitting
        )

    @property
    def closing_reply(self):
        """Text of the 421 the server sent, or empty."""
        return self.protocol.closing_reply

    @property
    def open_window(self):
        """Whole messages that may be in flight now; 1 unless CHUNKING is used and its replies can be told apart."""
        return self.protocol.effective_window()

    # --- what the engine does -----------------------------------------------------------------------------------------

    def start(self, object transport not None):
        """Take over an open transport on which no command is outstanding, and ask the turn for messages."""
        if transport.get_extra_info("sslcontext") is None:
            transport.set_protocol(self)
        else:
            transport.set_protocol(_TlsReader(self))
        self.connection_made(transport)
        if not transport.is_reading():
            transport.resume_reading()

    def submit(self, list messages not None):
        """Take messages, normally at most `room`. Each gets exactly one Outcome: on an ended session STAGE_UNSENT at once."""
        self.take(messages)

    cdef int take(self, list messages) except -1:
        cdef Message m
        if self.ended or self.protocol.fault is not None or self.protocol.quitting:
            for m in messages:
                self.turn.outcomes.append(Outcome.__new__(Outcome, self, m, 0, b"the connection has ended", STAGE_UNSENT_C, False))
            if messages:
                self.turn.ready(self)
            return 0
        for m in messages:
            self.protocol.submit(m)
        return 0

    def flush(self):
        """Write everything that may leave now, as one piece. The only place where message bytes are written."""
        self.turned()

    cdef int turned(self) except -1:
        self.asked = False
        return self._flush()

    cdef int _flush(self) except -1:
        cdef bytes commands
        if self.ended or self.paused or self.transport is None:
            return 0
        if not self.protocol._sendable() or self.transport.is_closing():
            return 0
        commands = self.protocol.commands()
        if commands is None:
            return 0
        self._write(commands)
        self.protocol.contents.clear()
        if self.paused and self.protocol.last_content is not None and self.protocol.last_content.phase == PHASE_FINAL_C:
            # Its last octet is still with us: losing the connection now cannot have delivered it.
            self.protocol.last_content.phase = PHASE_CONTENT_C
        self._arm()
        return 0

    cdef int _write(self, bytes commands) except -1:
        # One system call that takes the contents from where they are. What the socket does not take, the transport keeps and writes
        # later; nothing of ours is in its buffer now, or we would be paused.
        cdef SmtpProtocol p = self.protocol
        cdef iovec[2 * SLOTS + 1] parts
        cdef msghdr message
        cdef Py_ssize_t i, count = 0, at = 0, total = PyBytes_GET_SIZE(commands), sent = 0
        cdef char *start = PyBytes_AS_STRING(commands)
        cdef bytes content
        if self.descriptor >= 0:
            for i in range(len(p.contents)):
                content = <bytes> p.contents[i]
                if p.places[i] > at:
                    parts[count].iov_base, parts[count].iov_len = start + at, p.places[i] - at
                    at = p.places[i]
                    count += 1
                parts[count].iov_base, parts[count].iov_len = PyBytes_AS_STRING(content), PyBytes_GET_SIZE(content)
                count += 1
                total += PyBytes_GET_SIZE(content)
            parts[count].iov_base, parts[count].iov_len = start + at, PyBytes_GET_SIZE(commands) - at
            memset(&message, 0, sizeof(message))
            message.msg_iov, message.msg_iovlen = parts, count + 1
            sent = sendmsg(self.descriptor, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
            if sent == total:
                return 0
        # Whatever is wrong with the socket, the transport finds it, too, and says so.
        self.transport.write(memoryview(p.whole(commands))[sent:] if sent > 0 else p.whole(commands))
        return 0

    cdef int _arm(self) except -1:
        cdef SmtpProtocol p = self.protocol
        cdef double wait
        cdef unsigned char kind
        self.last_activity = _now()
        if self.ended or (p.expected_count == 0 and not self.paused):
            self.deadline = 0.0
            return 0
        wait = self.command_timeout
        if self.paused:
            self.unread = self.transport.get_write_buffer_size()
        elif p.expected_count:
            kind = p.expected[p.expected_head]
            if kind == AWAIT_DOT or kind == AWAIT_BDAT or kind == AWAIT_LONE_DOT:
                wait = self.final_dot_timeout
        if p.closing and wait > CLOSING_TIMEOUT:
            wait = CLOSING_TIMEOUT
        elif p.quitting and p.count == 0 and wait > QUIT_TIMEOUT:
            wait = QUIT_TIMEOUT
        self.deadline = self.last_activity + wait
        return 0

    def quit(self):
        """End gracefully: nothing more is begun, QUIT leaves when what was begun is decided, then the connection closes.

        Messages not begun come back as STAGE_UNSENT. Bounded by `deadline` like everything else.
        """
        if self.ended or self.protocol.quitting:
            return
        self.protocol.quit()
        if self.transport is None:
            self._end("closed before it was used", False)
            return
        if self.protocol.count > self.protocol.started:
            self.protocol.unsend("the connection is being closed", self.turn.outcomes)
            self._ask()
        if self.protocol.count == 0 and not self.protocol.lone_dot_due:
            self._flush()
        if self.protocol.expected_count == 0 and self.protocol.count == 0:
            self._arm()

    def abort(self, str reason not None="closed by us"):
        """Drop the connection now. Undecided messages become STAGE_LOST, in doubt where the final octet had left."""
        if not self.ended:
            self._end(reason, False)

    def expire(self):
        """The engine's timer: does nothing before `deadline`, afterwards drops the connection."""
        if self.ended or self.deadline == 0.0 or _now() < self.deadline:
            return
        if self.protocol.closing:
            self._end(self._closing_reason(), False)
        elif self.paused:
            if self.transport.get_write_buffer_size() < self.unread:
                self._arm()  # it reads, only slowly
                return
            self._end(f"the server read nothing for {self.command_timeout:g} seconds", False)
        elif self.protocol.quitting and self.protocol.count == 0:
            self._end("closed; QUIT was not answered", False)
        else:
            self._end(f"no reply to {self.protocol.awaited()} within {self.deadline - self.last_activity:g} seconds", False)

    # --- callbacks of the transport -----------------------------------------------------------------------------------

    def connection_made(self, object transport):
        """asyncio protocol: the transport is ready."""
        self.transport = transport
        # With the lowest high-water mark the transport says exactly while octets are left with us. TLS transports compare
        # with "at least", so 0 would be said even of an empty buffer.
        if transport.get_extra_info("sslcontext") is None:
            transport.set_write_buffer_limits(0)
            socket = transport.get_extra_info("socket")
            self.descriptor = -1 if socket is None or transport.get_write_buffer_size() else socket.fileno()
        else:
            transport.set_write_buffer_limits(1, 0)
        self.last_activity = _now()
        self._ask()

    def data_received(self, bytes data not None):
        """asyncio protocol: octets arrived."""
        cdef SmtpProtocol p = self.protocol
        cdef list outcomes
        cdef Py_ssize_t before
        cdef long replies
        if self.ended:
            return
        outcomes = self.turn.outcomes
        before = len(outcomes)
        replies = p.replies
        p.feed(data, outcomes)
        if p.fault is not None:
            self._end(f"protocol violation: {p.fault}", True)
            return
        if p.quit_answered:
            self._end("closed", False)
            return
        if p.closing and p.expected_count == 0:
            self._end(self._closing_reason(), False)
            return
        if p.replies != replies:
            # Time-outs run from whole replies: a server that drips octets makes no progress.
            self._arm()
            if p.max_messages > 0 and p.submitted >= p.max_messages and p.count == 0 and not p.quitting:
                p.quit()
            if p.quitting and p.count == 0 and not p.lone_dot_due:
                self._flush()
            if len(outcomes) != before or p._sendable() or p._room() > 0:
                self._ask()

    def eof_received(self):
        """asyncio protocol: the server closed its side."""
        if not self.ended:
            self._end(self._lost_reason("the server closed the connection"), False)
        return False

    def connection_lost(self, object error):
        """asyncio protocol: the transport is gone."""
        if not self.ended:
            self._end(self._lost_reason("the server closed the connection" if error is None else f"connection lost: {error}"), False)
        self.transport = None

    def pause_writing(self):
        """asyncio protocol: octets wait in the transport because the server does not read."""
        self.paused = True

    def resume_writing(self):
        """asyncio protocol: the last octet has left."""
        cdef Message m
        if not self.paused:
            return
        self.paused = False
        if self.ended:
            return
        m = self.protocol.last_content
        if m is not None and m.phase == PHASE_CONTENT_C:
            m.phase = PHASE_FINAL_C
        self._arm()
        self._ask()

    # --- inside -------------------------------------------------------------------------------------------------------

    cdef int _ask(self) except -1:
        # Once per turn: not again until flush.
        if not self.asked:
            self.asked = True
            self.turn.ready(self)
        return 0

    cdef str _closing_reason(self):
        text = self.protocol.closing_reply[:200].decode("utf-8", "replace")
        return f"the server is closing the connection: 421 {text}"

    cdef str _lost_reason(self, str what):
        if self.protocol.closing:
            return self._closing_reason()
        if self.protocol.quitting and self.protocol.count == 0:
            return "closed"
        if self.protocol.expected_count:
            return f"{what} before the reply to {self.protocol.awaited()}"
        return what

    cdef int _end(self, str reason, bint violation) except -1:
        self.ended = True
        self.violated = violation
        self.graceful = self.protocol.quitting and self.protocol.count == 0 and not violation
        self.deadline = 0.0
        transport = self.transport
        self.protocol.lose(reason, violation, self.turn.outcomes)
        self.protocol.session = None  # a cycle the collector need not find
        # Always abort: a TLS transport that is only closed can stay open while its peer goes on sending (uvloop #471),
        # and nothing of ours is left to be written.
        if transport is not None:
            transport.abort()
        self.turn.ready(self)
        self.turn.closed(self, reason)
        return 0
