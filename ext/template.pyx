"""Segment programs: a template compiled once, then rendered for one recipient after the other.

Owns the operations a program consists of and their execution. What a template means is decided by python-liquid: its parse
tree is translated by `compose.liquid` into these operations, each of which yields exactly what python-liquid would, and a
node or expression without an operation of its own (`ForeignNode`, `Foreign`) is rendered by python-liquid on the same
scope. Text goes as quoted-printable straight into the message (`Frame.wire`), or is collected (`Frame.pieces`).

Limits hold natively and in python-liquid alike: `Frame.charge` counts operations, `guard` bounds the size of every value.
"""

cimport cython

from ext.body cimport Piece, Wire, put_text, utf8

from liquid.builtin.expressions.logical import is_truthy
from liquid.builtin.tags.for_tag import ForLoop
from liquid.exceptions import BreakLoop, ContinueLoop, LiquidTypeError, ResourceLimitError
from liquid.stringify import to_liquid_string
from liquid.undefined import Undefined
from markupsafe import Markup, escape as markup_escape

STEP_LIMIT = 50_000          # operations of one part of one message
LOOP_LIMIT = 10_000          # passes through all loops of one part, and the longest list a loop or a filter takes
VALUE_LIMIT = 1_000_000      # characters of one value
OUTPUT_LIMIT = 4_000_000     # octets of one part as sent
NUMBER_BITS = 4096

cdef Py_ssize_t _STEP_LIMIT = STEP_LIMIT, _LOOP_LIMIT = LOOP_LIMIT, _VALUE_LIMIT = VALUE_LIMIT, _OUTPUT_LIMIT = OUTPUT_LIMIT
cdef object _MISSING = object()


cpdef object guard(object value):
    """`value` itself; raises ResourceLimitError when it is larger than any value of a template may be."""
    if isinstance(value, str):
        if len(value) > _VALUE_LIMIT:
            raise ResourceLimitError(f"a value has {len(value)} characters, at most {VALUE_LIMIT} are allowed", token=None)
    elif isinstance(value, (list, tuple)):
        if len(value) > _LOOP_LIMIT:
            raise ResourceLimitError(f"a list has {len(value)} items, at most {LOOP_LIMIT} are allowed", token=None)
    elif isinstance(value, range):
        if value.stop - value.start > _LOOP_LIMIT:
            raise ResourceLimitError(f"a range is longer than {LOOP_LIMIT}", token=None)
    elif isinstance(value, int):
        if value.bit_length() > NUMBER_BITS:
            raise ResourceLimitError(f"a number has more than {NUMBER_BITS} bits", token=None)
    return value


@cython.final
cdef class Frame:
    """One rendering of one program: where its text goes, the scope it sees, and what it has used up."""

    def __cinit__(self, Program program not None, dict scope not None):
        self.program = program
        self.globals = scope
        self.locals = {}
        self.counters = {}
        self.scopes = []
        self.loops = []
        self.context = None
        self.wire = NULL
        self.pieces = None
        self.steps = self.passes = self.written = 0

    def charge(self, Py_ssize_t steps) -> None:
        """Count `steps` operations; raises ResourceLimitError beyond the limit."""
        self.count(steps)

    def charge_loop(self, Py_ssize_t passes) -> None:
        """Count `passes` through a loop before they are made; raises ResourceLimitError beyond the limit."""
        self.count_loop(passes)

    cdef int count(self, Py_ssize_t steps) except -1:
        self.steps += steps
        if self.steps > _STEP_LIMIT:
            raise ResourceLimitError(f"the template takes more than {STEP_LIMIT} steps", token=None)
        return 0

    cdef int count_loop(self, Py_ssize_t passes) except -1:
        self.passes += passes
        if self.passes > _LOOP_LIMIT:
            raise ResourceLimitError(f"the loops take more than {LOOP_LIMIT} passes", token=None)
        return 0

    cdef object foreign(self):
        """The python-liquid context that shares this frame's scope."""
        if self.context is None:
            self.context = self.program.make_context(self, self.globals, self.locals, self.counters, self.scopes, self.loops)
        return self.context

    cdef int push(self, dict namespace, object loop) except -1:
        self.scopes.append(namespace)
        if loop is not None:
            self.loops.append(loop)
        if self.context is not None:
            self.context.scope.push(namespace)
        return 0

    cdef int pop(self, object loop) except -1:
        self.scopes.pop()
        if loop is not None:
            self.loops.pop()
        if self.context is not None:
            self.context.scope.pop()
        return 0

    cdef object lookup(self, str name):
        """The value of a root name, innermost scope first; _MISSING when there is none."""
        cdef Py_ssize_t at = len(self.scopes)
        cdef dict namespace
        while at:
            at -= 1
            namespace = self.scopes[at]
            if name in namespace:
                return namespace[name]
        if name == "partial":  # python-liquid puts this name above a template's own variables
            return False
        if name in self.locals:
            return self.locals[name]
        if name in self.globals:
            return self.globals[name]
        if name in self.counters:
            return self.counters[name]
        return _MISSING

    cdef int write(self, object text, bint escape) except -1:
        """Write a `str` (or a subclass), escaped for HTML where asked."""
        cdef Py_ssize_t length
        cdef const unsigned char* source
        if self.pieces is not None:
            if escape:
                text = markup_escape(text)
            self.written += len(text)
            if self.written > _OUTPUT_LIMIT:
                raise ResourceLimitError(f"the output is longer than {OUTPUT_LIMIT}", token=None)
            self.pieces.append(text)
            return 0
        source = utf8(text, &length)
        if length > _OUTPUT_LIMIT:
            raise ResourceLimitError(f"the output is longer than {OUTPUT_LIMIT}", token=None)
        put_text(self.wire, source, length, escape)
        if self.wire.length > self.limit:
            raise ResourceLimitError(f"the output is longer than {OUTPUT_LIMIT}", token=None)
        return 0


