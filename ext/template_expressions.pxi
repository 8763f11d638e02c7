# The expressions of a program; included by template.pyx: one module, so that nothing goes through another module's door.

PERSONAL = frozenset(("subscriber", "links", "click token", "open token"))


cdef class Expression:
    """Yields a value, as python-liquid's `Expression.evaluate` would.

    `slot`: where a Row keeps it, when it is nothing but a field; else -1.
    """

    cdef int slot

    def __cinit__(self):
        self.slot = -1

    cdef object value(self, Frame frame):
        raise NotImplementedError

    cdef bint truth(self, Frame frame) except -1:
        cdef object value = self.value(frame)
        if value is True or type(value) is str:
            return True
        if value is None or value is False:
            return False
        if type(value) is Undefined:
            return False
        return is_truthy(value)


@cython.final
cdef class Constant(Expression):
    cdef object held

    def __init__(self, held):
        self.held = held

    cdef object value(self, Frame frame):
        return self.held


@cython.final
cdef class Foreign(Expression):
    """Any expression of python-liquid, evaluated by itself."""

    cdef object expression

    def __init__(self, expression):
        self.expression = expression

    cdef object value(self, Frame frame):
        frame.count(1)
        return self.expression.evaluate(frame.foreign())


@cython.final
cdef class Path(Expression):
    """A variable and the keys below it. `keys` are `str` or `int` or expressions; `missing` is what stands for no value.

    `direct` tells that no tag of the template can hide the root name, so it is looked up among the globals only. `slot` is where a Row
    keeps the field that root and first key name, or -1.
    """

    cdef str root
    cdef tuple keys
    cdef object missing
    cdef bint direct
    cdef int field

    def __init__(self, str root not None, tuple keys not None, missing, bint direct, int slot=-1):
        self.root = root
        self.keys = keys
        self.missing = missing
        self.direct = direct
        self.field = slot
        if len(keys) == 1:
            self.slot = slot

    cdef object value(self, Frame frame):
        cdef object found, key
        cdef Py_ssize_t at = 0
        if self.field >= 0 and frame.row is not None:
            found = frame.row.value(self.field)
            at = 1
        elif not self.direct:
            found = frame.lookup(self.root)
        else:
            found = frame.common().get(self.root, MISSING)
            if found is MISSING and frame.globals is None and self.root in PERSONAL:
                found = frame.variables().get(self.root, MISSING)
        if found is MISSING:
            return self.missing
        for at in range(at, len(self.keys)):
            key = self.keys[at]
            if isinstance(key, Expression):
                key = (<Expression>key).value(frame)
                if type(key) is not str and type(key) is not int:
                    found = self.below(frame, found, key)
                    if found is MISSING:
                        return self.missing
                    continue
            if type(found) is dict and key != "size" and key != "first" and key != "last":
                found = (<dict>found).get(key, MISSING)
            else:
                found = self.below(frame, found, key)
            if found is MISSING:
                return self.missing
        return found

    cdef object below(self, Frame frame, object found, object key):
        if type(found) is ForLoop and type(key) is str and key != "size":
            try:
                return found[key]
            except KeyError:
                return MISSING
        try:
            return frame.foreign().get_item(found, key)
        except (KeyError, TypeError, IndexError):
            return MISSING


@cython.final
cdef class Range(Expression):
    """What `make(start, stop)` answers, as python-liquid does for `(start..stop)`."""

    cdef Expression start, stop
    cdef object make

    def __init__(self, Expression start not None, Expression stop not None, make):
        self.start = start
        self.stop = stop
        self.make = make

    cdef object value(self, Frame frame):
        return self.make(self.start.value(frame), self.stop.value(frame))


@cython.final
cdef class Field(Expression):
    """The subscriber's field `name`, its spelling without case and underscores; "" where there is none."""

    cdef str name

    def __init__(self, str name not None, int slot):
        self.name = loosely(name)
        self.slot = slot

    cdef object value(self, Frame frame):
        cdef object found = MISSING
        if frame.row is not None:
            found = frame.row.value(self.slot)
        else:
            for name, value in frame.globals["subscriber"].items():
                if type(name) is str and loosely(name) == self.name:
                    found = value
        return "" if found is None or found is MISSING else found


@cython.final
cdef class Function(Expression):
    """A value computed from the subscriber's id by a Python function."""

    cdef object function

    def __init__(self, function):
        self.function = function

    cdef object value(self, Frame frame):
        if frame.row is not None:
            return self.function(frame.row.subscriber_id)
        return self.function(frame.globals["subscriber"].get("id", ""))


@cython.final
cdef class Compare(Expression):
    """A comparison by python-liquid's own rule `function(left, right)`; `equals` lets two plain strings skip it."""

    cdef Expression left, right
    cdef object function
    cdef bint equals, negated
    cdef bytes octets   # of a text on the right, where a field of the Row is on the left

    def __init__(self, Expression left not None, Expression right not None, function, *, bint equals=False, bint negated=False):
        self.left = left
        self.right = right
        self.function = function
        self.equals = equals
        self.negated = negated
        self.octets = None
        if equals and left.slot >= 0 and type(right) is Constant and isinstance((<Constant>right).held, str):
            self.octets = (<Constant>right).held.encode("utf-8")

    cdef object value(self, Frame frame):
        return self.truth(frame)

    cdef bint truth(self, Frame frame) except -1:
        cdef object left, right
        cdef bint answer
        cdef Slot* slot
        if self.octets is not None and frame.row is not None:
            slot = &frame.row.slot[self.left.slot]
            if slot.held == TEXT:
                answer = slot.length == len(self.octets) and memcmp(slot.start, <const char*>self.octets, slot.length) == 0
                return not answer if self.negated else answer
        left = self.left.value(frame)
        right = self.right.value(frame)
        frame.count(1 + effort(left))
        if self.equals and type(left) is str and isinstance(right, str):
            answer = <str>left == right
        else:
            answer = bool(self.function(left, right))
        return not answer if self.negated else answer


