"""compose.liquid: compiled templates yield exactly what python-liquid yields, refuse what it refuses, and stay within limits."""

import datetime as dt
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from compose import liquid
from domain.campaign import Recipient
from domain.errors import Invalid
from tests.compose.test_campaign import COMPOSED_AT, campaign, parsed, said
from tests.reference import liquid_alone
from tests.reference.quoted_printable import normalised

NOW = dt.datetime(2026, 3, 4, 5, 6, 7)

SCOPE: dict[str, Any] = {
    "subscriber": {
        "email": "ann@shore.example",
        "id": 17,
        "first_name": "Änn <b>",
        "last_name": 'O\'Neill & "Co"',
        "city": "東京",
        "plan": "team",
        "balance": "4548.52",
        "points": 3,
        "ratio": 2.5,
        "yes": True,
        "no": False,
        "nothing": None,
        "empty": "",
        "blank": "  \n ",
        "size": "XL",
        "lines": "one\r\ntwo\nthree\rfour",
        "signup_date": "2024-02-29",
        "wrong_date": "2023-02-30",
        "tags": ["a", "b", "<c>", None, 2],
        "agenda": [{"day": "Mon", "title": "Sail & row", "parts": [1, 2]}, {"day": "Tue", "title": ""}, {"title": "x"}],
        "nested": {"deep": {"er": ["x", {"y": "z"}]}, "first": 1, "last": 2},
        "none_list": [],
        "html": "<p>Hi <i>you</i> &amp; me</p>",
    },
    "campaign": {"id": 7, "name": "Spring & sea"},
    "list": {"id": 5, "name": "Friends"},
    "user": {"id": 3},
    "links": {"unsubscribe": "https://l.example/u/abc", "web_view": "https://l.example/w/abc"},
    "now": NOW,
    "today": NOW.date(),
}
CONSTANTS = {name: SCOPE[name] for name in ("campaign", "list", "user")}


def outcome(render: Any) -> tuple[str, str]:
    """("text", what came out) or ("refused", "")."""
    try:
        return "text", render()
    except Exception:
        return "refused", ""


def compiled(source: str, scope: dict[str, Any], *, html: bool) -> str:
    """The same by our own program."""
    template = liquid.compile_template("html", source, liquid.HTML if html else liquid.TEXT, CONSTANTS)
    text = template.program.render(scope)
    assert template.program.render(scope) == text, "a program keeps nothing between two renderings"
    if template.constant is not None:
        assert template.constant == text
    return text


def assert_same(source: str, scope: dict[str, Any] = SCOPE) -> None:
    for html in (True, False):
        expected = outcome(lambda html=html: liquid_alone.render(source, scope, html=html))
        assert outcome(lambda html=html: compiled(source, scope, html=html)) == expected, (source, html)


TEMPLATES = (Path(__file__).parents[1] / "data" / "templates.liquid").read_text("utf-8").split("\n----\n")


