# The operations of a program; included by template.pyx.


cdef enum:  # what an operation answers
    ON, BREAK, CONTINUE


cdef class Operation:
    """Writes text or changes the scope, as python-liquid's `Node.render` would."""

    def __cinit__(self):
        self.at = -1

    cdef int run(self, Frame frame) except -1:
        raise NotImplementedError


@cython.final
cdef class Literal(Operation):
    cdef str text
    cdef Piece piece

    def __init__(self, str text not None):
        self.text = text
        self.piece = Piece(text)

    cdef int run(self, Frame frame) except -1:
        if frame.pieces is not None:
            return frame.write(self.text, False)
        self.piece.write(frame.wire)
        return frame.within()


cdef enum:  # where a value is written
    PLAIN_TEXT, HTML_TEXT, LINK, URL, URL_PART


@cython.final
cdef class Output(Operation):
    """Writes a value. `place`: "" in plain text, "html", and in an address "url" where it begins with it, "part" further on,
    "link" where it is only escaped.

    `name` says in reports what was asked for; `empty` counts how often nothing came out.
    """

    cdef Expression expression
    cdef int place, slot
    cdef readonly str name
    cdef public Py_ssize_t empty

    def __init__(self, Expression expression not None, str place not None, str name=""):
        cdef Filter only
        self.expression = expression
        self.place = {"": PLAIN_TEXT, "html": HTML_TEXT, "link": LINK, "url": URL, "part": URL_PART}[place]
        self.name = name
        self.empty = 0
        self.slot = expression.slot
        if type(expression) is Filtered and len((<Filtered>expression).filters) == 1:
            only = (<Filtered>expression).filters[0]
            if (only.kind == DEFAULT or only.kind == ESCAPE) and (<Filtered>expression).left.slot >= 0 and (only.kind == DEFAULT or self.place != PLAIN_TEXT):
                self.slot = (<Filtered>expression).left.slot  # what the filter does to a text that is there, writing it does

    cdef int run(self, Frame frame) except -1:
        cdef object value
        cdef Slot* slot
        cdef bint html = self.place != PLAIN_TEXT
        if self.slot >= 0 and frame.row is not None and frame.pieces is None:
            slot = &frame.row.slot[self.slot]
            if (slot.held == TEXT and slot.length) or slot.held == NUMBER:
                if slot.length > _VALUE_LIMIT:
                    guard(frame.row.value(self.slot))
                if self.place >= URL:
                    put_url(frame.wire, slot.start, slot.length, self.place == URL_PART)
                else:
                    put_text(frame.wire, slot.start, slot.length, html)
                return frame.within()
        value = self.expression.value(frame)
        if type(value) is not str and type(value) is not Markup:
            if type(value) is int:
                value = str(value)
            elif value is None or type(value) is Undefined or isinstance(value, Undefined):
                self.empty += 1
                return ON
            else:
                value = to_liquid_string(value, html)
            if self.place < LINK:
                if not value:
                    self.empty += 1
                return frame.write(value, False)
            if type(value) is Markup:
                value = value.unescape()
        if not value:
            self.empty += 1
            return ON
        if self.place >= URL:
            return self.address(frame, value.unescape() if type(value) is Markup else value)
        if self.place == LINK:
            return frame.write(str(value), True)
        return frame.write(value, html and type(value) is str)

    cdef int address(self, Frame frame, object value) except -1:
        cdef Py_ssize_t length
        cdef const unsigned char* source
        if frame.pieces is not None:
            return frame.write(url_encoded(value, component=self.place == URL_PART), self.place == URL)
        source = utf8(value, &length)
        put_url(frame.wire, source, length, self.place == URL_PART)
        return frame.within()


@cython.final
cdef class Link(Operation):
    """Writes a signed link of the recipient (0 unsubscribe, 1 web view), or a token alone (2 click, 3 open).

    `expression` yields the same where there is no Row.
    """

    cdef Purpose purpose
    cdef Output otherwise

    def __init__(self, int purpose, Expression expression not None, str place not None):
        if not 0 <= purpose <= 3:
            raise ValueError(f"there is no link {purpose}")
        self.purpose = <Purpose>purpose
        self.otherwise = Output(expression, place)

    cdef int run(self, Frame frame) except -1:
        cdef int length, prefix
        cdef const char* text
        if frame.row is None or frame.pieces is not None:
            return self.otherwise.run(frame)
        text = frame.row.url(self.purpose, &length)
        prefix = frame.row.written[<int>self.purpose].prefix
        put_text(frame.wire, <const unsigned char*>text, prefix, self.otherwise.place != PLAIN_TEXT)
        put_plain(frame.wire, <const unsigned char*>text + prefix, length - prefix)
        return frame.within()


