from collections.abc import Callable
from typing import Any

STEP_LIMIT: int
LOOP_LIMIT: int
VALUE_LIMIT: int
OUTPUT_LIMIT: int
NUMBER_BITS: int

def guard(value: object) -> object: ...

class Frame:
    def __init__(self, program: Program, scope: dict[str, Any]) -> None: ...
    def charge(self, steps: int) -> None: ...
    def charge_loop(self, passes: int) -> None: ...

class Expression: ...

class Constant(Expression):
    def __init__(self, held: object) -> None: ...

class Foreign(Expression):
    def __init__(self, expression: Any) -> None: ...

class Path(Expression):
    def __init__(self, root: str, keys: tuple[object, ...], missing: object, direct: bool) -> None: ...

class Function(Expression):
    def __init__(self, function: Callable[[dict[str, Any]], object]) -> None: ...

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

class Both(Expression):
    def __init__(self, left: Expression, right: Expression, either: bool) -> None: ...

class Filter:
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

class Filtered(Expression):
    def __init__(self, left: Expression, filters: list[Filter]) -> None: ...

class Operation: ...

class Literal(Operation):
    def __init__(self, text: str) -> None: ...

class Output(Operation):
    def __init__(self, expression: Expression, autoescape: bool) -> None: ...

class Block(Operation):
    def __init__(self, operations: list[Operation]) -> None: ...

class If(Operation):
    def __init__(self, conditions: list[Expression], blocks: list[Block], default: Block | None, negated: bool) -> None: ...

class Case(Operation):
    def __init__(
        self, left: Expression, branches: list[tuple[list[Expression] | None, Block]], equal: Callable[[Any, Any], bool]
    ) -> None: ...

class For(Operation):
    def __init__(
        self, name: str, iterable: Expression, foreign: Any, block: Block, default: Block | None, loop_name: str | None
    ) -> None: ...

class Assign(Operation):
    def __init__(self, name: str, expression: Expression) -> None: ...

class Capture(Operation):
    def __init__(self, name: str, block: Block, autoescape: bool) -> None: ...

class Interrupt(Operation):
    def __init__(self, again: bool) -> None: ...

class ForeignNode(Operation):
    def __init__(self, node: Any, muted: bool) -> None: ...

class Program:
    def __init__(self, block: Block, make_context: Callable[..., Any]) -> None: ...
    def render(self, scope: dict[str, Any]) -> str: ...
