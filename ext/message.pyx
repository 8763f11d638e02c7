"""Whole messages for a group of recipients in one call, built in one reusable buffer.

Owns the order in which the parts of a message are written. Everything that is the same for every recipient arrives ready
made as octets (`Layout`); what differs is an address, signed tokens, and the programs of subject, display name and bodies.
"""

cimport cython

from cpython.bytes cimport PyBytes_FromStringAndSize

from ext.body cimport Wire, let_go, put, put_base64, put_bytes, put_lines, start_bytes, taken, utf8
from ext.body import Unfit, Unsendable
from ext.header cimport mailbox, put_unstructured
from ext.recipient cimport UNSUBSCRIBE, Names, Row
from ext.template cimport Program
from ext.token cimport Signer

cdef unsigned char[256] ADDRESS  # 1: may stand in a plain local part, 2: in a domain name too, 4: dot, 8: hyphen


cdef int _fill_table() except -1:
    cdef int octet
    for octet in b"!#$%&'*+/=?^_`{|}~":
        ADDRESS[octet] = 1
    for octet in b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789":
        ADDRESS[octet] = 3
    ADDRESS[45] = 9  # -
    ADDRESS[46] = 4  # .


_fill_table()


cdef bint _is_plain(const unsigned char* text, Py_ssize_t length) noexcept:
    """Tell whether an address needs no closer look: atoms and dots, an @, letter-digit-hyphen labels, sizes within limits."""
    cdef Py_ssize_t at, start, split = -1
    cdef unsigned char kind
    if length > 254 or length < 3:
        return False
    for at in range(length):
        if text[at] == 64:
            split = at
            break
    if split < 1 or split > 64 or split == length - 1:
        return False
    kind = 4
    for at in range(split):
        if ADDRESS[text[at]] == 4:
            if kind == 4:
                return False
        elif ADDRESS[text[at]] & 1 == 0:
            return False
        kind = ADDRESS[text[at]]
    if kind == 4:
        return False
    start = split + 1
    for at in range(split + 1, length + 1):
        if at == length or text[at] == 46:
            if at == start or at - start > 63 or text[start] == 45 or text[at - 1] == 45:
                return False
            start = at + 1
        elif ADDRESS[text[at]] & 10 == 0:
            return False
        if at - start == 3 and text[at] == 45 and text[at - 1] == 45:  # "xn--" and its like
            return False
    return True


@cython.final
cdef class Part:
    """One body part: the program of `field`, its content transfer encoding, and the octets between it and what follows.

    `coding`: quoted-printable, base64 or 8bit. `mark` begins every boundary of the message: 8bit text that holds it is Unfit, for a
    value that came with it could end its part.
    """

    cdef readonly str field
    cdef readonly Program program
    cdef readonly str coding
    cdef readonly bytes behind
    cdef readonly str mark
    cdef bint quoted

    def __init__(self, str field not None, Program program not None, str coding not None, bytes behind not None, str mark not None):
        self.field = field
        self.program = program
        self.coding = coding
        self.behind = behind
        self.mark = mark
        self.quoted = coding == "quoted-printable"

    cdef int write(self, Row row, Wire* wire) except -1:
        cdef Py_ssize_t length
        cdef const unsigned char* source
        cdef str text
        if self.quoted:
            self.program.write(row, wire)
            return put_bytes(wire, self.behind)
        text = self.program.text_of(row)
        if self.coding == "8bit":
            if self.mark in text:
                raise Unfit("it holds a boundary of the message")
            source = utf8(text, &length)
            put_lines(wire, source, length)
        else:
            if "\0" in text:
                raise Unsendable("it holds a NUL")
            text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\n", "\r\n")
            source = utf8(text, &length)
            put_base64(wire, source, length)
        return put_bytes(wire, self.behind)