@pytest.mark.parametrize("source", TEMPLATES)
def test_a_template_yields_what_python_liquid_alone_yields(source):
    assert_same(source)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
    | st.sampled_from(["<b>", "&amp;", "a\r\nb", " ", "", "2024-02-29", "7", "3.5", "\u2028", ".x", "team"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "b", "size", "first", "title", "day"]), inner, max_size=4)
    ),
    max_leaves=8,
)
FIELDS = ["first_name", "city", "plan", "agenda", "tags", "points", "empty"]
PATHS = st.sampled_from(
    [f"subscriber.{field}" for field in FIELDS]
    + [
        "subscriber.tags[0]",
        "subscriber.agenda.first",
        "x",
        "i",
        "i.a",
        "i[0]",
        "missing",
        "campaign.name",
        "subscriber.plan.size",
        "forloop.index",
        "subscriber[x]",
    ]
)
LITERALS = st.sampled_from(["'a'", "''", "'<i>'", "3", "0", "-1", "2.5", "true", "false", "nil", "empty", "blank", "(1..3)"])
OPERANDS = PATHS | LITERALS
FILTERS = st.sampled_from(
    [
        "",
        "",
        "| upcase",
        "| default: 'd'",
        "| default: x",
        "| escape",
        "| escape | append: '<'",
        "| append: subscriber.city",
        "| size",
        "| first",
        "| join: ','",
        "| split: 'a'",
        "| round",
        "| plus: 1",
        "| times: 2",
        "| date: '%Y'",
        "| truncate: 5",
        "| replace: 'a', '<'",
        "| strip",
        "| url_encode",
        "| strip_html",
        "| newline_to_br",
        "| sort",
        "| uniq",
        "| reverse",
        "| map: 'title'",
        "| capitalize",
        "| slice: 1, 2",
        "| compact",
        "| concat: x",
        "| safe",
        "| where: 'a'",
    ]
)
CONDITIONS = st.builds(
    lambda left, sign, right, more: f"{left} {sign} {right} {more}".rstrip() if sign else f"{left} {more}".rstrip(),
    OPERANDS,
    st.sampled_from(["", "==", "!=", "<", ">=", "contains"]),
    OPERANDS,
    st.sampled_from(["", "", "and x", "or subscriber.plan == 'team'"]),
)
TEXTS = st.sampled_from(["", " ", "\n", "a", ".", "\r", "é<", " b "])