@cython.final
cdef class Both(Expression):
    """`left and right`, or `left or right` where `either` is set."""

    cdef Expression left, right
    cdef bint either

    def __init__(self, Expression left not None, Expression right not None, bint either):
        self.left = left
        self.right = right
        self.either = either

    cdef object value(self, Frame frame):
        return self.truth(frame)

    cdef bint truth(self, Frame frame) except -1:
        cdef bint left = self.left.truth(frame)
        if left == self.either:
            return left
        return self.right.truth(frame)


cdef enum:  # filters with a short way for plain strings
    ORDINARY, DEFAULT, ESCAPE, ROUND

MEMO_ENTRIES = 65_536       # answers that the filters of one template keep, all together: some 15 MB at the very most
FILTER_MEMO_ENTRIES = 8192  # and one of them: the days of twenty years

cdef Py_ssize_t MEMO_CHARACTERS = 40


@cython.final
cdef class Filter:
    """One filter with its arguments. `function` is python-liquid's own; `wants` names what it is given besides:

    "context" (python-liquid's), "scope" (the global variables that are the same for everybody) or "" (nothing).

    `may_keep(text)` tells for which texts the answer is always the same, so that it can be kept: a list holds the same
    cities, plans and days over and over. None: for none. `room` is how many are kept.
    """

    cdef public Py_ssize_t room

    cdef str name
    cdef object function
    cdef tuple arguments
    cdef dict named
    cdef str wants
    cdef int kind, start, weight
    cdef object may_keep
    cdef dict kept

    def __init__(
        self, str name not None, function, tuple arguments not None, dict named not None, str wants not None, bint autoescape, may_keep
    ):
        self.kept = {}
        self.room = FILTER_MEMO_ENTRIES
        self.may_keep = may_keep
        for argument in (*arguments, *named.values()):
            if type(argument) is not Constant:
                self.may_keep = None
        self.name = name
        self.function = function
        self.arguments = arguments
        self.named = named
        self.wants = wants
        self.kind = ORDINARY
        self.start = 50 if wants == "scope" else 1  # a date in words takes long to read
        self.weight = WEIGHTS.get(name, 1)
        if name == "default" and len(arguments) == 1 and not named:
            self.kind = DEFAULT
        elif name == "escape" and not arguments and not named and autoescape:
            self.kind = ESCAPE
        elif name == "round" and not arguments and not named:
            self.kind = ROUND

    @property
    def keeps(self) -> bool:
        """Whether it keeps any answers."""
        return self.kind == ORDINARY and self.may_keep is not None

    cdef object apply(self, Frame frame, object value):
        cdef object answer
        cdef double number
        cdef bint plain = type(value) is str
        if plain:
            if self.kind == DEFAULT:
                return value if value else guard((<Expression>self.arguments[0]).value(frame))
            if self.kind == ESCAPE:
                frame.count(1 + (len(<str>value) >> 5))
                return markup_escape(value)
            if self.kind == ROUND and "." in value and len(<str>value) <= MEMO_CHARACTERS:
                try:
                    number = float(<str>value)
                except ValueError:
                    return self.call(frame, value)
                if -1e15 < number < 1e15:  # halves go to the even number, as Python rounds
                    frame.count(1)
                    return <long long>rint(number)
            if self.may_keep is not None and self.room and len(<str>value) <= MEMO_CHARACTERS:
                answer = self.kept.get(value)
                if answer is not None:
                    frame.count(1)
                    return answer
                answer = self.call(frame, value)
                if isinstance(answer, str) and len(answer) <= 4 * MEMO_CHARACTERS and self.may_keep(value):
                    if len(self.kept) >= self.room:
                        self.kept.clear()
                    self.kept[value] = answer
                return answer
        elif value is None and self.kind == DEFAULT:
            return guard((<Expression>self.arguments[0]).value(frame))
        return self.call(frame, value)

    cdef object call(self, Frame frame, object value):
        cdef list arguments = [guard(value)]
        cdef dict named
        frame.count(self.start + effort(value) * self.weight)
        for argument in self.arguments:
            arguments.append(guard((<Expression>argument).value(frame)))
        try:
            if not self.named and not self.wants:
                return self.answer(frame, self.function(*arguments))
            named = {name: guard((<Expression>argument).value(frame)) for name, argument in self.named.items()}
            if self.wants:
                named[self.wants] = frame.foreign() if self.wants == "context" else frame.common()
            return self.answer(frame, self.function(*arguments, **named))
        except TypeError as error:
            raise LiquidTypeError(f"{self.name}: {error}", token=None) from error

    cdef object answer(self, Frame frame, object answer):
        frame.count(effort(answer))
        return guard(answer)


@cython.final
cdef class Filtered(Expression):
    cdef Expression left
    cdef list filters

    def __init__(self, Expression left not None, list filters not None):
        self.left = left
        self.filters = filters

    cdef object value(self, Frame frame):
        cdef object value = self.left.value(frame)
        for one in self.filters:
            value = (<Filter>one).apply(frame, value)
        return value