# --- expressions ------------------------------------------------------------------------------------------------------
cdef class Expression:
    """Yields a value, as python-liquid's `Expression.evaluate` would."""

    cdef object value(self, Frame frame):
        raise NotImplementedError

    cdef bint truth(self, Frame frame) except -1:
        cdef object value = self.value(frame)
        if value is True or type(value) is str:
            return True
        if value is None or value is False:
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

    `direct` tells that no tag of the template can hide the root name, so it is looked up among the globals only.
    """

    cdef str root
    cdef tuple keys
    cdef object missing
    cdef bint direct

    def __init__(self, str root not None, tuple keys not None, missing, bint direct):
        self.root = root
        self.keys = keys
        self.missing = missing
        self.direct = direct

    cdef object value(self, Frame frame):
        cdef object found, key
        if self.direct:
            found = frame.globals.get(self.root, _MISSING)
        else:
            found = frame.lookup(self.root)
        if found is _MISSING:
            return self.missing
        for key in self.keys:
            if isinstance(key, Expression):
                key = (<Expression>key).value(frame)
                if type(key) is not str and type(key) is not int:
                    found = self.below(frame, found, key)
                    if found is _MISSING:
                        return self.missing
                    continue
            if type(found) is dict and key != "size" and key != "first" and key != "last":
                found = (<dict>found).get(key, _MISSING)
            else:
                found = self.below(frame, found, key)
            if found is _MISSING:
                return self.missing
        return found

    cdef object below(self, Frame frame, object found, object key):
        try:
            return frame.foreign().get_item(found, key)
        except (KeyError, TypeError, IndexError):
            return _MISSING


@cython.final
cdef class Function(Expression):
    """A value computed from the globals by a Python function."""

    cdef object function

    def __init__(self, function):
        self.function = function

    cdef object value(self, Frame frame):
        return self.function(frame.globals)


@cython.final
cdef class Compare(Expression):
    """A comparison by python-liquid's own rule `function(left, right)`; `equals` lets two plain strings skip it."""

    cdef Expression left, right
    cdef object function
    cdef bint equals, negated

    def __init__(self, Expression left not None, Expression right not None, function, *, bint equals=False, bint negated=False):
        self.left = left
        self.right = right
        self.function = function
        self.equals = equals
        self.negated = negated

    cdef object value(self, Frame frame):
        return self.truth(frame)

    cdef bint truth(self, Frame frame) except -1:
        cdef object left = self.left.value(frame), right = self.right.value(frame)
        cdef bint answer
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
    ORDINARY, DEFAULT, ESCAPE

cdef Py_ssize_t MEMO_ENTRIES = 8192, MEMO_CHARACTERS = 40