@cython.final
cdef class Block(Operation):
    """Operations one after the other."""

    def __init__(self, list operations not None):
        for operation in operations:
            if not isinstance(operation, Operation):
                raise TypeError(f"a block consists of operations, got {type(operation).__name__}")
        self.operations = operations

    cdef int run(self, Frame frame) except -1:
        cdef int answer
        frame.count(len(self.operations))
        for operation in self.operations:  # all of them are Operations: looked at once, when the block was made
            if (<Operation>operation).at >= 0:
                frame.program.at = (<Operation>operation).at
            answer = (<Operation>operation).run(frame)
            if answer:
                return answer
        return ON


@cython.final
cdef class If(Operation):
    """The block of the first condition that holds, else `default`. `negated` turns the first condition around (unless)."""

    cdef list conditions, blocks
    cdef Block default
    cdef bint negated

    def __init__(self, list conditions not None, list blocks not None, Block default, bint negated):
        self.conditions = conditions
        self.blocks = blocks
        self.default = default
        self.negated = negated

    cdef int run(self, Frame frame) except -1:
        cdef Py_ssize_t at
        cdef bint turned = self.negated
        for at in range(len(self.conditions)):
            if (<Expression>self.conditions[at]).truth(frame) != turned:
                return (<Block>self.blocks[at]).run(frame)
            turned = False
        if self.default is not None:
            return self.default.run(frame)
        return ON


@cython.final
cdef class Case(Operation):
    """`when` blocks run once for each value that matches; `else` blocks (no values) when none before them did."""

    cdef Expression left
    cdef list branches
    cdef object equal

    def __init__(self, Expression left not None, list branches not None, equal):
        self.left = left
        self.branches = branches
        self.equal = equal

    cdef int run(self, Frame frame) except -1:
        cdef bint matched = False
        cdef int answer, count
        cdef object left, values, block
        for values, block in self.branches:
            count = 0
            if values is None:
                count = 0 if matched else 1
            else:
                left = self.left.value(frame)
                for value in values:
                    if self.equal(left, (<Expression>value).value(frame)) is True:
                        count += 1
                if count:
                    matched = True
            while count:
                count -= 1
                answer = (<Block>block).run(frame)
                if answer:
                    return answer
        return ON


@cython.final
cdef class For(Operation):
    """A loop over `iterable`; `foreign` (python-liquid's loop expression) is asked instead where it has limit or offset.

    `loop_name` is the name of the `forloop` object, or None when the template never looks at it.
    """

    cdef str name, loop_name
    cdef Expression iterable
    cdef object foreign
    cdef Block block, default

    def __init__(self, str name not None, Expression iterable not None, foreign, Block block not None, Block default, str loop_name):
        self.name = name
        self.iterable = iterable
        self.foreign = foreign
        self.block = block
        self.default = default
        self.loop_name = loop_name

    cdef int run(self, Frame frame) except -1:
        cdef object items, loop = None, iterator
        cdef Py_ssize_t length
        cdef dict namespace
        cdef int answer
        if self.foreign is not None:
            guard(self.iterable.value(frame))
            iterator, length = self.foreign.evaluate(frame.foreign())
        else:
            items = self.iterable.value(frame)
            if isinstance(items, dict):
                items = list(items.items())
            elif isinstance(items, str):
                items = [items] if items else []
            elif type(items) is Undefined:
                items = ()
            elif not isinstance(items, (list, tuple, range)):
                iterator, length = self.block_iterator(frame, items)
                items = list(iterator)
            guard(items)
            iterator = iter(items)
            length = len(items)
        if not length:
            return self.default.run(frame) if self.default is not None else ON
        frame.count_loop(length)
        namespace = {self.name: None}
        if self.loop_name is not None:
            loop = ForLoop(name=self.loop_name, it=iterator, length=length, parentloop=self.around(frame))
            namespace = {"forloop": loop, self.name: None}
            iterator = loop
        frame.push(namespace, loop)
        try:
            for item in iterator:
                namespace[self.name] = item
                answer = self.block.run(frame)
                if answer == BREAK:
                    break
        finally:
            frame.pop(loop)
        return ON

    cdef object around(self, Frame frame):
        """The `forloop` of the loop around this one."""
        for loop in reversed(frame.loops):
            if hasattr(loop, "parentloop"):
                return loop
        return Undefined("parentloop", token=None)

    cdef object block_iterator(self, Frame frame, object items):
        """What python-liquid loops over for a value that is no plain list, mapping or text."""
        if isinstance(items, Mapping):
            return iter(items.items()), len(items)
        if isinstance(items, Sequence):
            return iter(items), len(items)
        return iter(()), 0