@cython.final
cdef class Layout:
    """What one campaign says to everybody, as octets ready to be written, and the programs for the rest.

    `user` and `campaign` stand in the tokens. A program that is None stands for a constant or an absent part. `refuse(field, error)`
    makes the value that stands in the answer for a recipient whose message cannot be built. `address(text)` answers the octets of an
    address that needs a closer look, and whether it needs SMTPUTF8. `decode(data)` and `decode_value(data)` read merge data; `names`
    are the fields that the programs ask for.
    """

    cdef public object refuse, address, decode, decode_value
    cdef public Names names
    cdef public dict constants
    cdef public bytes sender, reply_to, list_headers, content_headers
    cdef public list parts   # of Part, in their order
    cdef public bytes content_headers_8bit  # of the form for servers with 8BITMIME; None: there is none
    cdef public list parts_8bit
    cdef public bytes sender_address, mail_from, mail_from_domain, message_domain, base_url, subject_line
    cdef public bytes unsubscribe_to  # the mailto of List-Unsubscribe; None: an address of each recipient at mail_from_domain
    cdef public bint always_utf8, needs_data
    cdef public bint cfbl    # X-FBLId stands as CFBL-Feedback-ID, too
    cdef public bint listless  # nothing to unsubscribe from
    cdef public list custom  # (name, Program) of header fields that differ; one without a value is left out
    cdef public object user, campaign
    cdef public Program subject, from_name
    cdef public Signer message_signer, return_signer, unsubscribe_signer, unsubscribe_mail_signer, web_view_signer
    cdef public Signer click_signer, open_signer   # None: nothing in the templates asks for their tokens
    cdef str field   # what is being built: named when it fails
    cdef Wire wire
    cdef Py_ssize_t expected  # octets of a message
    cdef Row row

    def __cinit__(self):
        self.expected = 4096

    def __dealloc__(self):
        let_go(&self.wire)

    def build(
        self, list recipients not None, bytes date_line not None, unsigned long long day, dict clock not None, bint eight_bit=False
    ) -> list:
        """One answer for each recipient: (MAIL FROM, RCPT, message, needs SMTPUTF8), or what `refuse` made.

        A recipient has `number`, `subscriber_id`, `email` and `data`. `clock` holds the variables of the composition time. With
        `eight_bit` messages are of the 8bit form where their text fits into it.
        """
        cdef list answers = []
        cdef Row row = self.start(clock)
        eight_bit = eight_bit and self.parts_8bit is not None
        for recipient in recipients:
            answers.append(self.answer(recipient, row, date_line, day, eight_bit))
        let_go(&self.wire)  # of one that was refused half-way
        return answers

    cdef object answer(self, object recipient, Row row, bytes date_line, unsigned long long day, bint eight_bit):
        self.field = "email"
        try:
            return self.one(recipient, row, date_line, day, eight_bit)
        except Unfit:
            return self.answer(recipient, row, date_line, day, False)
        except Exception as error:
            return self.refuse(self.field, error)

    cdef Row start(self, dict clock):
        cdef Row row = self.row
        if row is None:
            row = self.row = Row(self.names, self.base_url)
            row.decode = self.decode
            row.decode_value = self.decode_value
            row.unsubscribe_signer = self.unsubscribe_signer
            row.web_view_signer = self.web_view_signer
            row.click_signer = self.click_signer
            row.open_signer = self.open_signer
            row.numbers[0] = self.user
            row.numbers[1] = self.campaign
        row.shared = {**self.constants, **clock}
        return row

    def scope(self, recipient, dict clock not None) -> dict:
        """The variables that the templates see for `recipient`."""
        cdef Row row = self.start(clock)
        row.numbers[2] = recipient.number
        row.read(recipient, recipient.email, False)
        return row.scope()

    cdef tuple one(self, object recipient, Row row, bytes date_line, unsigned long long day, bint eight_bit):
        cdef Wire* wire = &self.wire
        cdef str email = recipient.email
        cdef Py_ssize_t length
        cdef const unsigned char* source = utf8(email, &length)
        cdef const char* link
        cdef bytes rcpt, mail_from = self.mail_from
        cdef list parts
        cdef bint smtputf8 = False
        cdef char[128] token, back
        cdef int size, back_size
        row.numbers[2] = recipient.number
        row.numbers[3] = day
        if _is_plain(source, length):
            rcpt = PyBytes_FromStringAndSize(<const char*>source, length)
        else:
            rcpt, smtputf8 = self.address(email)
        self.field = "merge data"
        row.read(recipient, email, self.needs_data)
        back_size = self.return_signer.write(row.numbers, 4, back)
        if self.mail_from_domain is not None:
            mail_from = b"b-" + back[:back_size] + b"@" + self.mail_from_domain

        start_bytes(wire, self.expected)
        put_bytes(wire, date_line)
        if self.from_name is None:
            put_bytes(wire, self.sender)
        else:
            self.field = "from_name"
            put_bytes(wire, mailbox(b"From", self.from_name.text_of(row), self.sender_address))
        put_bytes(wire, b"To: ")
        put_bytes(wire, rcpt)
        put_bytes(wire, b"\r\n")
        put_bytes(wire, self.reply_to)
        if self.subject is None:
            put_bytes(wire, self.subject_line)
        else:
            self.field = "subject"
            put_unstructured(wire, b"Subject", self.subject.text_of(row))
        put_bytes(wire, b"Message-ID: <")
        size = self.message_signer.write(row.numbers, 3, token)
        put(wire, <const unsigned char*>token, size)
        put_bytes(wire, b"@")
        put_bytes(wire, self.message_domain)
        put_bytes(wire, b">\r\nMIME-Version: 1.0\r\n")
        if not self.listless:
            put_bytes(wire, b"List-Unsubscribe: <")
            link = row.url(UNSUBSCRIBE, &size)
            put(wire, <const unsigned char*>link, size)
            if self.unsubscribe_to is not None:  # somebody else's address: the subject says who
                put_bytes(wire, b">,\r\n <mailto:")
                put_bytes(wire, self.unsubscribe_to)
                put_bytes(wire, b"?subject=unsubscribe%20u-")
                size = self.unsubscribe_mail_signer.write(row.numbers, 4, token)
                put(wire, <const unsigned char*>token, size)
            elif self.mail_from_domain is not None:
                put_bytes(wire, b">,\r\n <mailto:u-")
                size = self.unsubscribe_mail_signer.write(row.numbers, 4, token)
                put(wire, <const unsigned char*>token, size)
                put_bytes(wire, b"@")
                put_bytes(wire, self.mail_from_domain)
                put_bytes(wire, b"?subject=unsubscribe")
            put_bytes(wire, b">\r\n")
        put_bytes(wire, self.list_headers)
        put_bytes(wire, b"X-FBLId: ")
        put(wire, <const unsigned char*>back, back_size)
        put_bytes(wire, b"\r\n")
        if self.cfbl:
            put_bytes(wire, b"CFBL-Feedback-ID: ")
            put(wire, <const unsigned char*>back, back_size)
            put_bytes(wire, b"\r\n")
        if self.custom is not None:
            for name, program in self.custom:
                self.field = "headers"
                value = (<Program>program).text_of(row)
                if value.strip():
                    put_unstructured(wire, name, value)
        put_bytes(wire, self.content_headers_8bit if eight_bit else self.content_headers)
        parts = self.parts_8bit if eight_bit else self.parts
        for part in parts:
            self.field = (<Part>part).field
            (<Part>part).write(row, wire)
        self.expected = wire.length + wire.length // 16 + 64  # a little more than this one: mostly enough for the next
        return mail_from, rcpt, taken(wire), smtputf8 or self.always_utf8
