from collections.abc import Callable
from typing import Any, final

from typing_extensions import disjoint_base

from ext.token import Sealer

STEP_LIMIT: int
LOOP_LIMIT: int
VALUE_LIMIT: int
OUTPUT_LIMIT: int
NUMBER_BITS: int
WEIGHTS: dict[str, int]
PERSONAL: frozenset[str]
MEMO_ENTRIES: int
FILTER_MEMO_ENTRIES: int

def guard(value: object) -> object: ...
def effort(value: object) -> int: ...

@final
class Frame:
    def __init__(self, program: Program, scope: dict[str, Any]) -> None: ...
    def charge(self, steps: int) -> None: ...
    def charge_loop(self, passes: int) -> None: ...

@disjoint_base
class Expression: ...

@final
class Constant(Expression):
    def __init__(self, held: object) -> None: ...

@final
class Foreign(Expression):
    def __init__(self, expression: Any) -> None: ...

@final
class Path(Expression):
    def __init__(self, root: str, keys: tuple[object, ...], missing: object, direct: bool, slot: int = -1) -> None: ...

@final
class Range(Expression):
    def __init__(self, start: Expression, stop: Expression, make: Callable[[Any, Any], object]) -> None: ...

@final
class Field(Expression):
    def __init__(self, name: str, slot: int) -> None: ...

@final
class Function(Expression):
    def __init__(self, function: Callable[[Any], object]) -> None: ...

@final
class Compare(Expression):
    def __init__(
        self,
        left: Expression,
        right: Expression,
        function: Callable[[Any, Any], object],
        *,
        equals: bool = False,
        negated: bool = False,
    ) -> None: ...

@final
class Both(Expression):
    def __init__(self, left: Expression, right: Expression, either: bool) -> None: ...

@final
class Filter:
    room: int
    @property
    def keeps(self) -> bool: ...
    def __init__(
        self,
        name: str,
        function: Callable[..., object],
        arguments: tuple[Expression, ...],
        named: dict[str, Expression],
        wants: str,
        autoescape: bool,
        may_keep: Callable[[str], object] | None,
    ) -> None: ...

@final
class Filtered(Expression):
    def __init__(self, left: Expression, filters: list[Filter]) -> None: ...

@disjoint_base
class Operation:
    at: int

@final
class Literal(Operation):
    def __init__(self, text: str) -> None: ...

@final
class Output(Operation):
    empty: int
    @property
    def name(self) -> str: ...
    def __init__(self, expression: Expression, place: str, name: str = "") -> None: ...

@final
class Link(Operation):
    def __init__(self, purpose: int, expression: Expression, place: str) -> None: ...

@final
class Block(Operation):
    def __init__(self, operations: list[Operation]) -> None: ...

@final
class If(Operation):
    def __init__(self, conditions: list[Expression], blocks: list[Block], default: Block | None, negated: bool) -> None: ...

@final
class Case(Operation):
    def __init__(
        self, left: Expression, branches: list[tuple[list[Expression] | None, Block]], equal: Callable[[Any, Any], bool]
    ) -> None: ...

@final
class For(Operation):
    def __init__(
        self, name: str, iterable: Expression, foreign: Any, block: Block, default: Block | None, loop_name: str | None
    ) -> None: ...

@final
class Assign(Operation):
    def __init__(self, name: str, expression: Expression) -> None: ...

@final
class Capture(Operation):
    def __init__(self, name: str, block: Block, autoescape: bool) -> None: ...

@final
class Followed(Operation):
    def __init__(
        self,
        block: Block,
        otherwise: Callable[[str, dict[str, Any]], str],
        sealer: Sealer | None = None,
        judge: Callable[[str], str | None] | None = None,
    ) -> None: ...

@final
class Choice(Operation):
    def __init__(self, blocks: list[Block], seed: bytes) -> None: ...

@final
class Interrupt(Operation):
    def __init__(self, again: bool) -> None: ...

@final
class ForeignNode(Operation):
    def __init__(self, node: Any, muted: bool) -> None: ...

@final
class Program:
    @property
    def at(self) -> int: ...
    def __init__(self, block: Block, make_context: Callable[..., Any]) -> None: ...
    def render(self, scope: dict[str, Any]) -> str: ...
