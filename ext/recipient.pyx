"""One recipient as the templates of a campaign see him: his fields, id, address, and signed links, each made only when asked for.

The merge data is a JSON object. It is checked whole, octet by octet, in one pass that notes where the fields stand that a template asks
for; a text goes from there into the message without ever becoming an object. What this pass does not know for sure (escapes of surrogates
and control characters, exponents, deep nesting, anything malformed) is left to the decoder, whose word counts.
"""

cimport cython

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.unicode cimport PyUnicode_DecodeUTF8, PyUnicode_FromStringAndSize
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, strncmp

from ext.body cimport utf8

cdef object MISSING = object()
cdef object _UNREAD = object()

cdef enum:
    MOST_KNOWN = 4096    # names kept; data that has more of them is left to the decoder
    DEPTH = 32           # of lists and objects in each other
    DIGITS = 18          # of an integer that is surely one; of a fraction on each side

cdef enum:  # classes of an octet inside a JSON string
    STANDS, QUOTE, ESCAPE, CONTROL, HIGH

cdef unsigned char[256] KIND


cdef int _fill_table() except -1:
    cdef int octet
    for octet in range(256):
        KIND[octet] = HIGH if octet >= 128 else CONTROL if octet < 32 else STANDS
    KIND[34] = QUOTE
    KIND[92] = ESCAPE
    return 0


_fill_table()


cdef inline const unsigned char* _blanks(const unsigned char* at) noexcept:
    while at[0] == 32 or at[0] == 10 or at[0] == 13 or at[0] == 9:
        at += 1
    return at


cdef inline bint _follows(unsigned char octet) noexcept:
    return octet & 0xC0 == 0x80


cdef const unsigned char* _character(const unsigned char* at) noexcept:
    """Behind the UTF-8 character (RFC 3629 §4) beyond ASCII at `at`; NULL when it is none."""
    if at[0] < 0xC2:
        return NULL
    if at[0] < 0xE0:
        return at + 2 if _follows(at[1]) else NULL
    if at[0] < 0xF0:
        if not _follows(at[1]) or not _follows(at[2]) or (at[0] == 0xE0 and at[1] < 0xA0) or (at[0] == 0xED and at[1] > 0x9F):
            return NULL
        return at + 3
    if at[0] > 0xF4 or (at[0] == 0xF0 and at[1] < 0x90) or (at[0] == 0xF4 and at[1] > 0x8F):
        return NULL
    return at + 4 if _follows(at[1]) and _follows(at[2]) and _follows(at[3]) else NULL


cdef const unsigned char* _string(const unsigned char* at, bint* escaped) noexcept:
    """The closing quote of the string that begins at `at`; NULL when it is none, or one for the decoder.

    The octets end with a NUL, which no string holds: nothing is read behind it.
    """
    cdef unsigned char kind
    cdef int digit
    escaped[0] = False
    while True:
        kind = KIND[at[0]]
        if kind == STANDS:
            at += 1
        elif kind == QUOTE:
            return at
        elif kind == HIGH:
            at = _character(at)
            if at == NULL:
                return NULL
        elif kind == CONTROL:
            return NULL
        else:
            escaped[0] = True
            if at[1] in b'"\\/bfnrt':
                at += 2
            elif at[1] == 117:
                for digit in range(2, 6):
                    if at[digit] not in b"0123456789abcdefABCDEF":
                        return NULL
                if at[2] in b"dD" and at[3] in b"89abcdefABCDEF":  # half of a surrogate pair, or its beginning
                    return NULL
                at += 6
            else:
                return NULL


cdef const unsigned char* _number(const unsigned char* at, bint* whole) noexcept:
    """Behind the number at `at`; NULL when it is none, or one for the decoder. `whole`: it is an integer in its one spelling."""
    cdef const unsigned char* start
    cdef bint negative = at[0] == 45
    whole[0] = True
    if negative:
        at += 1
    start = at
    while 48 <= at[0] <= 57:
        at += 1
    if at == start or at - start > DIGITS or (start[0] == 48 and at - start > 1):
        return NULL
    if negative and start[0] == 48:
        whole[0] = False
    if at[0] == 46:
        whole[0] = False
        at += 1
        start = at
        while 48 <= at[0] <= 57:
            at += 1
        if at == start or at - start > DIGITS:
            return NULL
    return NULL if at[0] == 101 or at[0] == 69 else at


