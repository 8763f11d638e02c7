# What all connections of the sink share: counters, kept messages, seen duplicates, the accepted log. Included by sink_protocol.pyx.


@cython.final
cdef class DomainCount:
    """What one recipient domain was answered: recipients accepted, deferred (4xx), refused (5xx), and lost to a script."""

    cdef readonly str name
    cdef readonly object answer
    cdef readonly uint64_t accepted, deferred, refused, dropped

    def __cinit__(self, str name, object answer):
        self.name = name
        self.answer = answer


@cython.final
@cython.freelist(64)
cdef class Kept:
    """One message the sink keeps: envelope, session and source. `at` is seconds since 1970."""

    cdef readonly uint64_t number
    cdef readonly bytes mail_from
    cdef readonly list recipients
    cdef readonly double at
    cdef readonly object session
    cdef readonly Py_ssize_t size
    cdef public object summary
    cdef bytes owner
    cdef Py_ssize_t start
    cdef bint stuffed

    @property
    def source(self) -> bytes:
        """The message as its author meant it: CRLF lines, transparency dots removed (RFC 5321 §4.5.2)."""
        cdef bytes raw = self.owner[self.start:self.start + self.size]
        if not self.stuffed:
            return raw
        if raw.startswith(b"."):
            raw = raw[1:]
        return raw.replace(b"\r\n.", b"\r\n")


@cython.final
cdef class Session:
    """What is known of one connection; shared by the messages that came over it."""

    cdef readonly str client, helo, user, tls
    cdef readonly bint extended

    def __cinit__(self, str client, str helo, bint extended, str tls, str user):
        self.client = client
        self.helo = helo
        self.extended = extended
        self.tls = tls
        self.user = user