def bodies(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Templates with a tag around, beside or between other templates."""
    return (
        st.builds(lambda c, a, b: f"{{% if {c} %}}{a}{{% else %}}{b}{{% endif %}}", CONDITIONS, inner, inner)
        | st.builds(lambda c, d, a, b: f"{{% unless {c} %}}{a}{{% elsif {d} %}}{b}{{% endunless %}}", CONDITIONS, CONDITIONS, inner, inner)
        | st.builds(
            lambda v, m, a, b: f"{{% for i in {v}{m} %}}{a}{{% else %}}{b}{{% endfor %}}",
            OPERANDS,
            st.sampled_from(["", "", " limit:2", " offset:1", " reversed", " offset:continue"]),
            inner,
            inner,
        )
        | st.builds(
            lambda v, w, a, b: f"{{% case {v} %}}{{% when {w}, 'team' %}}{a}{{% else %}}{b}{{% endcase %}}",
            OPERANDS,
            OPERANDS,
            inner,
            inner,
        )
        | st.builds(lambda a: f"{{% capture x %}}{a}{{% endcapture %}}", inner)
        | st.builds(lambda v, a: f"{{% tablerow i in {v} cols:2 %}}{a}{{% endtablerow %}}", OPERANDS, inner)
        | st.builds(lambda a: f"{{% ifchanged %}}{a}{{% endifchanged %}}", inner)
        | st.builds(lambda a, b, c: a + b + c, inner, TEXTS, inner)
    )


SOURCES = st.recursive(
    st.builds(lambda path, filter_: f"{{{{ {path} {filter_} }}}}", OPERANDS, FILTERS)
    | TEXTS
    | st.builds(lambda path, filter_: f"{{% assign x = {path} {filter_} %}}", OPERANDS, FILTERS)
    | st.sampled_from(["{% break %}", "{% continue %}", "{% increment x %}", "{% cycle 'a', x %}", "{% echo x %}", "{{- x -}}"]),
    bodies,
    max_leaves=10,
)


DATA = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=7)


@settings(max_examples=400, deadline=None)
@given(SOURCES, DATA)
@example("{% for i in subscriber.tags %}{% if i %}{% break %}{% endif %}{% endfor %}", {"tags": [None, 1]})
def test_random_templates_and_data_yield_what_python_liquid_alone_yields(source, fields):
    assert_same(source, {**SCOPE, "subscriber": {"email": "a@b.example", "id": 1, **fields}})


@pytest.mark.slow
@settings(max_examples=100_000, deadline=None, derandomize=False, suppress_health_check=list(HealthCheck), database=None)
@given(SOURCES, DATA)
def test_a_hundred_thousand_random_templates_do(source, fields):
    assert_same(source, {**SCOPE, "subscriber": {"email": "a@b.example", "id": 1, **fields}})


@settings(max_examples=150, deadline=None)
@given(SOURCES, DATA)
@example("{{ subscriber.city }}{{ subscriber.city | upcase }}{{ subscriber.points | round }}", {"city": '"\\é', "points": "2.5"})
@example("{% if subscriber.plan == 'team' %}=<{{ subscriber.plan }}{% endif %}", {"plan": "team"})
@example("{{ subscriber.points }}|{{ subscriber.points | default: 'd' }}", {"points": 10**20})
def test_a_message_says_what_python_liquid_alone_says(source, fields):
    """In a message the fields are read where they stand in the data, and text is encoded as it is written."""
    to = Recipient(3, 17, "ann@shore.example", json.dumps(fields).encode())
    for html in (True, False):
        try:
            made = campaign(subject="s", text="" if html else source + ".", html=source + "." if html else "")
        except Invalid:
            assert outcome(lambda html=html: liquid_alone.render(source, SCOPE, html=html))[0] == "refused"
            continue
        scope = made.scope(to, composed_at=COMPOSED_AT)
        expected = outcome(lambda html=html, scope=scope: liquid_alone.render(source + ".", scope, html=html))
        [answer] = made.build([to], composed_at=COMPOSED_AT, attempt=1)
        if isinstance(answer, Invalid):
            assert expected[0] == "refused", (source, answer)
        else:
            assert ("text", said(parsed(answer[2]))) == (expected[0], normalised(expected[1]) + "\n"), (source, html)


@pytest.mark.parametrize(
    ("source", "where"),
    [
        ("one\n two {% if x %}", "line 2"),
        ("{{ x | nosuch }}", "line 1, column"),
        ("{% nosuch %}", "line 1"),
        ("{% include 'a' %}", "line 1"),
        ("{% render 'a' %}", "line 1"),
        ("{% for x %}{% endfor %}", "line 1"),
        ("a\nb\n{{ x", "line 3"),
        ("bad \0 here", "line 1, column 5: it holds a NUL"),
        ("bad \ud800 here", "line 1, column 5"),
        ("{% if a %}" * 40 + "{% endif %}" * 40, ""),
        ("{{" * 500_000, "line 1, column 1"),
        ("{%" * 500_000, "line 1, column 1"),
        ("{% raw %}" * 100_000, "line 1, column 1"),
        ("{{" + " " * 900_000 + "}}", "blanks"),
        ("a\n{% if " + "(" * 900_000 + " %}{% endif %}", "line 2, column 7: a tag is longer"),
        ("{{ " + "(1.." * 200 + " }}", "line 1, column 4: a tag holds more than"),
        ("{{ a }}" * 140_000, "there are more than 20000 tags"),
        ("x" * 1_000_001, "1000001 characters"),
        ("{{ a" + "[a" * 5000 + "]" * 5000 + " }}", ""),
    ],
)
def test_a_template_that_cannot_be_sent_is_refused_at_once_with_its_place(source, where):
    started = time.process_time()
    with pytest.raises(Invalid) as refusal:
        liquid.compile_template("html", source, liquid.HTML, CONSTANTS)
    assert refusal.value.field == "html"
    assert where in refusal.value.reason
    assert time.process_time() - started < 5, "refused by looking, not by running out of time"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ subscriber.__class__.__mro__ }}",
        "{{ subscriber | map: '__class__' }}",
        "{{ '{0.__class__}' }}",
        "{{ links.__init__ }}",
    ],
)
def test_a_template_reaches_data_only(source):
    for html in (True, False):
        text = outcome(lambda html=html: compiled(source, SCOPE, html=html))[1]
        assert "class " not in text
        assert "method" not in text


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in (1..1000000000) %}{% endfor %}",
        "{% for i in (1..1000000000) reversed %}{% endfor %}",
        "{% for i in (1..1000000000) limit: 3 offset: 999999990 %}{% endfor %}",
        "{% for i in (1..5000) %}{% for j in (1..5000) %}{% endfor %}{% endfor %}",
        "{% for i in (1..100) %}{% for j in (1..100) %}{% for k in (1..100) %}{% endfor %}{% endfor %}{% endfor %}",
        "{% tablerow i in (1..1000000000) %}{% endtablerow %}",
        "{% tablerow i in (1..9000) %}{% for j in (1..9000) %}{% endfor %}{% endtablerow %}",
        "{% ifchanged %}{% for i in (1..1000000000) %}{% endfor %}{% endifchanged %}",
        "{% ifchanged %}{% for i in (1..9000) %}" + "{% comment %}{% endcomment %}" * 1000 + "{% endfor %}{% endifchanged %}",
        "{% assign a = 'xxxxxxxx' %}" + "{% assign a = a | append: a %}" * 60 + "{{ a }}",
        "{% ifchanged %}{% assign a = 'xxxxxxxx' %}" + "{% assign a = a | append: a %}" * 60 + "{% endifchanged %}",
        "{% assign a = 'xxxxxxxx' %}" + "{% capture a %}{{ a }}{{ a }}{% endcapture %}" * 60,
        "{% ifchanged %}{% assign a = 'xxxxxxxx' %}" + "{% capture a %}{{ a }}{{ a }}{% endcapture %}" * 60 + "{% endifchanged %}",
        "{% assign a = 'xxxxxxxx' %}" + "{% assign a = a | replace: 'x', a %}" * 9,
        "{{ (1..1000000000) | join: ',' }}",
        "{{ (1..1000000000) | reverse | size }}",
        "{{ 'a' | split: '' | concat: (1..1000000000) | size }}",
        "{% assign n = 9 %}" + "{% assign n = n | times: n %}" * 60 + "{{ n }}",
        "{% for i in (1..9999) %}" + "{{ i }}" * 50 + "{% endfor %}",
        "{% for i in (1..9000) %}" + "y" * 900 + "{% endfor %}",
        "{{ subscriber.lines | date: subscriber.long }}",
        "{{ subscriber.long | strip_html }}",
    ],
)
def test_a_template_that_wants_too_much_is_stopped(source):
    template = liquid.compile_template("html", source, liquid.HTML, CONSTANTS)
    scope = {**SCOPE, "subscriber": {**SCOPE["subscriber"], "long": "<%d" * 100_000}}
    started = time.process_time()
    with pytest.raises(Exception, match="(?i)limit|more than|longer than|at most|too long|exceeds"):
        template.program.render(scope)
    assert time.process_time() - started < 2, "far from the hours it asks for"


def test_a_program_after_a_stopped_rendering_renders_the_next_one_afresh():
    template = liquid.compile_template(
        "html", "{% assign a = 1 %}{% for i in (1..subscriber.n) %}{{ i }}{% endfor %}", liquid.HTML, CONSTANTS
    )
    with pytest.raises(Exception, match="longer"):
        template.program.render({"subscriber": {"n": 10**9}})
    assert template.program.render({"subscriber": {"n": 3}}) == "123"


def test_now_is_the_time_of_composition():
    assert (
        compiled("{{ 'now' | date: '%Y-%m-%d' }} {{ now | date: '%H' }} {{ 'today' | date: '%d' }}", SCOPE, html=True) == "2026-03-04 05 04"
    )
    assert compiled("{{ '10:30' | date: '%Y-%m-%d %H:%M' }}", SCOPE, html=False) == "2026-03-04 10:30"


def test_what_is_the_same_for_everybody_is_known_without_a_recipient():
    assert liquid.compile_template("subject", "News from {{ list.name }}", liquid.TEXT, CONSTANTS).constant == "News from Friends"
    assert liquid.compile_template("subject", "News for {{ subscriber.city }}", liquid.TEXT, CONSTANTS).constant is None
