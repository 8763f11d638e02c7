# cython: overflowcheck=False
# The check of the debug build takes the difference of two pointers for an integer and does not compile cleanly.
"""The SMTP side of the sink: one `SinkProtocol` per connection, one `Sink` with everything they share.

Made to cost little: input is parsed where the event loop left it, a message that lies whole in one chunk is never copied,
the answers to one chunk leave in one write, and nothing here allocates an asyncio object per message.
RFC 5321, 1870 (SIZE), 2034 (enhanced codes), 2920 (PIPELINING), 3030 (CHUNKING), 3207 (STARTTLS), 4954 (AUTH), 6152, 6531.
"""

import base64
import binascii
import hmac
import json
import socket
import struct
from time import monotonic

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memchr, memcpy, memmove
from posix.time cimport CLOCK_REALTIME, clock_gettime, timespec

include "sink_scan.pxi"

cdef Py_ssize_t MAX_LINE = 12288  # RFC 4954 §4: an AUTH line may be that long; all others are shorter
cdef Py_ssize_t MAX_HELD = 1 << 20  # input kept while the script makes a connection wait; beyond that it is not read
cdef int MAX_BAD_COMMANDS = 20
cdef Py_ssize_t MAX_DOMAINS = 10_000
cdef Py_ssize_t FLUSH_BYTES = 1 << 18

cdef enum State:
    COMMAND, DATA, CHUNK, SKIP_LINE, AUTH_LINE

cdef enum Flow:
    RUN, WAIT, HUNG, CLOSED, UPGRADE


cdef class SinkProtocol


include "sink_state.pxi"
include "sink_replies.pxi"
include "sink_transaction.pxi"


@cython.final
cdef class SinkProtocol(Transaction):
    """An asyncio protocol (duck-typed) that speaks SMTP as a server. The replies to one chunk of input leave in one write.

    Whatever way the input is cut, the same replies and the same messages come out.
    """

    def __init__(self, Sink sink not None):
        self.sink = sink
        self.client = self.helo = self.user = self.tls = ""
        self.forget()

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

    def goodbye(self, bytes text not None) -> None:
        """Say why (a complete 421) and close."""
        if self.transport is not None:
            self.say(text)
            self.flush()
            self.close()

    def next_piece(self) -> None:
        """Send one piece of a slow answer; after the last go on with the input that came meanwhile (called by the loop)."""
        self.timer = None
        if self.transport is None or self.flow != WAIT:
            return
        self.active = self.sink.tick
        if self.transport.get_write_buffer_size() < 1 << 20:
            if self.sink.delay > 0:  # never before a reply that is still waiting
                self.sink.send_later(self, self.pieces.pop())
            else:
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


def describe_tls(ssl_object) -> str:
    """`TLSv1.3 TLS_AES_256_GCM_SHA384` of an ssl object."""
    cipher = ssl_object.cipher()
    return "%s %s" % (ssl_object.version(), cipher[0] if cipher else "")