@cython.final
cdef class Filter:
    """One filter with its arguments. `function` is python-liquid's own; `wants` names what it is given besides:

    "context" (python-liquid's), "scope" (the global variables) or "" (nothing).

    `may_keep(text)` tells for which texts the answer is always the same, so that it can be kept: a list holds the same
    cities, plans and days over and over. None: for none.
    """

    cdef str name
    cdef object function
    cdef tuple arguments
    cdef dict named
    cdef str wants
    cdef int kind
    cdef object may_keep
    cdef dict kept

    def __init__(
        self, str name not None, function, tuple arguments not None, dict named not None, str wants not None, bint autoescape, may_keep
    ):
        self.kept = {}
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
        if name == "default" and len(arguments) == 1 and not named:
            self.kind = DEFAULT
        elif name == "escape" and not arguments and not named and autoescape:
            self.kind = ESCAPE

    cdef object apply(self, Frame frame, object value):
        cdef object answer
        cdef bint plain = type(value) is str
        if plain:
            if self.kind == DEFAULT:
                return value if value else guard((<Expression>self.arguments[0]).value(frame))
            if self.kind == ESCAPE:
                return markup_escape(value)
            if self.may_keep is not None and len(<str>value) <= MEMO_CHARACTERS:
                answer = self.kept.get(value)
                if answer is not None:
                    frame.count(1)
                    return answer
                answer = self.call(frame, value)
                if isinstance(answer, str) and self.may_keep(value):
                    if len(self.kept) >= MEMO_ENTRIES:
                        self.kept.clear()
                    self.kept[value] = answer
                return answer
        elif value is None and self.kind == DEFAULT:
            return guard((<Expression>self.arguments[0]).value(frame))
        return self.call(frame, value)

    cdef object call(self, Frame frame, object value):
        cdef list arguments = [guard(value)]
        cdef dict named
        frame.count(1 + len(<str>value) // 256 if type(value) is str else 1)
        for argument in self.arguments:
            arguments.append(guard((<Expression>argument).value(frame)))
        try:
            if not self.named and not self.wants:
                return guard(self.function(*arguments))
            named = {name: guard((<Expression>argument).value(frame)) for name, argument in self.named.items()}
            if self.wants:
                named[self.wants] = frame.foreign() if self.wants == "context" else frame.globals
            return guard(self.function(*arguments, **named))
        except TypeError as error:
            raise LiquidTypeError(f"{self.name}: {error}", token=None) from error


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


# --- operations -------------------------------------------------------------------------------------------------------
cdef enum:  # what an operation answers
    ON, BREAK, CONTINUE


cdef class Operation:
    """Writes text or changes the scope, as python-liquid's `Node.render` would."""

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
        if frame.wire.length > frame.limit:
            raise ResourceLimitError(f"the output is longer than {OUTPUT_LIMIT}", token=None)
        return ON


@cython.final
cdef class Output(Operation):
    cdef Expression expression
    cdef bint autoescape

    def __init__(self, Expression expression not None, bint autoescape):
        self.expression = expression
        self.autoescape = autoescape

    cdef int run(self, Frame frame) except -1:
        cdef object value = self.expression.value(frame)
        if type(value) is str:
            return frame.write(value, self.autoescape)
        if value is None:
            return ON
        if type(value) is Markup:
            return frame.write(value, False)
        if type(value) is int:
            return frame.write(str(value), False)
        if isinstance(value, Undefined):
            return ON
        return frame.write(to_liquid_string(value, self.autoescape), False)


@cython.final
cdef class Block(Operation):
    """Operations one after the other."""

    def __init__(self, list operations not None):
        self.operations = operations

    cdef int run(self, Frame frame) except -1:
        cdef int answer
        cdef Operation operation
        frame.count(len(self.operations))
        for operation in self.operations:
            answer = operation.run(frame)
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
            loop = ForLoop(name=self.loop_name, it=iterator, length=length, parentloop=frame.foreign().parentloop())
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

    cdef object block_iterator(self, Frame frame, object items):
        """What python-liquid loops over for a value that is no plain list, mapping or text."""
        from collections.abc import Mapping, Sequence
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
cdef class Mapped(Operation):
    """Writes what `function(text, globals)` makes of the text of `block`; a text of its own, final as it is."""

    cdef Block block
    cdef object function

    def __init__(self, Block block not None, function):
        self.block = block
        self.function = function

    cdef int run(self, Frame frame) except -1:
        cdef list kept = frame.pieces, pieces = []
        cdef int answer
        frame.pieces = pieces
        try:
            answer = self.block.run(frame)
        finally:
            frame.pieces = kept
        if answer:
            return answer
        frame.count(1)
        return frame.write(self.function(guard("".join(pieces)), frame.globals), False)


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


@cython.final
cdef class Program:
    """A whole template. `make_context(frame, globals, locals, counters, scopes, loops)` makes a python-liquid context."""

    def __init__(self, Block block not None, make_context):
        self.block = block
        self.make_context = make_context

    cdef Frame start(self, dict scope):
        """A frame of its own for this rendering: the last one, when nothing outside can still hold on to it."""
        cdef Frame frame = self.frame
        self.frame = None
        if frame is None or frame.context is not None or frame.locals or frame.counters or frame.scopes:
            return Frame(self, scope)
        frame.globals = scope
        frame.pieces = None
        frame.wire = NULL
        frame.steps = frame.passes = frame.written = 0
        return frame

    cdef int write(self, dict scope, Wire* wire) except -1:
        """Write the text for `scope` as quoted-printable."""
        cdef Frame frame = self.start(scope)
        frame.wire = wire
        frame.limit = wire.length + _OUTPUT_LIMIT
        wire.column = 0
        wire.after_cr = False
        if self.block.run(frame):
            raise LiquidTypeError("break or continue outside of a loop", token=None)
        self.frame = frame
        return 0

    cpdef str render(self, dict scope):
        """The text for `scope`."""
        cdef Frame frame = self.start(scope)
        frame.pieces = []
        if self.block.run(frame):
            raise LiquidTypeError("break or continue outside of a loop", token=None)
        self.frame = frame
        return "".join(frame.pieces)
