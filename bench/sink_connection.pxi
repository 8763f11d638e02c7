# One SMTP connection of the sink; the second half of sink_protocol.pyx.


@cython.final
cdef class SinkProtocol:
    """An asyncio protocol (duck-typed) that speaks SMTP as a server. The replies to one chunk of input leave in one write.

    Whatever way the input is cut, the same replies and the same messages come out.
    """

    cdef Sink sink
    cdef readonly object transport
    cdef readonly uint64_t number, active
    cdef State state
    cdef Flow flow
    cdef char *held
    cdef Py_ssize_t held_length, held_room
    cdef char *out
    cdef Py_ssize_t out_length, out_room
    cdef Py_ssize_t scanned
    cdef bytes mail_from
    cdef list recipients, counts, scripted
    cdef bint utf8, declared_8bit, too_big, fooled, chunked, chunk_last, body_begun, slot_held
    cdef uint64_t chunk_left
    cdef bytes chunk_reply
    cdef object body
    cdef Session session
    cdef str client, helo, user, tls
    cdef bint extended
    cdef int bad
    cdef Py_ssize_t taken
    cdef str auth_step
    cdef bytes auth_user
    cdef object pieces, timer

    def __init__(self, Sink sink not None):
        self.sink = sink
        self.client = self.helo = self.user = self.tls = ""
        self.forget()

    def __dealloc__(self):
        free(self.held)
        free(self.out)

    # -- the event loop's side ------------------------------------------------------------------------------------------

    def connection_made(self, transport) -> None:
        cdef Sink sink = self.sink
        self.transport = transport
        self.active = sink.tick
        sink.connections_total += 1
        sink.connections_now += 1
        sink.connections_max = max(sink.connections_max, sink.connections_now)
        self.number = sink.connections_total
        sink.protocols.add(self)
        peer = transport.get_extra_info("peername")
        self.client = "%s:%d" % (peer[0], peer[1]) if isinstance(peer, tuple) else "local"
        described = transport.get_extra_info("ssl_object")
        if described is not None:
            self.tls = describe_tls(described)
        if sink.connections_now > sink.max_connections:
            sink.connections_refused += 1
            self.say(b"421 4.3.2 Too many connections\r\n")
            self.flush()
            self.close()
            return
        cdef bytes banner = ("220 %s ESMTP Sluice sink\r\n" % sink.options.hostname).encode("ascii")
        self.answer_connection("banner", banner)
        self.flush()

    def data_received(self, data) -> None:
        cdef bytes chunk = data if type(data) is bytes else bytes(data)
        cdef const char *p = PyBytes_AS_STRING(chunk)
        cdef Py_ssize_t n = PyBytes_GET_SIZE(chunk), used
        if self.flow == HUNG or self.flow == CLOSED or self.flow == UPGRADE:
            return
        self.active = self.sink.tick
        self.sink.reads += 1
        if self.held_length == 0 and self.flow == RUN:
            used = self.run(p, n, chunk)
            if used < n and (self.flow == RUN or self.flow == WAIT):
                self.hold(p + used, n - used)
        else:
            self.hold(p, n)
            if self.flow == RUN:
                self.run_held()
        self.flush()
        if self.flow == WAIT and self.held_length > MAX_HELD:
            self.transport.pause_reading()

    def eof_received(self):
        return None

    def pause_writing(self) -> None:
        # A client that does not read its replies is not read either, or they would pile up here.
        if self.flow == RUN:
            self.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.flow == RUN:
            self.transport.resume_reading()

    def connection_lost(self, exc) -> None:
        if self.transport is None:
            return
        self.transport = None
        self.flow = CLOSED
        self.sink.connections_now -= 1
        self.sink.protocols.discard(self)
        if self.slot_held:
            self.sink.script.release(self.number)
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.pieces = None

    def secured(self, transport, str description not None) -> None:
        """The TLS handshake is done: go on over `transport`, knowing nothing of what was said before (RFC 3207 §4.2)."""
        if self.transport is None:
            transport.close()
            return
        self.transport = transport
        self.tls = description
        self.helo = self.user = ""
        self.extended = False
        self.session = None
        self.forget()
        self.state = COMMAND
        self.flow = RUN

    def abandon(self) -> None:
        """The TLS handshake failed: the connection is over."""
        if self.transport is not None:
            self.transport.abort()
            self.connection_lost(None)

    def goodbye(self) -> None:
        """The sink stops: 421 and close."""
        if self.transport is not None:
            self.say(b"421 4.3.2 The sink stops\r\n")
            self.flush()
            self.close()

    # -- output -----------------------------------------------------------------------------------------------------------

    cdef int say(self, bytes text) except -1:
        cdef Py_ssize_t n = PyBytes_GET_SIZE(text)
        self.room_out(n)
        memcpy(self.out + self.out_length, PyBytes_AS_STRING(text), n)
        self.out_length += n
        return 0

    cdef int room_out(self, Py_ssize_t n) except -1:
        cdef Py_ssize_t room
        cdef char *grown
        if self.out_length + n > self.out_room:
            room = max(self.out_room * 2, self.out_length + n, 512)
            grown = <char *>realloc(self.out, room)
            if grown == NULL:
                raise MemoryError()
            self.out = grown
            self.out_room = room
        return 0

    cdef int refuse(self, bytes text, DomainCount count) except -1:
        """A 4xx or 5xx reply that decides something; counted by code, and per domain where a recipient is meant."""
        cdef str code = text[:3].decode("ascii")
        self.sink.replies[code] = self.sink.replies.get(code, 0) + 1
        if count is not None:
            if text[0] == 52:  # "4"
                count.deferred += 1
                self.sink.deferred += 1
            else:
                count.refused += 1
                self.sink.refused += 1
        self.say(text)
        return 0

    cdef int complain(self, bytes text) except -1:
        """A reply to a client that breaks the protocol; too many end the connection."""
        self.sink.protocol_errors += 1
        self.bad += 1
        self.refuse(text, None)
        if self.bad > MAX_BAD_COMMANDS:
            self.say(b"421 4.7.0 Too many errors\r\n")
            self.flush()
            self.close()
        return 0

    cdef int flush(self) except -1:
        cdef bytes text
        if self.out_length and self.transport is not None:
            if self.sink.log_first:
                self.sink.flush_log()
            text = PyBytes_FromStringAndSize(self.out, self.out_length)
            self.out_length = 0
            if self.sink.delay > 0:
                self.sink.send_later(self, text)
            else:
                self.transport.write(text)
        return 0

    cdef int deliver(self, object what) except -1:
        """What waited for the reply delay: bytes to write, or None = close."""
        if self.transport is not None:
            if what is None:
                self.transport.close()
            else:
                self.transport.write(what)
        return 0

    cdef int close(self) except -1:
        self.flow = CLOSED
        if self.transport is not None:
            if self.sink.delay > 0:
                self.sink.send_later(self, None)
            else:
                self.transport.close()
        return 0

    # -- input ------------------------------------------------------------------------------------------------------------

    cdef int hold(self, const char *p, Py_ssize_t n) except -1:
        cdef Py_ssize_t room
        cdef char *grown
        if self.held_length + n > self.held_room:
            room = max(self.held_room * 2, self.held_length + n, 4096)
            grown = <char *>realloc(self.held, room)
            if grown == NULL:
                raise MemoryError()
            self.held = grown
            self.held_room = room
        memcpy(self.held + self.held_length, p, n)
        self.held_length += n
        return 0

    cdef int run_held(self) except -1:
        cdef Py_ssize_t used = self.run(self.held, self.held_length, None)
        self.held_length -= used
        if self.held_length:
            memmove(self.held, self.held + used, self.held_length)
        elif self.held_room > 1 << 18:
            free(self.held)
            self.held = NULL
            self.held_room = 0
        return 0

    cdef Py_ssize_t run(self, const char *p, Py_ssize_t n, bytes owner) except -1:
        """Take what is complete off the front of `p`; returns how many octets were used. `owner` is the object `p` lies in, if any."""
        cdef Py_ssize_t pos = 0, end
        cdef const char *newline
        while pos < n and self.flow == RUN:
            if self.state == DATA:
                if self.scripted is not None and not self.body_begun and self.begin_body():
                    continue
                end = sink_find_end(p + pos, n - pos, self.scanned)
                if end == -1:
                    if n - pos > self.sink.max_size + 5:
                        self.too_big = True
                        self.scanned = 1  # not 0: what is left is not the start of the content
                        return n - 4
                    self.scanned = max(0, n - pos - 4)
                    if self.too_big:
                        self.scanned = max(self.scanned, 1)
                    return pos
                if end == -2:
                    self.finish(p + pos, 0, owner)
                    pos += 3
                else:
                    self.finish(p + pos, end + 2, owner)
                    pos += end + 5
            elif self.state == CHUNK:
                if self.chunk_reply is not None:
                    end = <Py_ssize_t>min(<uint64_t>(n - pos), self.chunk_left)
                    self.chunk_left -= end
                    pos += end
                    if self.chunk_left == 0:
                        self.end_chunk(NULL, 0, None)
                else:
                    if self.scripted is not None and not self.body_begun and self.begin_body():
                        continue
                    if <uint64_t>(n - pos) < self.chunk_left:
                        return pos
                    end = <Py_ssize_t>self.chunk_left
                    self.end_chunk(p + pos, end, owner)
                    pos += end
            else:
                newline = <const char *>memchr(p + pos, c"\n", n - pos)
                if newline == NULL:
                    if n - pos > MAX_LINE or self.state == SKIP_LINE:
                        self.state = SKIP_LINE
                        return n
                    return pos
                end = newline - p
                if self.state == SKIP_LINE or end - pos > MAX_LINE:
                    self.state = COMMAND
                    self.complain(b"500 5.5.6 Line too long\r\n")
                elif end == pos or (newline - 1)[0] != c"\r" or not clean(p + pos, end - 1 - pos):
                    self.state = COMMAND
                    self.complain(b"500 5.5.2 A command line ends in CRLF and holds no bare CR, bare LF or NUL\r\n")
                elif self.state == AUTH_LINE:
                    self.auth_line(p[pos:end - 1])
                else:
                    self.command(p + pos, end - 1 - pos)
                pos = end + 1
                if self.flow == UPGRADE:
                    return n  # RFC 3207 §4.2: what was sent in clear behind STARTTLS is never looked at
            if pos < n and not self.sink.pipelining and self.flow == RUN and self.state != CHUNK:
                self.complain(b"503 5.5.0 Commands sent ahead of their replies, PIPELINING was not offered\r\n")
                self.flush()
                self.close()
        return n if self.flow == HUNG or self.flow == CLOSED else pos

    cdef int command(self, const char *p, Py_ssize_t n) except -1:
        cdef uint32_t what = verb(p[0], p[1], p[2], p[3]) if n >= 4 else 0
        cdef bint alone = n == 4
        if what == MAIL and n > 10 and same(p + 4, b" from:", 6):
            self.on_mail(p + 10, p + n)
        elif what == RCPT and n > 8 and same(p + 4, b" to:", 4):
            self.on_rcpt(p + 8, p + n)
        elif what == V_DATA and alone:
            self.on_data()
        elif what == BDAT and self.sink.chunking and n > 5 and p[4] == c" ":
            self.on_bdat(p[5:n])
        elif what == MAIL or what == RCPT:
            self.complain(b"501 5.5.4 Syntax: MAIL FROM:<address> or RCPT TO:<address>\r\n")
        elif what == EHLO or what == HELO:
            self.on_hello(p[4:n], what == EHLO)
        elif what == RSET and alone:
            self.forget()
            self.say(b"250 2.0.0 Ok\r\n")
        elif what == NOOP and (alone or p[4] == c" "):
            self.say(b"250 2.0.0 Ok\r\n")
        elif what == QUIT and alone:
            self.say(b"221 2.0.0 Bye\r\n")
            self.flush()
            self.close()
        elif what == VRFY and n > 5 and p[4] == c" ":
            self.say(b"252 2.5.0 Send some mail, the sink takes what its script allows\r\n")
        elif what == EXPN:
            self.refuse(b"502 5.5.1 EXPN is not offered\r\n", None)
        elif what == HELP and (alone or p[4] == c" "):
            self.say(b"214 2.0.0 Scripted answers: see docs/sink.md\r\n")
        elif what == STAR and n == 8 and same(p, b"starttls", 8) and self.sink.starttls:
            self.on_starttls()
        elif what == AUTH and n > 5 and p[4] == c" " and self.sink.auth_on:
            self.on_auth(p[5:n])
        elif what == verb(c"P", c"O", c"S", c"T") or (n > 4 and same(p, b"get /", 5)):
            # A browser that was lured here (RFC 5321 §7.2 of old, cross-protocol requests): nothing behind it may be read.
            self.complain(b"554 5.5.0 This is SMTP, not HTTP\r\n")
            self.flush()
            self.close()
        else:
            self.complain(b"500 5.5.2 Unknown command or wrong arguments\r\n")
        return 0

    cdef int on_hello(self, bytes name, bint extended) except -1:
        cdef Sink sink = self.sink
        cdef bytes who = name.strip()
        if not who or len(who) > 255 or name[:1] != b" ":
            self.complain(b"501 5.5.4 Syntax: EHLO name\r\n")
            return 0
        self.forget()
        self.helo = who.decode("utf-8", "replace")
        self.extended = extended
        self.session = None
        hostname = sink.options.hostname
        lines = [hostname + " at your service"]
        if extended:
            if sink.pipelining:
                lines.append("PIPELINING")
            if sink.size_on:
                lines.append("SIZE %d" % sink.max_size)
            if sink.starttls and not self.tls:
                lines.append("STARTTLS")
            if sink.auth_on and not self.user and (self.tls or not sink.options.auth_needs_tls):
                lines.append("AUTH PLAIN LOGIN")
            if sink.options.enhancedstatuscodes:
                lines.append("ENHANCEDSTATUSCODES")
            if sink.eightbit:
                lines.append("8BITMIME")
            if sink.smtputf8:
                lines.append("SMTPUTF8")
            if sink.chunking:
                lines.append("CHUNKING")
        last = lines.pop()
        text = "".join(["250-%s\r\n" % line for line in lines]) + "250 %s\r\n" % last
        self.answer_connection("ehlo", text.encode("ascii"))
        return 0

    cdef int on_starttls(self) except -1:
        if self.tls:
            self.complain(b"503 5.5.1 TLS is on already\r\n")
            return 0
        self.answer_connection("starttls", b"220 2.0.0 Ready to start TLS\r\n")
        if self.flow != RUN or not self.reply_was_good():
            return 0
        answer = self.sink.script.for_connection("handshake", self.number) if self.sink.connection_rules else None
        self.flush()
        if answer is not None and answer.action == "garbage":
            self.say(b"This is no TLS record, not even close\r\n" * 4)
            self.flush()
            self.flow = HUNG
            return 0
        if answer is not None and answer.action in ("drop", "reset", "hang", "stall"):
            self.play(answer, b"", "handshake", None)
            return 0
        self.flow = UPGRADE
        self.transport.pause_reading()
        self.sink.upgrade(self)
        return 0

    cdef bint reply_was_good(self) noexcept:
        """Is the last thing in the output a 2xx, so that the handshake may follow? (A scripted 454 is not.)"""
        return self.out_length > 0 and self.out[0] != c"4" and self.out[0] != c"5" or self.out_length == 0

    cdef int on_mail(self, const char *p, const char *end) except -1:
        cdef const char *address = NULL
        cdef const char *rest = NULL
        cdef Py_ssize_t n = 0, at = -1
        cdef bint eight = False
        cdef bytes trouble
        cdef Sink sink = self.sink
        if self.helo == "":
            self.complain(b"503 5.5.1 Send EHLO first\r\n")
            return 0
        if self.mail_from is not None:
            self.complain(b"503 5.5.1 A transaction is open already\r\n")
            return 0
        if sink.require_tls and not self.tls:
            self.refuse(b"530 5.7.0 Must issue a STARTTLS command first\r\n", None)
            return 0
        if sink.require_auth and not self.user:
            self.refuse(b"530 5.7.0 Authentication required\r\n", None)
            return 0
        if sink.max_messages and self.taken >= sink.max_messages:
            self.refuse(b"421 4.7.0 Too many messages on this connection\r\n", None)
            self.flush()
            self.close()
            return 0
        if not parse_path(p, end, &address, &n, &at, &eight, &rest) or (n > 0 and at < 0):
            self.complain(b"501 5.1.7 Bad sender address syntax\r\n")
            return 0
        self.utf8 = self.declared_8bit = False
        if rest < end:
            trouble = self.mail_parameters(rest[:end - rest])
            if trouble is not None:
                self.refuse(trouble, None)
                return 0
        if eight and not self.utf8:
            self.refuse(b"553 5.6.7 Non-ASCII sender without SMTPUTF8\r\n", None)
            return 0
        cdef bytes sender = PyBytes_FromStringAndSize(address, n)
        if sink.sender_rules or (n > 3 and (sink.is_token(address) or (at + 4 < n and sink.is_token(address + at + 1)))):
            answer = sink.script.for_sender(sender)
            if answer is not None:
                if not refusal(answer):
                    self.mail_from = sender
                self.play(answer, b"250 2.1.0 Ok\r\n", "mail", None)
                return 0
        self.mail_from = sender
        self.say(b"250 2.1.0 Ok\r\n")
        return 0

    cdef bytes mail_parameters(self, bytes text):
        """Take the parameters of MAIL; the refusal, or None when all is well (RFC 1870 §6, 6152, 6531 §3.4, 4954 §5)."""
        cdef bytes word, low
        cdef Sink sink = self.sink
        if not self.extended:
            return b"555 5.5.4 Parameters need EHLO\r\n"
        for word in text.split():
            low = word.lower()
            if low.startswith(b"size=") and sink.size_on:
                if not low[5:].isdigit() or len(low) > 25:
                    return b"501 5.5.4 SIZE is a number of octets\r\n"
                if int(low[5:]) > sink.max_size:
                    return b"552 5.3.4 Message too big\r\n"
            elif low == b"body=8bitmime" and sink.eightbit:
                self.declared_8bit = True
            elif low == b"body=7bit" and sink.eightbit:
                pass
            elif low == b"smtputf8" and sink.smtputf8:
                self.utf8 = self.declared_8bit = True
            elif low.startswith(b"auth=") and sink.auth_on:
                pass
            else:
                return b"555 5.5.4 Parameter not recognised or not offered\r\n"
        return None

    cdef int on_rcpt(self, const char *p, const char *end) except -1:
        cdef const char *address = NULL
        cdef const char *rest = NULL
        cdef Py_ssize_t n = 0, at = -1, i
        cdef bint eight = False
        cdef char low[256]
        cdef char c
        cdef DomainCount count
        cdef Sink sink = self.sink
        cdef object answer, local
        cdef bytes recipient
        if self.mail_from is None:
            self.complain(b"503 5.5.1 Send MAIL first\r\n")
            return 0
        if not parse_path(p, end, &address, &n, &at, &eight, &rest) or n == 0 or n - at > 255 or at == 0 or at == n - 1:
            self.complain(b"501 5.1.3 Bad recipient address syntax\r\n")
            return 0
        if at < 0 and not (n == 10 and same(address, b"postmaster", 10)):
            self.complain(b"501 5.1.3 The recipient has no domain\r\n")
            return 0
        if rest < end and rest[:end - rest].strip():
            self.refuse(b"555 5.5.4 Parameter not recognised or not offered\r\n", None)
            return 0
        i = 0
        if at >= 0:
            for i in range(n - at - 1):
                c = address[at + 1 + i]
                low[i] = c | 0x20 if c"A" <= c <= c"Z" else c
            i = n - at - 1
        count = sink.domain(PyBytes_FromStringAndSize(low, i))
        if eight and not self.utf8:
            self.refuse(b"553 5.6.7 Non-ASCII recipient without SMTPUTF8\r\n", count)
            return 0
        if len(self.recipients) >= sink.max_recipients:
            self.refuse(b"452 4.5.3 Too many recipients\r\n", count)
            return 0
        recipient = PyBytes_FromStringAndSize(address, n)
        answer = count.answer
        if at >= 3 and sink.is_token(address):
            local = sink.script.token(recipient[:at].partition(b"+")[0].lower())
            if local is not None:
                answer = local
        if answer is not None or sink.recipient_rules:
            self.slot_held = True
            answer = sink.script.for_recipient(recipient, self.mail_from, answer, self.number, monotonic())
        if answer is not None:
            stage = answer.stage
            if stage == "mail":
                # The sender's turn is over; what can still be done is to withhold the answers of this group.
                self.out_length = 0
                self.play(answer, b"250 2.1.5 Ok\r\n", "rcpt", count)
                return 0
            if stage == "rcpt":
                if answer.action == "norcpt354":
                    self.fooled = True
                elif not refusal(answer):
                    self.recipients.append(recipient)
                    self.counts.append(count)
                self.play(answer, b"250 2.1.5 Ok\r\n", "rcpt", count)
                return 0
            if self.scripted is None:
                self.scripted = []
            self.scripted.append(answer)
        self.recipients.append(recipient)
        self.counts.append(count)
        self.say(b"250 2.1.5 Ok\r\n")
        return 0

    cdef int on_data(self) except -1:
        if self.mail_from is None:
            self.complain(b"503 5.5.1 Send MAIL first\r\n")
            return 0
        if self.chunked:
            self.complain(b"503 5.5.1 DATA after BDAT\r\n")
            return 0
        if not self.recipients and not self.fooled:
            self.refuse(b"554 5.5.1 No valid recipients\r\n", None)
            return 0
        answer = self.take("data")
        if answer is not None:
            if not refusal(answer):
                self.begin_data()
            self.play(answer, b"354 End data with <CR><LF>.<CR><LF>\r\n", "data", None)
            return 0
        self.begin_data()
        self.say(b"354 End data with <CR><LF>.<CR><LF>\r\n")
        return 0

    cdef int begin_data(self) except -1:
        self.state = DATA
        self.scanned = 0
        self.too_big = False
        self.body_begun = False
        return 0

    cdef int on_bdat(self, bytes text) except -1:
        cdef list words = text.split()
        cdef Sink sink = self.sink
        cdef bint last = len(words) == 2 and words[1].upper() == b"LAST"
        if not words or len(words) > 2 or (len(words) == 2 and not last) or not words[0].isdigit() or len(words[0]) > 18:
            # Nobody knows where the chunk ends, so nothing behind it can be trusted.
            self.complain(b"501 5.5.4 Syntax: BDAT size [LAST]\r\n")
            self.flush()
            self.close()
            return 0
        self.chunk_left = int(words[0])
        self.chunk_last = last
        self.chunk_reply = None
        self.state = CHUNK
        if self.mail_from is None:
            self.chunk_reply = b"503 5.5.1 Send MAIL first\r\n"
        elif not self.recipients:
            self.chunk_reply = b"554 5.5.1 No valid recipients\r\n"
        elif self.too_big or (len(self.body) if self.body is not None else 0) + self.chunk_left > <uint64_t>sink.max_size:
            self.too_big = True
            self.chunk_reply = b"552 5.3.4 Message too big\r\n"
        elif not self.chunked:
            self.chunked = True
            self.body_begun = False
            answer = self.take("data")
            if answer is not None and answer.action in ("drop", "reset", "hang", "stall", "slow"):
                self.play(answer, b"", "data", None)
            elif answer is not None and answer.action == "reply":
                self.chunk_reply = answer.reply
                self.recipients = []
                self.counts = []
        if self.chunk_left == 0 and self.flow == RUN:
            self.end_chunk(b"", 0, None)
        return 0

    cdef int end_chunk(self, const char *p, Py_ssize_t n, bytes owner) except -1:
        cdef bytes whole
        self.state = COMMAND
        if self.chunk_reply is not None:
            self.refuse(self.chunk_reply, None)
            if self.chunk_last:
                # RFC 3030 §2: LAST ends the transaction, refused or not, so a window of messages stays in step.
                self.forget()
        elif not self.chunk_last:
            if self.body is None:
                self.body = bytearray()
            self.body += p[:n]
            self.say(b"250 2.0.0 %d octets received\r\n" % n)
        elif self.body is None:
            self.finish(p, n, owner)
        else:
            self.body += p[:n]
            whole = bytes(self.body)
            self.finish(PyBytes_AS_STRING(whole), PyBytes_GET_SIZE(whole), whole)
        return 0

    cdef bint begin_body(self) except -1:
        """The first octets of content are here: play what the script has for `body`. True when the flow was stopped."""
        self.body_begun = True
        answer = self.take("body")
        if answer is None or answer.action not in ("drop", "reset", "hang", "stall", "slow", "extra", "bye"):
            return False
        self.play(answer, b"", "body", None)
        return self.flow != RUN

    cdef int finish(self, const char *p, Py_ssize_t n, bytes owner) except -1:
        """The content is complete: take or refuse the message, answer, and be ready for the next."""
        cdef Sink sink = self.sink
        cdef int looks
        cdef bytes trouble = None
        cdef object answer = None, after = None
        cdef char text[64]
        cdef int length
        self.state = COMMAND
        if self.too_big or n > sink.max_size:
            trouble = b"552 5.3.4 Message too big\r\n"
            looks = 0
        else:
            looks = sink_look(p, n)
            if looks & SINK_BARE:
                sink.bare_newlines += 1
                if not sink.allow_bare:
                    trouble = b"554 5.6.0 The message holds a bare CR or LF\r\n"
            if looks & SINK_NUL:
                sink.nul_octets += 1
                if not sink.allow_bare:
                    trouble = b"554 5.6.0 The message holds a NUL\r\n"
        if not self.recipients:
            trouble = b"554 5.5.1 No valid recipients\r\n"
        if self.scripted is not None:
            answer = self.take("dot")
            after = self.take("accepted")
        if trouble is None and answer is not None and refusal(answer):
            trouble = b"" if answer.action != "reply" else answer.reply
        if trouble is None:
            if self.session is None:
                self.session = Session(self.client, self.helo, self.extended, self.tls, self.user)
            self.taken += 1
            sink.accept(self, p, n, owner, looks, bool(looks & SINK_DOTTED) and not self.chunked)
            if answer is None and after is None:
                self.room_out(64)
                self.out_length += queued(self.out + self.out_length, sink.messages)
            else:
                length = queued(text, sink.messages)
                self.play(answer if answer is not None else after, text[:length], "dot" if answer is not None else "accepted", None)
                if answer is not None and after is not None and self.flow == RUN:
                    self.play(after, b"", "accepted", None)
        elif trouble == b"":
            self.play(answer, b"250 2.0.0 Ok\r\n", "dot", None)
        else:
            self.refuse_all(trouble)
        if self.flow != CLOSED:
            self.forget()
        return 0

    cdef int refuse_all(self, bytes text) except -1:
        cdef DomainCount count
        for count in self.counts[1:]:
            if text[0] == 52:
                count.deferred += 1
                self.sink.deferred += 1
            else:
                count.refused += 1
                self.sink.refused += 1
        self.refuse(text, <DomainCount>self.counts[0] if self.counts else None)
        if text.startswith(b"421"):
            self.flush()
            self.close()
        return 0

    cdef int forget(self) except -1:
        """End the transaction. New lists, because the kept message holds the old ones."""
        self.mail_from = None
        self.recipients = []
        self.counts = []
        self.scripted = None
        self.body = None
        self.too_big = self.fooled = self.chunked = False
        self.scanned = 0
        return 0

    # -- AUTH (RFC 4954; PLAIN RFC 4616, LOGIN as everybody does it) -----------------------------------------------------------

    cdef int on_auth(self, bytes text) except -1:
        cdef list words = text.split()
        mechanism = words[0].upper() if words else b""
        if self.helo == "" or not self.extended:
            self.complain(b"503 5.5.1 Send EHLO first\r\n")
        elif self.user:
            self.complain(b"503 5.5.1 Already authenticated\r\n")
        elif self.mail_from is not None:
            self.complain(b"503 5.5.1 Not inside a transaction\r\n")
        elif self.sink.options.auth_needs_tls and not self.tls:
            self.refuse(b"538 5.7.11 Encryption required for authentication\r\n", None)
        elif mechanism == b"PLAIN" and len(words) <= 2:
            self.auth_step = "plain"
            self.auth_ask(words, b"334 \r\n")
        elif mechanism == b"LOGIN" and len(words) <= 2:
            self.auth_step = "user"
            self.auth_ask(words, b"334 VXNlcm5hbWU6\r\n")
        else:
            self.complain(b"504 5.5.4 Mechanisms are PLAIN and LOGIN\r\n")
        return 0

    cdef int auth_ask(self, list words, bytes prompt) except -1:
        if len(words) == 2:
            self.auth_line(words[1])
        else:
            self.state = AUTH_LINE
            self.say(prompt)
        return 0

    cdef int auth_line(self, bytes line) except -1:
        self.state = COMMAND
        if line == b"*":
            self.refuse(b"501 5.7.0 Authentication cancelled\r\n", None)
            return 0
        try:
            plain_text = b"" if line == b"=" else base64.b64decode(line, validate=True)
        except binascii.Error:
            self.complain(b"501 5.5.2 Not base64\r\n")
            return 0
        if self.auth_step == "user":
            self.auth_user = plain_text
            self.auth_step = "password"
            self.state = AUTH_LINE
            self.say(b"334 UGFzc3dvcmQ6\r\n")
            return 0
        if self.auth_step == "plain":
            parts = plain_text.split(b"\0")
            if len(parts) != 3:
                self.complain(b"501 5.5.2 PLAIN is identity NUL user NUL password\r\n")
                return 0
            self.auth_user, password = parts[1], parts[2]
        else:
            password = plain_text
        cdef dict users = self.sink.users
        answer = self.sink.script.for_connection("auth", self.number) if self.sink.connection_rules else None
        name = self.auth_user.decode("utf-8", "replace")
        known = not users or hmac.compare_digest(users.get(name, "\0").encode(), password)
        if answer is not None:
            if known and not refusal(answer):
                self.user = name
            self.play(answer, b"235 2.7.0 Welcome\r\n", "auth", None)
        elif known and name:
            self.user = name
            self.session = None
            self.say(b"235 2.7.0 Welcome\r\n")
        else:
            self.complain(b"535 5.7.8 Wrong user or password\r\n")
        return 0

    # -- the script -------------------------------------------------------------------------------------------------------------

    cdef object take(self, str stage):
        """Remove and return the first scripted answer of that stage, or None."""
        if self.scripted is not None:
            for answer in self.scripted:
                if answer.stage == stage:
                    self.scripted.remove(answer)
                    return answer
        return None

    cdef int answer_connection(self, str stage, bytes normal) except -1:
        answer = self.sink.script.for_connection(stage, self.number) if self.sink.connection_rules else None
        if answer is None:
            self.say(normal)
        else:
            self.play(answer, normal, stage, None)
        return 0

    cdef int play(self, object answer, bytes normal, str stage, DomainCount count) except -1:
        """Do what the script says where `normal` would have been the answer (empty: none is due here)."""
        cdef str action = answer.action
        cdef bytes code = normal[:3]
        if action == "reply" or action == "norcpt354":
            if stage == "banner" or answer.reply[:3] == b"421":
                self.refuse(answer.reply, count)
                self.flush()
                self.close()
            elif answer.reply[:1] in b"23":
                self.say(answer.reply)
            else:
                self.refuse(answer.reply, count)
        elif action == "drop" or action == "reset" or action == "hang" or action == "stall":
            self.end_badly(action, count)
        elif action == "slow":
            self.later(answer.milliseconds / 1000.0, [normal])
        elif action == "extra":
            self.say(normal + b"250 2.0.0 Nobody asked for this\r\n")
        elif action == "bye":
            self.say(normal + b"421 4.3.2 Going down\r\n")
            self.flush()
            self.close()
        elif not normal:
            pass
        elif action == "double":
            self.say(normal + normal)
        elif action == "garbage":
            self.say(b"\x16\x03\x01 What is this\r\n")
        elif action == "lf":
            self.say(normal.rstrip() + b"\n")
        elif action == "wrong":
            self.say(b"250 2.0.0 Ok\r\n" if stage == "data" else b"354 Go on\r\n")
        elif action == "split":
            self.later(0.0, [normal[i:i + 1] for i in range(len(normal))])
        elif action == "multi":
            self.say(b"".join(b"%s-%s line %d\r\n" % (code, normal[4:9], i) for i in range(29)) + normal)
        elif action == "short":
            self.say(code + b"\r\n")
        elif action == "flood":
            self.later(0.0, [(b"%s-More of this\r\n" % code) * 16384] * 50 + [normal])
        elif action == "huge":
            self.say(normal[:4] + b"x" * (1 << 20) + b"\r\n")
        else:
            self.say(normal)
        return 0

    cdef int end_badly(self, str action, DomainCount count) except -1:
        cdef DomainCount one
        cdef Sink sink = self.sink
        if count is not None:
            count.dropped += 1
        else:
            for one in self.counts:
                one.dropped += 1
        self.flush()
        if action == "drop":
            sink.dropped += 1
            self.close()
        elif action == "reset":
            sink.dropped += 1
            sock = self.transport.get_extra_info("socket")
            if sock is not None:
                # Linger 0 makes close(2) send RST instead of FIN.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.flow = CLOSED
            self.transport.abort()
        else:
            sink.hung += 1
            self.flow = HUNG
            if action == "stall":
                self.transport.pause_reading()
        return 0

    cdef int later(self, double seconds, list pieces) except -1:
        """Answer with `pieces`, the first after `seconds`, each in its own segment; until then nothing more is looked at."""
        self.flush()
        self.flow = WAIT
        self.pieces = list(reversed(pieces))
        self.timer = self.sink.loop.call_later(seconds, self.next_piece)
        return 0

    def next_piece(self) -> None:
        """Send one piece of a slow answer; after the last go on with the input that came meanwhile (called by the loop)."""
        self.timer = None
        if self.transport is None or self.flow != WAIT:
            return
        self.active = self.sink.tick
        if self.transport.get_write_buffer_size() < 1 << 20:
            self.transport.write(self.pieces.pop())
        if self.pieces:
            self.timer = self.sink.loop.call_later(0.001, self.next_piece)
            return
        self.pieces = None
        self.flow = RUN
        if self.state == CHUNK and self.chunk_left == 0:
            self.end_chunk(b"", 0, None)
        if self.held_length:
            self.run_held()
        self.flush()
        if self.flow == RUN and self.transport is not None:
            self.transport.resume_reading()