cdef const unsigned char* _value(const unsigned char* at, int depth, Slot* slot) noexcept:
    """Behind the JSON value at `at`, which is noted in `slot` unless that is NULL; NULL when it is none, or one for the decoder."""
    cdef const unsigned char* start = at
    cdef bint flag = False
    cdef unsigned char closing
    cdef Held held = VALUE
    if at[0] == 34:
        at = _string(at + 1, &flag)
        if at == NULL:
            return NULL
        at += 1
        if not flag:
            if slot != NULL:
                slot.held = TEXT
                slot.start = start + 1
                slot.length = at - start - 2
            return at
    elif at[0] == 45 or 48 <= at[0] <= 57:
        at = _number(at, &flag)
        if at == NULL:
            return NULL
        if flag:
            held = NUMBER
    elif at[0] == 116 and strncmp(<const char*>at, b"true", 4) == 0:
        at += 4
    elif at[0] == 102 and strncmp(<const char*>at, b"false", 5) == 0:
        at += 5
    elif at[0] == 110 and strncmp(<const char*>at, b"null", 4) == 0:
        at += 4
    elif at[0] == 91 or at[0] == 123:
        if depth == DEPTH:
            return NULL
        closing = at[0] + 2
        at = _blanks(at + 1)
        if at[0] == closing:
            at += 1
        else:
            while True:
                if closing == 125:
                    if at[0] != 34:
                        return NULL
                    at = _string(at + 1, &flag)
                    if at == NULL:
                        return NULL
                    at = _blanks(at + 1)
                    if at[0] != 58:
                        return NULL
                    at = _blanks(at + 1)
                at = _value(at, depth + 1, NULL)
                if at == NULL:
                    return NULL
                at = _blanks(at)
                if at[0] == 44:
                    at = _blanks(at + 1)
                elif at[0] == closing:
                    at += 1
                    break
                else:
                    return NULL
    else:
        return NULL
    if slot != NULL:
        slot.held = held
        slot.start = start
        slot.length = at - start
    return at


cdef inline unsigned int _digit(unsigned char octet) noexcept:
    return octet - 48 if octet < 58 else (octet | 32) - 87


def loosely(str name not None) -> str:
    """The form in which names of tags and fields are compared: without case and underscores."""
    return name.replace("_", "").lower()


@cython.final
cdef class Names:
    """The field names that the templates of one campaign ask for. To be complete before the first Row is made of it."""

    def __cinit__(self):
        self.exact = {}
        self.loose = {}
        self.count = 0

    def slot(self, str name not None, *, bint loose=False) -> int:
        """The number under which a Row keeps the field `name`; `loose`: the last field of that name without case and underscores."""
        cdef dict table = self.loose if loose else self.exact
        if loose:
            name = loosely(name)
        if name not in table:
            table[name] = self.count
            self.count += 1
        return table[name]

    cdef int slots(self, str name, int* exact, int* loose) except -1:
        exact[0] = self.exact.get(name, -1)
        loose[0] = self.loose.get(loosely(name), -1) if self.loose else -1
        return 0


