"""What a suppression names, and what covers an address."""

import pytest

from domain.errors import Invalid
from domain.suppression_key import covering, parse


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("Anna@Example.COM", "anna@example.com"),
        ("example.com", "@example.com"),
        ("@Example.com", "@example.com"),
        ("*@sub.example.com", "@sub.example.com"),
        ("*@*.example.com", "@*.example.com"),
        ("@*.example.com", "@*.example.com"),
        ("Info@*", "info@*"),
        (" bücher.example ", "@xn--bcher-kva.example"),
        ("JÜRGEN@*", "jürgen@*"),
    ],
)
def test_every_form_has_one_key(text, key):
    assert parse(text) == key
    assert parse(key) == key


@pytest.mark.parametrize(
    "text",
    ["", "*", "*@*", "@", "*.com", "in*fo@example.com", "info*@example.com", "*@ex*mple.com", "*@*.*.com", "a@b@*", "!anna@*.com",
     "localhost", "NOT REGEXP x", "/regexp/", "a b@*", "*@*.", "info@*.example.com", "*@.example.com"],
)  # fmt: skip
def test_anything_else_is_refused_when_it_is_written(text):
    with pytest.raises(Invalid):
        parse(text)


def test_an_address_is_covered_by_its_own_key_its_domain_its_local_part_and_the_parents_of_its_domain():
    assert covering("info@a.b.example") == ["info@a.b.example", "@a.b.example", "info@*", "@*.b.example", "@*.example"]
