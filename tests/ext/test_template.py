"""ext.template: operations put together by hand; limits, kept answers, and programs that forget. (tests/compose holds the language.)"""

from typing import Any

import pytest
from liquid.exceptions import LiquidTypeError, ResourceLimitError
from markupsafe import Markup

from ext import template as ops


def no_context(*_parts: Any) -> Any:
    raise AssertionError("nothing here needs python-liquid")


def program(*operations: ops.Operation) -> ops.Program:
    return ops.Program(ops.Block(list(operations)), no_context)


def variable(name: str, *keys: object) -> ops.Path:
    return ops.Path(name, keys, None, True)


def test_text_values_conditions_and_loops():
    name = variable("who", "name")
    made = program(
        ops.Literal("Hi "),
        ops.Output(name, "html"),
        ops.If([ops.Compare(name, ops.Constant("Ann"), lambda a, b: a == b, equals=True)], [ops.Block([ops.Literal("!")])], None, False),
        ops.For(
            "i",
            variable("list"),
            None,
            ops.Block([ops.Output(ops.Path("i", (), None, False), "html")]),
            ops.Block([ops.Literal("-")]),
            None,
        ),
    )
    assert made.render({"who": {"name": "Ann"}, "list": [1, None, "<"]}) == "Hi Ann!1&lt;"
    assert made.render({"who": {"name": "A&B"}, "list": []}) == "Hi A&amp;B-"
    assert made.render({}) == "Hi -"


def test_a_program_forgets_what_it_assigned():
    made = program(ops.Output(ops.Path("x", (), None, False), ""), ops.Assign("x", ops.Constant("left over")))
    assert made.render({}) == ""
    assert made.render({}) == ""


def test_an_answer_that_is_kept_belongs_to_its_value_alone():
    calls: list[object] = []

    def shout(value: object) -> str:
        calls.append(value)
        return str(value).upper()

    made = program(
        ops.Output(ops.Filtered(variable("x"), [ops.Filter("shout", shout, (), {}, "", False, lambda text: text != "today")]), "")
    )
    values = ["a", "b", "a", "today", "today", "long" * 20, "long" * 20, Markup("a"), 1]
    assert [made.render({"x": value}) for value in values] == [str(value).upper() for value in values]
    assert calls == ["a", "b", "today", "today", "long" * 20, "long" * 20, Markup("a"), 1]
    for number in range(10_000):
        assert made.render({"x": f"v{number}"}) == f"V{number}"


def test_an_answer_is_not_kept_when_an_argument_varies():
    join = ops.Filter("join", lambda value, other: value + other, (variable("y"),), {}, "", False, lambda _text: True)
    made = program(ops.Output(ops.Filtered(variable("x"), [join]), ""))
    assert [made.render({"x": "a", "y": y}) for y in "bcb"] == ["ab", "ac", "ab"]


@pytest.mark.parametrize("value", ["x" * (ops.VALUE_LIMIT + 1), [0] * (ops.LOOP_LIMIT + 1), range(10**12), range(-(10**12), 0), 1 << 5000])
def test_a_value_without_measure_is_refused(value):
    with pytest.raises(ResourceLimitError):
        ops.guard(value)


@pytest.mark.parametrize(
    "value", ["x" * ops.VALUE_LIMIT, [0] * ops.LOOP_LIMIT, range(ops.LOOP_LIMIT), range(10, 0), -(1 << 4000), None, True, 1e308, {}]
)
def test_a_value_within_measure_passes(value):
    assert ops.guard(value) is value


def test_a_frame_counts_steps_and_passes():
    frame = ops.Frame(program(), {})
    frame.charge(ops.STEP_LIMIT)
    with pytest.raises(ResourceLimitError, match="steps"):
        frame.charge(1)
    frame.charge_loop(ops.LOOP_LIMIT)
    with pytest.raises(ResourceLimitError, match="passes"):
        frame.charge_loop(1)


def test_output_without_measure_is_stopped():
    many = ops.For("i", ops.Constant(range(9000)), None, ops.Block([ops.Literal("x" * 900)]), None, None)
    with pytest.raises(ResourceLimitError, match="output"):
        program(many).render({})


def test_a_break_outside_a_loop_is_an_error():
    for again in (True, False):
        with pytest.raises(LiquidTypeError, match="outside"):
            program(ops.Interrupt(again)).render({})


def test_a_wrong_argument_is_an_error_that_names_the_filter():
    with pytest.raises(LiquidTypeError, match="pick"):
        program(ops.Output(ops.Filtered(variable("x"), [ops.Filter("pick", lambda: "", (), {}, "", False, None)]), "")).render({"x": 1})
