# Mail transactions of the sink: MAIL, RCPT, DATA, BDAT and the end of the content. Included by sink_protocol.pyx.


cdef class Transaction(Replies):
    """One transaction after the other (RFC 5321 §3.3), with what the script has for its recipients."""

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
        if sink.sender_rules or (
            n and (sink.token(address, at, c"+") is not None or sink.token(address + at + 1, n - at - 1, c".") is not None)
        ):
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
        local = sink.token(address, at, c"+")
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
            if self.declared_8bit:
                looks &= ~SINK_EIGHT
            sink.accept(
                self.mail_from, self.recipients, self.counts, self.session, p, n, owner, looks, bool(looks & SINK_DOTTED) and not self.chunked
            )
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
