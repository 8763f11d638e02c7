"""Operator patterns: what they match, in which order, and what is refused."""

import time

import pytest

from domain.bounce import CATEGORIES, shipped_rules
from domain.bounce_patterns import ARROW, MAX_PATTERNS, BouncePatterns, Pattern, read_line
from domain.errors import Invalid

WORDS = frozenset(CATEGORIES)
BLOCKED = "550 5.7.1 Unfortunately, messages from [192.0.2.25] weren't sent. Please contact your Internet service provider (S3140)."


def rules(*lines: str):
    return shipped_rules().with_patterns([read_line(line, WORDS) for line in lines])


def test_the_documented_pattern_wins_over_the_rules_and_names_itself():
    shipped = shipped_rules().classify(0, BLOCKED)
    assert (shipped.hard, shipped.fault) == (False, "sender")
    means = rules("550 5.7.1 Unfortunately, messages from==>Hard").classify(0, BLOCKED)
    assert (means.category, means.hard, means.fault) == (shipped.category, True, "recipient")
    assert means.rule == "pattern 550 5.7.1 Unfortunately, messages from==>Hard"
    # the same reply as the engine hands it over: code apart
    assert rules("550 5.7.1 Unfortunately, messages from==>Hard").classify(550, BLOCKED[4:]) == means
    assert shipped_rules().classify(0, BLOCKED) == shipped


@pytest.mark.parametrize(
    ("line", "reply", "category", "hard"),
    [
        ("user   UNKNOWN==>Soft", "550 5.1.1 User unknown", "bad-mailbox", False),
        ("mailbox full==>Hard", "452 4.2.2 Mailbox full", "quota-issues", True),
        ("account moved==>bad-mailbox", "550 the account moved away", "bad-mailbox", True),
        ("account moved==>bad-mailbox", "450 the account moved away", "bad-mailbox", False),
        ("account moved==>bad-mailbox|Soft", "550 the account moved away", "bad-mailbox", False),
        ("account moved==>Hard|inactive-mailbox", "450 the account moved away", "inactive-mailbox", True),
        ("/code \\d{4}$/==>policy-related", "550 refused, code 4711", "policy-related", False),
        ("/(a+)+$/==>Hard", "550 aaaa", "other", True),
        ("a/b (c) [d] * ? . ==>Hard", "550 xx A/B (c) [D] * ? . yy", "other", True),
        ("sorry ==> no==>Hard", "550 sorry ==> no", "other", True),
    ],
)
def test_texts_are_contained_expressions_are_searched_and_a_category_decides_where_no_side_is_named(line, reply, category, hard):
    means = rules(line).classify(0, reply)
    assert (means.category, means.hard) == (category, hard)
    assert means.rule.startswith("pattern ")


def test_the_first_that_matches_wins_and_what_matches_none_goes_to_the_rules():
    both = rules("user unknown==>Soft", "/user/==>Hard")
    assert both.classify(0, "550 user unknown").hard is False
    assert both.classify(0, "550 no user here").hard is True
    assert both.classify(0, "550 5.1.1 no such mailbox") == shipped_rules().classify(0, "550 5.1.1 no such mailbox")
    assert both.with_patterns([]).classify(0, "550 user unknown") == shipped_rules().classify(0, "550 user unknown")


def test_any_reply_is_explained_with_the_pattern_or_rule_that_decides():
    both = rules("user unknown==>Soft", "/user/==>Hard")
    found = both.explain(0, "550 5.1.1 user unknown")
    assert (found.hard, found.bounce_pattern, found.rule, found.status) == (False, "user unknown==>Soft", "unknown", "5.1.1")
    for reply in ("", "x", "550 x", "zzzz", "550 no user here", "\U0001f600", "550 5.7.1 blocked using spamhaus"):
        found = both.explain(0, reply)
        assert found.category == both.classify(0, reply).category
        assert (found.bounce_pattern is None) is not both.classify(0, reply).by_operator


