"""Segment programs: a template compiled once, then rendered for one recipient after the other.

Owns the operations a program consists of and their execution. What a template means is decided by python-liquid: its parse
tree is translated by `compose.liquid` into these operations, each of which yields exactly what python-liquid would, and a
node or expression without an operation of its own (`ForeignNode`, `Foreign`) is rendered by python-liquid on the same
scope. Text goes as quoted-printable straight into the message (`Frame.wire`), or is collected (`Frame.pieces`).

What differs between recipients comes from a `Row` (`Program.write`, `Program.text_of`), or from a plain dict of variables (`Program.render`).
Limits hold natively and in python-liquid alike: `Frame.charge` counts operations, `guard` bounds the size of every value.
"""

cimport cython

from libc.math cimport rint
from libc.string cimport memcmp

from ext.body cimport Piece, Wire, put_plain, put_text, put_url, utf8
from ext.body import url_encoded
from ext.digest cimport sha256
from ext.recipient cimport CLICK, MISSING, NUMBER, TEXT, Purpose, Row, Slot
from ext.recipient import loosely
from ext.token cimport Sealer

from collections.abc import Mapping, Sequence

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
WEIGHTS = {"strip_html": 16}  # filters that take so many times longer than the others

cdef Py_ssize_t _STEP_LIMIT = STEP_LIMIT, _LOOP_LIMIT = LOOP_LIMIT, _VALUE_LIMIT = VALUE_LIMIT, _OUTPUT_LIMIT = OUTPUT_LIMIT


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


cpdef Py_ssize_t effort(object value) except -1:
    """The steps that looking at the whole of `value` counts for: about a microsecond each for the slowest filters."""
    if isinstance(value, str):
        return len(value) >> 5
    if isinstance(value, (list, tuple, dict)):
        return len(value)
    return 0


@cython.final
cdef class Frame:
    """One rendering of one program: where its text goes, the scope it sees, and what it has used up."""

    def __cinit__(self, Program program not None, dict scope):
        self.program = program
        self.row = None
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

    cdef dict variables(self):
        """The global variables, all of them; dear where they come from a Row."""
        if self.globals is None:
            self.globals = self.row.scope()
        return self.globals

    cdef dict common(self):
        """Global variables, those that are the same for all recipients surely among them."""
        return self.globals if self.globals is not None else self.row.shared

    cdef object foreign(self):
        """The python-liquid context that shares this frame's scope."""
        if self.context is None:
            self.context = self.program.make_context(self, self.variables(), self.locals, self.counters, self.scopes, self.loops)
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
        """The value of a root name, innermost scope first; MISSING when there is none."""
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
        if name in self.variables():
            return self.globals[name]
        if name in self.counters:
            return self.counters[name]
        return MISSING

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
        return self.within()

    cdef int within(self) except -1:
        if self.wire.length > self.limit:
            raise ResourceLimitError(f"the output is longer than {OUTPUT_LIMIT}", token=None)
        return 0


include "template_expressions.pxi"
include "template_operations.pxi"


@cython.final
cdef class Program:
    """A whole template. `make_context(frame, globals, locals, counters, scopes, loops)` makes a python-liquid context."""

    def __init__(self, Block block not None, make_context):
        self.block = block
        self.make_context = make_context

    cdef Frame start(self, dict scope, Row row):
        """A frame of its own for this rendering: the last one, when nothing outside can still hold on to it."""
        cdef Frame frame = self.frame
        self.frame = None
        self.at = -1
        if frame is None or frame.context is not None or frame.locals or frame.counters or frame.scopes:
            frame = Frame(self, scope)
            frame.row = row
            return frame
        frame.globals = scope
        frame.row = row
        frame.pieces = None
        frame.wire = NULL
        frame.steps = frame.passes = frame.written = 0
        return frame

    cdef int write(self, Row row, Wire* wire) except -1:
        """Write the text for `row` as quoted-printable."""
        cdef Frame frame = self.start(None, row)
        frame.wire = wire
        frame.limit = wire.length + _OUTPUT_LIMIT
        wire.column = 0
        wire.after_cr = False
        if self.block.run(frame):
            raise LiquidTypeError("break or continue outside of a loop", token=None)
        self.frame = frame
        return 0

    cdef str text_of(self, Row row):
        """The text for `row`."""
        return self.collect(self.start(None, row))

    cpdef str render(self, dict scope):
        """The text for `scope`."""
        return self.collect(self.start(scope, None))

    cdef str collect(self, Frame frame):
        frame.pieces = []
        if self.block.run(frame):
            raise LiquidTypeError("break or continue outside of a loop", token=None)
        self.frame = frame
        return "".join(frame.pieces)
