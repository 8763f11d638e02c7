"""compose.empty_values: what a reader would miss is counted by composing, with somebody who would miss it and what to write instead."""

import pytest

from compose import empty_values
from compose.preflight import Finding
from domain.campaign import Recipient
from tests.compose.test_campaign import campaign


def counted(people: int = 100, *, text: str = "t", subject: str = "s") -> empty_values.Counted:
    """For a list where every fourth has no city, nobody a nick, and one no address that can be written to."""
    compiled = campaign(subject=subject, html="", text=text)
    rows = [
        Recipient(n, n, f"ada{n}@reader.example" if n else "a b@x.example", b'{"city": "Rome"}' if n % 4 else b'{"city": ""}')
        for n in range(people)
    ]
    return empty_values.count(compiled, rows, composed_at=1.7e9)


def test_each_recipient_counts_once_wherever_the_value_stands() -> None:
    text = "{{ subscriber.city }}{{ subscriber.city }}{% for i in (1..3) %}%Subscriber:Nick%{% endfor %}"
    found = counted(subject="{{ subscriber.city }}", text=text)
    assert found.composed == 99
    assert found.empty == {"subscriber.city": (24, "ada4@reader.example"), "%Subscriber:Nick%": (99, "ada1@reader.example")}


def test_what_nobody_would_see_is_not_counted() -> None:
    text = "{% if subscriber.city != '' %}{{ subscriber.city }}{% endif %}{{ subscriber.city | default: 'there' }}%Subscriber:City|you%"
    assert counted(text=text).empty == {}


@pytest.mark.parametrize(
    ("written", "name", "advice"),
    [
        ("{{ subscriber.city }}", "subscriber.city", "{{ subscriber.city | default: '...' }}"),
        ("{{ subscriber.city | upcase }}", "subscriber.city | upcase", "{{ subscriber.city | default: '...' | upcase }}"),
        ("%Subscriber:City%", "%Subscriber:City%", "%Subscriber:City|...%"),
    ],
)
def test_the_finding_names_an_example_and_what_to_write(written: str, name: str, advice: str) -> None:
    [found] = empty_values.findings(counted(text=written), [])
    assert (found.name, found.severity) == (f"value_empty:{name}", "warning")
    shown = written if written.startswith("%") else f"{{{{ {name} }}}}"
    assert found.what == f"{shown} is empty for 24 % of 99 recipients, for example ada4@reader.example"
    assert found.advice == f"fill it in, or say what stands in for it: {advice}"
    # And with that in its place nobody misses anything
    assert empty_values.findings(counted(text=advice), []) == []


def test_a_few_are_not_worth_a_word_and_what_is_unknown_is_said_once() -> None:
    few = empty_values.Counted(1000, {"subscriber.city": (49, "a@x.example"), "subscriber.zip": (50, "b@x.example")})
    assert [each.name for each in empty_values.findings(few, [])] == ["value_empty:subscriber.zip"]
    unknown = [Finding(name=name, severity="warning", what="", advice="") for name in ("field_unknown:nick", "variable_unknown:first_name")]
    found = counted(text="%Subscriber:Nick%{{ first_name }}{{ subscriber.city | upcase }}")
    assert [each.name for each in empty_values.findings(found, unknown)] == ["value_empty:subscriber.city | upcase"]


def test_a_list_without_anybody_has_no_findings() -> None:
    assert empty_values.findings(counted(0), []) == []