cdef class Sink:
    """Options, counters, the ring of kept messages, the set of seen (Message-ID, recipient) and the accepted log.

    `options` is a `bench.sink.SinkOptions`; `script` a `bench.sink_script.Script`; `loop` the running event loop;
    `upgrade(protocol)` must start a TLS handshake and then call `protocol.secured(transport, description)` or `protocol.abandon()`;
    `write_log(bytes)` takes lines of the accepted log.
    """

    cdef readonly object options, script, loop
    cdef object upgrade, write_log
    cdef readonly uint64_t connections_total, connections_now, connections_max, connections_refused
    cdef readonly uint64_t messages, recipients, bytes, accepted_lines
    cdef readonly uint64_t deferred, refused, dropped, hung
    cdef readonly uint64_t duplicates, duplicates_untracked, without_message_id
    cdef readonly uint64_t bare_newlines, long_lines, nul_octets, undeclared_8bit, protocol_errors, reads
    cdef readonly dict replies, domains
    cdef readonly uint64_t tick
    cdef set protocols
    cdef DomainCount other
    cdef bint pipelining, chunking, eightbit, smtputf8, size_on, starttls, auth_on, vrfy, allow_bare, require_auth, require_tls, track
    cdef bint log_on, log_first, connection_rules, sender_rules, recipient_rules
    cdef dict users
    cdef Py_ssize_t max_connections, max_size, max_recipients, max_messages
    cdef double delay
    cdef list ring
    cdef Py_ssize_t ring_size, ring_next, ring_bytes, ring_limit, ring_oldest
    cdef uint64_t *seen
    cdef uint64_t seen_size, seen_used, seen_limit
    cdef char *log
    cdef Py_ssize_t log_length, log_room
    cdef uint64_t log_second
    cdef char log_stamp[32]
    cdef object delayed, delay_handle
    cdef uint32_t *prefixes
    cdef int prefix_count

    def __cinit__(self):
        self.log_room = FLUSH_BYTES + 65536
        self.log = <char *>malloc(self.log_room)
        self.prefixes = <uint32_t *>calloc(512, sizeof(uint32_t))
        if self.log == NULL or self.prefixes == NULL:
            raise MemoryError()

    def __dealloc__(self):
        free(self.seen)
        free(self.log)
        free(self.prefixes)

    def __init__(self, object options not None, object script not None, object loop not None, object upgrade, object write_log, tuple prefixes not None):
        from collections import deque

        self.options = options
        self.script = script
        self.loop = loop
        self.upgrade = upgrade
        self.write_log = write_log
        self.log_on = write_log is not None
        self.log_first = options.accepted_before_reply
        self.pipelining = options.pipelining
        self.chunking = options.chunking
        self.eightbit = options.eightbitmime
        self.smtputf8 = options.smtputf8
        self.size_on = options.size
        self.starttls = options.starttls
        self.auth_on = options.auth
        self.allow_bare = options.allow_bare_newlines
        self.users = dict(options.users)
        self.require_auth = bool(self.users)
        self.require_tls = options.require_tls
        self.track = options.track_duplicates
        self.max_connections = options.max_connections
        self.max_size = options.max_message_bytes
        self.max_recipients = options.max_recipients
        self.max_messages = options.max_messages_per_connection
        self.delay = options.reply_delay_ms / 1000.0
        self.seen_limit = options.max_tracked
        self.ring_size = options.keep
        self.ring_limit = options.keep_bytes
        self.protocols = set()
        self.delayed = deque()
        cdef bytes prefix
        for prefix in sorted(set(prefixes))[:512]:
            self.prefixes[self.prefix_count] = key3(PyBytes_AS_STRING(prefix))
            self.prefix_count += 1
        self.rules_changed()
        self.reset()

    def rules_changed(self) -> None:
        """To be called after `script.set_rules`: which stages have rules is kept here, so that most messages never ask."""
        self.connection_rules = self.script.has_connection_rules
        self.sender_rules = self.script.has_sender_rules
        self.recipient_rules = self.script.has_recipient_rules

    def reset(self) -> None:
        """Every counter to zero; kept messages, seen duplicates and the script's memory forgotten. Open connections stay."""
        self.connections_total = self.connections_max = self.connections_now
        self.connections_refused = 0
        self.messages = self.recipients = self.bytes = self.accepted_lines = 0
        self.deferred = self.refused = self.dropped = self.hung = 0
        self.duplicates = self.duplicates_untracked = self.without_message_id = 0
        self.bare_newlines = self.long_lines = self.nul_octets = self.undeclared_8bit = self.protocol_errors = self.reads = 0
        self.replies = {}
        self.domains = {}
        self.other = DomainCount("(other)", None)
        free(self.seen)
        self.seen = NULL
        self.seen_size = self.seen_used = 0
        self.script.forget()
        self.clear()

    def clear(self) -> None:
        """Forget the kept messages; counters stay."""
        self.ring = [None] * self.ring_size
        self.ring_next = self.ring_bytes = self.ring_oldest = 0

    def new_protocol(self):
        """The factory for `loop.create_server`."""
        return SinkProtocol(self)

    def kept(self) -> list[Kept]:
        """The kept messages, newest first."""
        cdef Py_ssize_t i
        cdef list found = []
        for i in range(self.ring_next - 1, self.ring_oldest - 1, -1):
            found.append(self.ring[i % self.ring_size])
        return found

    def find(self, uint64_t number) -> Kept | None:
        """The kept message of that number, while it is still kept."""
        cdef Kept one
        for one in self.kept():
            if one.number == number:
                return one
        return None

    def open_protocols(self) -> list:
        """Every open connection, for shutdown and the idle sweep."""
        return list(self.protocols)

    def sweep(self, uint64_t idle_ticks) -> int:
        """One tick of the idle clock: close what was silent for `idle_ticks`; returns how many."""
        cdef int closed = 0
        self.tick += 1
        for one in list(self.protocols):
            if self.tick - one.active > idle_ticks:
                one.goodbye(b"421 4.4.2 Idle for too long\r\n")
                closed += 1
        return closed

    def flush_log(self) -> None:
        """Hand the buffered lines of the accepted log to `write_log`."""
        if self.log_length:
            lines = PyBytes_FromStringAndSize(self.log, self.log_length)
            self.log_length = 0
            self.write_log(lines)

    @property
    def tracked(self) -> int:
        """Entries in the set of seen (Message-ID, recipient)."""
        return self.seen_used

    cdef DomainCount domain(self, bytes name):
        cdef object found = self.domains.get(name)
        if found is not None:
            return <DomainCount>found
        answer = self.token(PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name), c".")
        if len(self.domains) < MAX_DOMAINS:
            found = DomainCount(name.decode("utf-8", "replace"), answer)
            self.domains[name] = found
            return <DomainCount>found
        if answer is None:
            return self.other
        return DomainCount("(other)", answer)

    cdef object token(self, const char *p, Py_ssize_t n, char stop):
        """What the word at `p`, which ends at the first `stop`, asks for if it is a token; else None. Three octets tell most apart."""
        cdef uint32_t key
        cdef int low = 0, high = self.prefix_count, middle
        cdef Py_ssize_t length = 3
        if n < 3:
            return None
        key = key3(p)
        while low < high:
            middle = (low + high) >> 1
            if self.prefixes[middle] < key:
                low = middle + 1
            else:
                high = middle
        if low == self.prefix_count or self.prefixes[low] != key:
            return None
        while length < n and p[length] != stop:
            length += 1
        return self.script.token(p[:length].lower())

    cdef int remember(self, uint64_t h) except -1:
        """1 if the hash was seen before, else 0; it is remembered unless the table may not grow any more."""
        cdef uint64_t i, j, size
        cdef uint64_t *grown
        if h == 0:
            h = 1
        if self.seen_used * 2 >= self.seen_size and self.seen_used < self.seen_limit:
            size = self.seen_size * 2 if self.seen_size else 65536
            grown = <uint64_t *>calloc(size, 8)
            if grown == NULL:
                raise MemoryError()
            for i in range(self.seen_size):
                if self.seen[i]:
                    j = self.seen[i] & (size - 1)
                    while grown[j]:
                        j = (j + 1) & (size - 1)
                    grown[j] = self.seen[i]
            free(self.seen)
            self.seen = grown
            self.seen_size = size
        if self.seen_size == 0:
            self.duplicates_untracked += 1
            return 0
        i = h & (self.seen_size - 1)
        while self.seen[i]:
            if self.seen[i] == h:
                return 1
            i = (i + 1) & (self.seen_size - 1)
        if self.seen_used >= self.seen_limit:
            self.duplicates_untracked += 1
            return 0
        self.seen[i] = h
        self.seen_used += 1
        return 0

    cdef int log_line(self, const char *mid, Py_ssize_t mid_length, bytes recipient, timespec *now) except -1:
        """One JSON line. Plain ASCII is copied, all else goes through the json module."""
        cdef Py_ssize_t n = PyBytes_GET_SIZE(recipient)
        cdef uint64_t micro = <uint64_t>now.tv_nsec // 1000
        cdef char *at
        cdef int i
        if <uint64_t>now.tv_sec != self.log_second:
            self.log_second = <uint64_t>now.tv_sec
            from datetime import UTC, datetime

            stamp = datetime.fromtimestamp(now.tv_sec, UTC).strftime("%Y-%m-%dT%H:%M:%S").encode()
            memcpy(self.log_stamp, PyBytes_AS_STRING(stamp), 19)
        if n + mid_length > 32768 or not plain(mid, mid_length) or not plain(PyBytes_AS_STRING(recipient), n):
            names = [text.decode("utf-8", "replace") for text in (mid[:mid_length], recipient)]
            stamp = (self.log_stamp[:19]).decode() + ".%06dZ" % micro
            line = json.dumps({"message_id": names[0], "recipient": names[1], "at": stamp}).encode() + b"\n"
            self.flush_log()
            self.write_log(line)
        else:
            at = self.log + self.log_length
            at = put(at, b'{"message_id":"', 15)
            at = put(at, mid, mid_length)
            at = put(at, b'","recipient":"', 15)
            at = put(at, PyBytes_AS_STRING(recipient), n)
            at = put(at, b'","at":"', 8)
            at = put(at, self.log_stamp, 19)
            at[0] = c"."
            for i in range(6, 0, -1):
                at[i] = <char>(48 + micro % 10)
                micro //= 10
            at += 7
            at = put(at, b'Z"}\n', 4)
            self.log_length = at - self.log
            if self.log_length > FLUSH_BYTES:
                self.flush_log()
        self.accepted_lines += 1
        return 0

    cdef int keep(self, bytes sender, list recipients, Session session, const char *p, Py_ssize_t n, bytes owner, bint stuffed, timespec *now) except -1:
        cdef Kept one, old
        if self.ring_size == 0 or n > self.ring_limit:
            return 0
        one = Kept.__new__(Kept)
        one.number = self.messages
        one.mail_from = sender
        one.recipients = recipients
        one.at = <double>now.tv_sec + <double>now.tv_nsec * 1e-9
        one.session = session
        one.size = n
        one.stuffed = stuffed
        # The chunk itself is kept where the message fills it; a small message must not hold a large chunk in memory.
        if owner is not None and PyBytes_GET_SIZE(owner) <= 2 * n:
            one.owner = owner
            one.start = p - PyBytes_AS_STRING(owner)
        else:
            one.owner = PyBytes_FromStringAndSize(p, n)
            one.start = 0
        while self.ring_next - self.ring_oldest >= self.ring_size or (self.ring_oldest < self.ring_next and self.ring_bytes + n > self.ring_limit):
            old = <Kept>self.ring[self.ring_oldest % self.ring_size]
            self.ring_bytes -= old.size
            self.ring[self.ring_oldest % self.ring_size] = None
            self.ring_oldest += 1
        self.ring[self.ring_next % self.ring_size] = one
        self.ring_next += 1
        self.ring_bytes += n
        return 0

    cdef int accept(
        self, bytes sender, list recipients, list counts, Session session, const char *p, Py_ssize_t n, bytes owner, int looks, bint stuffed
    ) except -1:
        """Count, remember, log and keep one message for all its recipients; `counts` are their domains."""
        cdef const char *mid = p  # never NULL: it is copied even where it is empty
        cdef Py_ssize_t mid_length = 0, i
        cdef bytes recipient
        cdef timespec now
        cdef uint64_t h
        clock_gettime(CLOCK_REALTIME, &now)
        find_message_id(p, n, &mid, &mid_length)
        self.messages += 1
        self.bytes += n
        if mid_length == 0:
            self.without_message_id += 1
        if looks & SINK_LONG:
            self.long_lines += 1
        if looks & SINK_EIGHT:
            self.undeclared_8bit += 1
        for i in range(len(recipients)):
            recipient = <bytes>recipients[i]
            self.recipients += 1
            (<DomainCount>counts[i]).accepted += 1
            if self.track and mid_length:
                h = sink_mix(sink_mix(0x5153494E4B, mid, mid_length), PyBytes_AS_STRING(recipient), PyBytes_GET_SIZE(recipient))
                self.duplicates += self.remember(h)
            if self.log_on:
                self.log_line(mid, mid_length, recipient, &now)
        self.keep(sender, recipients, session, p, n, owner, stuffed, &now)
        return 0

    cdef int send_later(self, object connection, object what) except -1:
        """With a reply delay: one queue and one timer for all connections, since every answer waits equally long."""
        self.delayed.append((monotonic() + self.delay, connection, what))
        if self.delay_handle is None:
            self.delay_handle = self.loop.call_later(self.delay, self.send_due)
        return 0

    def send_due(self) -> None:
        """Write what has waited long enough (called by the loop)."""
        cdef double limit = monotonic() + 0.0005
        self.delay_handle = None
        while self.delayed and self.delayed[0][0] <= limit:
            _, connection, what = self.delayed.popleft()
            connection.deliver(what)
        if self.delayed:
            self.delay_handle = self.loop.call_later(max(0.0, self.delayed[0][0] - monotonic()), self.send_due)
