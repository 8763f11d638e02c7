# What goes out on one connection of the sink, as it should or as the script wants it. Included by sink_protocol.pyx.


cdef class Replies:
    """The output of a connection: answers are gathered and leave in one write; scripted ones are played here.

    All fields of a connection stand here, so that the three classes that share them stay short.
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

    def __dealloc__(self):
        free(self.held)
        free(self.out)

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

    def deliver(self, what) -> None:
        """What waited for the reply delay: bytes to write, or None = close."""
        if self.transport is not None:
            if what is None:
                self.transport.close()
            else:
                self.transport.write(what)

    cdef int close(self) except -1:
        self.flow = CLOSED
        if self.transport is not None:
            if self.sink.delay > 0:
                self.sink.send_later(self, None)
            else:
                self.transport.close()
        return 0

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


cdef bint refusal(object answer) except -1:
    """Does the scripted answer mean that the thing asked for is not done?"""
    action = answer.action
    if action == "reply":
        return answer.reply[:1] in b"45"
    return action in ("drop", "reset", "hang", "stall", "wrong", "norcpt354")