@pytest.mark.parametrize(
    ("line", "field", "said"),
    [
        ("no arrow", "pattern", "has no ==>"),
        ("text==>", "verdict", "must be Hard"),
        ("text==>hardly", "verdict", "must be Hard"),
        ("text==>!Hard", "verdict", "must be Hard"),
        ("text==>Hard|Soft", "verdict", "must be Hard"),
        ("text==>Hard|Hard", "verdict", "must be Hard"),
        ("text==>bad-mailbox|bad-domain", "verdict", "must be Hard"),
        ("==>Hard", "pattern", "shorter than 3"),
        ("a ==>Hard", "pattern", "shorter than 3"),
        ("/(?<=a)b/==>Hard", "pattern", "RE2 refuses"),
        ("/(?!a)b/==>Hard", "pattern", "RE2 refuses"),
        ("/(a)\\1/==>Hard", "pattern", "RE2 refuses"),
        ("/(/==>Hard", "pattern", "RE2 refuses"),
        ("/(a{1000}){1000}/==>Hard", "pattern", "RE2 refuses"),
        ("/(\\pL{1,500}x){1,2}/==>Hard", "pattern", "RE2 refuses"),
        ("/(\\w+\\s?)*$/==>Hard", "pattern", "matches every reply"),
        ("/.*/==>Hard", "pattern", "matches every reply"),
        ("/(" + "|".join(f"alternative{i}" for i in range(10_000)) + ")/==>Hard", "pattern", "longer than 8192"),
        ("x" * 1_000_000 + "==>Hard", "pattern", "longer than 8192"),
        ("/" + "(" * 1_000_000 + "/==>Hard", "pattern", "longer than 8192"),
        ("te\0xt==>Hard", "pattern", "control character"),
        ("te\u2028xt==>Hard", "pattern", "control character"),
        ("te\ud800xt==>Hard", "pattern", "UTF-8"),
    ],
)
def test_what_cannot_be_run_in_linear_time_or_is_not_understood_is_refused_at_once(line, field, said):
    started = time.process_time()
    with pytest.raises(Invalid) as refused:
        read_line(line, WORDS)
    assert refused.value.field == field
    assert said in refused.value.reason
    assert time.process_time() - started < 2


def test_expressions_that_are_too_costly_together_are_refused_and_the_dearest_allowed_ones_stay_quick():
    costly = [Pattern(f"/a.{{{90 + i}}}b{i}/", "Hard") for i in range(20)]
    made = BouncePatterns(costly, WORDS)
    worst = "".join("ab"[hash((i, i * 7919)) % 2] for i in range(600))
    started = time.process_time()
    made.first(550, worst)
    assert time.process_time() - started < 2
    with pytest.raises(Invalid, match="too costly"):
        BouncePatterns(costly * 3, WORDS)
    with pytest.raises(Invalid, match=f"more than {MAX_PATTERNS}"):
        BouncePatterns([Pattern(f"text {i}", "Hard") for i in range(MAX_PATTERNS + 1)], WORDS)
    many = BouncePatterns([Pattern(f"text {i} of many", "Hard") for i in range(MAX_PATTERNS)], WORDS)
    assert many.first(550, f"it says Text {MAX_PATTERNS - 1} of many things") == MAX_PATTERNS - 1
    assert many.first(550, "it says nothing") is None


def test_a_set_that_runs_out_of_memory_is_replaced_by_one_after_the_other():
    class Exhausted:
        def Match(self, _: bytes) -> list[int]:
            return []

    made = BouncePatterns([Pattern("first text", "Hard"), Pattern("/second \\d/", "Soft")], WORDS)
    made._set = Exhausted()
    assert [made.first(0, reply) for reply in ("450 second 2", "550 FIRST text second 2", "550 third")] == [1, 0, None]


def test_a_line_reads_back_as_itself():
    for line in ("550 5.7.1 Unfortunately, messages from==>Hard", "/a b/==>Soft", "sorry ==> no==>quota-issues|Hard"):
        assert str(read_line(f"  {line} ", WORDS)) == line
    assert ARROW == "==>"