cdef bint refusal(object answer) except -1:
    """Does the scripted answer mean that the thing asked for is not done?"""
    action = answer.action
    if action == "reply":
        return answer.reply[:1] in b"45"
    return action in ("drop", "reset", "hang", "stall", "wrong", "norcpt354")


cdef int queued(char *to, uint64_t number) noexcept nogil:
    cdef char digits[24]
    cdef int n = 0, i
    memcpy(to, b"250 2.0.0 Ok: queued as ", 24)
    while True:
        digits[n] = <char>(48 + number % 10)
        n += 1
        number //= 10
        if number == 0:
            break
    for i in range(n):
        to[24 + i] = digits[n - 1 - i]
    to[24 + n] = c"\r"
    to[25 + n] = c"\n"
    return 26 + n


cdef bint clean(const char *p, Py_ssize_t n) noexcept nogil:
    return memchr(p, c"\r", n) == NULL and memchr(p, 0, n) == NULL


cdef bint parse_path(const char *p, const char *end, const char **address, Py_ssize_t *length, Py_ssize_t *at, bint *eight, const char **rest) noexcept nogil:
    """Read `<address>` (RFC 5321 §4.1.2), quoted local parts included. `at` is the index of the @ that splits it, or -1."""
    cdef bint quoted = False
    cdef unsigned char c
    cdef const char *q
    while p < end and p[0] == c" ":
        p += 1
    if p >= end or p[0] != c"<":
        return False
    p += 1
    if p < end and p[0] == c"@":
        # A source route is to be ignored (RFC 5321 §4.1.1.3).
        while p < end and p[0] != c":" and p[0] != c">":
            p += 1
        if p >= end or p[0] != c":":
            return False
        p += 1
    q = p
    while q < end:
        c = <unsigned char>q[0]
        if quoted:
            if c == c"\\":
                q += 1
            elif c == c'"':
                quoted = False
        elif c == c">":
            address[0] = p
            length[0] = q - p
            rest[0] = q + 1
            return q - p <= 512 and (q + 1 == end or q[1] == c" ")
        elif c == c'"' and q == p:
            quoted = True
        elif c == c"@":
            if at[0] >= 0:
                return False
            at[0] = q - p
        elif c <= 32 or c == 127 or c == c"<":
            return False
        if c >= 128:
            eight[0] = True
        q += 1
    return False


def describe_tls(ssl_object) -> str:
    """`TLSv1.3 TLS_AES_256_GCM_SHA384` of an ssl object."""
    cipher = ssl_object.cipher()
    return "%s %s" % (ssl_object.version(), cipher[0] if cipher else "")