@cython.final
cdef class Assign(Operation):
    cdef str name
    cdef Expression expression

    def __init__(self, str name not None, Expression expression not None):
        self.name = name
        self.expression = expression

    cdef int run(self, Frame frame) except -1:
        frame.locals[self.name] = guard(self.expression.value(frame))
        return ON


@cython.final
cdef class Capture(Operation):
    cdef str name
    cdef Block block
    cdef bint autoescape

    def __init__(self, str name not None, Block block not None, bint autoescape):
        self.name = name
        self.block = block
        self.autoescape = autoescape

    cdef int run(self, Frame frame) except -1:
        cdef list kept = frame.pieces, pieces = []
        cdef int answer
        cdef str text
        frame.pieces = pieces
        try:
            answer = self.block.run(frame)
        finally:
            frame.pieces = kept
        if answer:
            return answer  # a break inside: python-liquid leaves the name unassigned
        text = guard("".join(pieces))
        frame.locals[self.name] = Markup(text) if self.autoescape else text
        return ON


@cython.final
cdef class Followed(Operation):
    """Writes the link that leads to the address which `block` yields, as `otherwise(text, globals)` makes it.

    With a `sealer` it does the same in octets: `judge(text)` answers the address to be followed for one that it does not take as it
    stands, or None: then the text stays.
    """

    cdef Block block
    cdef object judge, otherwise
    cdef Sealer sealer

    def __init__(self, Block block not None, otherwise, Sealer sealer=None, judge=None):
        self.block = block
        self.sealer = sealer
        self.judge = judge
        self.otherwise = otherwise

    cdef int run(self, Frame frame) except -1:
        cdef list kept = frame.pieces, pieces = []
        cdef int answer, size
        cdef const char* token
        cdef object text
        frame.pieces = pieces
        try:
            answer = self.block.run(frame)
        finally:
            frame.pieces = kept
        if answer:
            return answer
        frame.count(1)
        text = guard("".join(pieces))
        if frame.row is None or kept is not None or self.sealer is None:
            return frame.write(self.otherwise(text, frame.variables() if self.sealer is not None else {}), False)
        token = frame.row.url(CLICK, &size)
        if not self.sealer.write(frame.wire, token, size, text):
            address = self.judge(text)
            if address is None:
                return frame.write(text, False)
            self.sealer.seal(frame.wire, token, size, address)
        return frame.within()


@cython.final
cdef class Choice(Operation):
    """One of its blocks, by `seed` and the subscriber's id."""

    cdef list blocks
    cdef bytes seed

    def __init__(self, list blocks not None, bytes seed not None):
        self.blocks = blocks
        self.seed = seed

    cdef int run(self, Frame frame) except -1:
        cdef unsigned char[32] digest
        cdef unsigned long long number = 0
        cdef int at
        cdef bytes text
        who = frame.row.subscriber_id if frame.row is not None else frame.globals.get("subscriber", {}).get("id", "")
        text = self.seed + str(who).encode("utf-8")
        sha256(text, len(text), digest)
        for at in range(8):
            number = number << 8 | digest[at]
        return (<Block>self.blocks[number % <unsigned long long>len(self.blocks)]).run(frame)


@cython.final
cdef class Interrupt(Operation):
    cdef int answer

    def __init__(self, bint again):
        self.answer = CONTINUE if again else BREAK

    cdef int run(self, Frame frame) except -1:
        return self.answer


@cython.final
cdef class ForeignNode(Operation):
    """Any node of python-liquid, rendered by itself; its text is final. `muted`: in a block whose text is dropped."""

    cdef object node
    cdef bint muted

    def __init__(self, node, bint muted):
        self.node = node
        self.muted = muted

    cdef int run(self, Frame frame) except -1:
        cdef object context = frame.foreign(), buffer = context.get_buffer()
        cdef int answer = ON
        try:
            self.node.render(context, buffer)
        except BreakLoop:
            answer = BREAK
        except ContinueLoop:
            answer = CONTINUE
        if not self.muted:
            frame.write(buffer.getvalue(), False)
        return answer
