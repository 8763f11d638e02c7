"""compose.rendering and `sluice template render`: as a message says it, or why not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compose.rendering import render
from domain.errors import Invalid
from tests.reference import liquid_alone

ROOT = Path(__file__).parents[2]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from("xyz"), JSON, max_size=3), st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_same_as_python_liquid_alone(data: dict[str, Any], html: bool) -> None:
    source = (
        "{{ x }}|{{ y.a | default: 'd' }}|{% for i in z %}{{ forloop.index }}{{ i | upcase }}{% endfor %}|{% if x == y %}=<b>{% endif %}"
    )
    assert render(source, data, html=html) == liquid_alone.render(source, data, html=html)


@pytest.mark.parametrize(
    ("template", "data", "reason"),
    [
        ("a\n{{ x | nothing }}", {}, "line 2, column 8: unknown filter"),
        ("{% if x %}", {}, "line 1, column "),
        ("a\0", {}, "line 1, column 2: it holds a NUL"),
        ("{% for i in (1..100000) %}x{% endfor %}", {}, "longer than"),
        ("{{ 1 | divided_by: 0 }}", {}, "divided"),
        ("{% include 'x' %}", {}, "include"),
        ("{{ x }}", {"x": "\ud800"}, "surrogate"),
    ],
)
def test_what_cannot_be_rendered_says_why(template: str, data: dict[str, Any], reason: str) -> None:
    with pytest.raises(Invalid, match=reason):
        render(template, data)


def test_the_command_answers_each_line_in_order() -> None:
    lines = [
        '{"template": "Hi {{ n }} é", "data": {"n": "<A>"}}',
        '{"template": "Hi {{ n }}", "data": {"n": "<A>"}, "html": true}',
        "",
        '{"template": "{% if %}"}',
        "not JSON",
        "[1]",
        '{"template": "x", "data": []}',
        '{"template": "x", "more": 1}',
        '{"template": "x"}',
    ]
    done = subprocess.run(
        [sys.executable, "-m", "control.cli", "template", "render"], input="\n".join(lines), capture_output=True, text=True, cwd=ROOT,
        timeout=60, check=True, env={"PATH": "", "PYTHONIOENCODING": "utf-8", "PYTHONUTF8": "1"},
    )  # fmt: skip
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [next(iter(each)) for each in answers] == ["result", "result", "error", "error", "error", "error", "error", "result"]
    assert answers[0] == {"result": "Hi <A> é"}
    assert answers[1] == {"result": "Hi &lt;A&gt;"}
    assert answers[2]["error"].startswith("template: line 1, column ")
    assert answers[3]["error"].startswith("line 5 is not valid JSON")