@cython.final
cdef class Row:
    """One recipient at a time. `base_url` begins the unsubscribe and web view links.

    `decode(data)` yields the merge data as a dict, `decode_value(data)` one JSON value; `shared` holds the variables that are the same
    for the whole group. Each signer makes one purpose's tokens; click and open may be None.
    """

    def __cinit__(self, Names names not None, bytes base_url not None):
        cdef int purpose
        cdef bytes prefix
        self.names = names
        self.slot = <Slot*>calloc(names.count + 1, sizeof(Slot))
        self.values = [_UNREAD] * names.count
        self.email_slot = names.exact.get("email", -1)
        self.id_slot = names.exact.get("id", -1)
        self.kept = []
        self.known = NULL
        self.known_count = self.known_room = 0
        self.plain = NULL
        self.plain_used = self.plain_room = 0
        self.known_at = {}
        self.expected = <int*>calloc(MOST_KNOWN, sizeof(int))
        if self.slot == NULL or self.expected == NULL:
            raise MemoryError
        for purpose in range(PURPOSES):
            self.written[<int>purpose].prefix = self.written[<int>purpose].length = 0
        for purpose, path in ((UNSUBSCRIBE, b"/u/"), (WEB_VIEW, b"/w/")):
            prefix = base_url + path
            if len(prefix) + 128 > sizeof(self.written[<int>purpose].text):
                raise ValueError(f"a base URL has at most 500 octets, got {len(base_url)}")
            self.written[<int>purpose].prefix = len(prefix)
            memcpy(self.written[<int>purpose].text, PyBytes_AS_STRING(prefix), len(prefix))

    def __dealloc__(self):
        free(self.slot)
        free(self.known)
        free(self.plain)
        free(self.expected)

    cdef int read(self, object recipient, str email, bint needs_data) except -1:
        """Take the next recipient; `numbers` are set by the caller. Raises what `decode` raises for data that is no JSON object."""
        cdef int number
        self.subscriber_id = recipient.subscriber_id
        self.email = email
        self.whole = None
        self.made = None
        for number in range(PURPOSES):
            self.written[number].length = 0
        for number in range(self.names.count):
            self.slot[number].held = ABSENT
            if self.values[number] is not _UNREAD:
                self.values[number] = _UNREAD
        data = recipient.data
        self.data = data if type(data) is bytes else bytes(data)
        if needs_data:
            if not self.scan():
                self.whole = self.decode(self.data)
                self.spread()
            self.own()
        return 0

    cdef int own(self) except -1:
        """Address and id stand above fields of those names."""
        if self.email_slot >= 0:
            self.slot[self.email_slot].held = TEXT
            self.slot[self.email_slot].start = utf8(self.email, &self.slot[self.email_slot].length)
            self.values[self.email_slot] = self.email
        if self.id_slot >= 0:
            self.slot[self.id_slot].held = OBJECT
            self.values[self.id_slot] = self.subscriber_id
        return 0

    cdef int scan(self) except -1:
        """Note where the fields stand that are asked for. False: the decoder is to be asked."""
        cdef const unsigned char* at = <const unsigned char*>PyBytes_AS_STRING(self.data)
        cdef const unsigned char* end = at + len(self.data)
        cdef const unsigned char* name
        cdef Py_ssize_t length
        cdef Known* known
        cdef Slot found
        cdef bint escaped
        cdef int field = 0, which
        self.plain_used = 0
        if len(self.data) == 0:
            return True
        at = _blanks(at)
        if at[0] != 123:
            return False
        at = _blanks(at + 1)
        if at[0] == 125:
            return _blanks(at + 1) == end
        while True:
            if at[0] != 34:
                return False
            name = at + 1
            # Most rows name the same fields in the same order
            which = self.expected[field]
            known = &self.known[which]
            if which < self.known_count and known.length < end - name and memcmp(name, known.start, known.length) == 0 and name[known.length] == 34:
                at = name + known.length
            else:
                at = _string(name, &escaped)
                if at == NULL or escaped:
                    return False
                which = self.name_of(name, at - name)
                if which < 0:
                    return False
                known = &self.known[which]
                self.expected[field] = which
            at = _blanks(at + 1)
            if at[0] != 58:
                return False
            at = _blanks(at + 1)
            if known.exact < 0 and known.loose < 0:
                at = _value(at, 0, NULL)
            else:
                at = _value(at, 0, &found)
                if at != NULL and found.held == VALUE and found.start[0] == 34:
                    self.unescape(&found)
            if at == NULL:
                return False
            if known.exact >= 0:
                self.slot[known.exact] = found
            if known.loose >= 0:
                self.slot[known.loose] = found
            at = _blanks(at)
            if at[0] == 125:
                return _blanks(at + 1) == end
            if at[0] != 44:
                return False
            at = _blanks(at + 1)
            field += 1
            if field == MOST_KNOWN:
                return False

    cdef int unescape(self, Slot* slot) except -1:
        """Write out the text with escapes (RFC 8259 §7) in `slot`, as a text that stands in memory of ours.

        It stays as it is, for the decoder, when one of them is a control character: no text that is not looked at again holds any.
        """
        cdef const unsigned char* at = slot.start + 1
        cdef const unsigned char* end = slot.start + slot.length - 1
        cdef unsigned char* out
        cdef unsigned int code
        if self.plain_room < len(self.data):  # all texts of a row become no longer than they are; so none of them moves
            free(self.plain)
            self.plain_room = 2 * len(self.data)
            self.plain = <unsigned char*>malloc(self.plain_room)
            if self.plain == NULL:
                self.plain_room = 0
                raise MemoryError
        out = self.plain + self.plain_used
        while at < end:
            if at[0] != 92:
                out[0] = at[0]
                out += 1
                at += 1
                continue
            if at[1] == 117:
                code = _digit(at[2]) << 12 | _digit(at[3]) << 8 | _digit(at[4]) << 4 | _digit(at[5])
                at += 6
            elif at[1] in b'"\\/':
                code = at[1]
                at += 2
            else:
                return 0
            if code < 32:
                return 0
            if code < 0x80:
                out[0] = code
                out += 1
            elif code < 0x800:
                out[0], out[1] = 0xC0 | code >> 6, 0x80 | code & 0x3F
                out += 2
            else:
                out[0], out[1], out[2] = 0xE0 | code >> 12, 0x80 | code >> 6 & 0x3F, 0x80 | code & 0x3F
                out += 3
        slot.held = TEXT
        slot.start = self.plain + self.plain_used
        slot.length = out - slot.start
        self.plain_used = out - self.plain
        return 0

    cdef int name_of(self, const unsigned char* start, Py_ssize_t length) except -1:
        """The index of a field name among those that were met; -2: there is no room for more."""
        cdef bytes name = PyBytes_FromStringAndSize(<const char*>start, length)
        cdef Known* grown
        cdef Known* known
        found = self.known_at.get(name)
        if found is not None:
            return found
        if self.known_count == MOST_KNOWN:
            return -2
        if self.known_count == self.known_room:
            grown = <Known*>realloc(self.known, (self.known_room * 2 + 16) * sizeof(Known))
            if grown == NULL:
                raise MemoryError
            self.known = grown
            self.known_room = self.known_room * 2 + 16
        known = &self.known[self.known_count]
        known.start = <const unsigned char*>PyBytes_AS_STRING(name)
        known.length = length
        self.names.slots(name.decode("utf-8"), &known.exact, &known.loose)
        self.kept.append(name)
        self.known_at[name] = self.known_count
        self.known_count += 1
        return self.known_count - 1

    cdef int spread(self) except -1:
        """Put what the decoder made where the templates look."""
        cdef int exact, loose
        for name, value in self.whole.items():
            self.names.slots(name, &exact, &loose)
            if exact >= 0:
                self.slot[exact].held = OBJECT
                self.values[exact] = value
            if loose >= 0:
                self.slot[loose].held = OBJECT
                self.values[loose] = value
        return 0

    cdef object value(self, int number):
        """What the field holds; MISSING when there is none."""
        cdef Slot* slot = &self.slot[number]
        cdef object value
        if slot.held == ABSENT:
            return MISSING
        value = self.values[number]
        if value is _UNREAD:
            if slot.held == TEXT:
                value = PyUnicode_DecodeUTF8(<const char*>slot.start, slot.length, NULL)
            else:
                value = self.decode_value(PyBytes_FromStringAndSize(<const char*>slot.start, slot.length))
            self.values[number] = value
        return value

    cdef dict subscriber(self):
        """All fields, decoded, with address and id."""
        if self.whole is None:
            self.whole = self.decode(self.data)
        self.whole["id"] = self.subscriber_id
        self.whole["email"] = self.email
        return self.whole

    cdef dict scope(self):
        """The global variables as one dict, for what looks them up by name."""
        if self.made is None:
            self.made = self.shared.copy()
            self.made["subscriber"] = self.subscriber()
            self.made["links"] = {"unsubscribe": self.url_text(UNSUBSCRIBE), "web_view": self.url_text(WEB_VIEW)}
            if self.click_signer is not None:
                self.made["click token"] = self.token_text(CLICK)
            if self.open_signer is not None:
                self.made["open token"] = self.token_text(OPEN)
        return self.made

    cdef const char* url(self, Purpose purpose, int* length) except NULL:
        """The octets of a whole link; of a click or open token, which has no prefix."""
        cdef Written* written = &self.written[<int>purpose]
        cdef Signer signer
        if written.length == 0:
            if purpose == UNSUBSCRIBE:
                signer = self.unsubscribe_signer
            elif purpose == WEB_VIEW:
                signer = self.web_view_signer
            elif purpose == CLICK:
                signer = self.click_signer
            else:
                signer = self.open_signer
            written.length = written.prefix + signer.write(self.numbers, 3, written.text + written.prefix)
        length[0] = written.length
        return written.text

    cdef const char* token(self, Purpose purpose, int* length) except NULL:
        """The token at the end of that link."""
        cdef const char* text = self.url(purpose, length)
        length[0] -= self.written[<int>purpose].prefix
        return text + self.written[<int>purpose].prefix

    cdef object url_text(self, Purpose purpose):
        cdef int length
        cdef const char* text = self.url(purpose, &length)
        return PyUnicode_FromStringAndSize(text, length)

    cdef object token_text(self, Purpose purpose):
        cdef int length
        cdef const char* text = self.token(purpose, &length)
        return PyUnicode_FromStringAndSize(text, length)
