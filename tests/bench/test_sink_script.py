"""Scripted answers: the words in addresses, the rules of a file, and what each of them does on the wire."""

import json
import time

import pytest

from bench.sink_script import ACTIONS, STAGES, TOKEN_PREFIXES, Rule, Script, check_rules, load, read_rules, read_token, share
from domain.errors import ConfigurationError
from tests.bench.sink_process import PATIENCE_SECONDS, SinkProcess, Wire

OK = ["250", "250", "354", "250"]


@pytest.mark.parametrize(
    ("word", "stage", "action", "reply"),
    [
        ("defer", "rcpt", "reply", b"451 4.3.0 Try again later\r\n"),
        ("DEFER2", "rcpt", "reply", b"451 4.3.0 Try again later\r\n"),
        ("defer3-dot", "dot", "reply", b"451 4.3.0 Try again later\r\n"),
        ("bounce", "rcpt", "reply", b"550 5.1.1 No such mailbox\r\n"),
        ("full", "rcpt", "reply", b"552 5.2.2 Mailbox full\r\n"),
        ("block-mail", "mail", "reply", b"550 5.7.1 Blocked by policy\r\n"),
        ("reject-content", "dot", "reply", b"554 5.7.1 Content refused\r\n"),
        ("421", "rcpt", "reply", b"421 4.0.0 Scripted answer\r\n"),
        ("550-5-7-26-dot", "dot", "reply", b"550 5.7.26 Scripted answer\r\n"),
        ("slow250", "rcpt", "slow", b""),
        ("drop-dot", "dot", "drop", b""),
        ("drop-accepted", "accepted", "drop", b""),
        ("hang-body", "body", "hang", b""),
        ("lf-rcpt", "rcpt", "lf", b""),
        ("accept", "rcpt", "accept", b""),
    ],
)
def test_a_word_means_one_answer(word, stage, action, reply):
    answer = read_token(word)
    assert answer is not None
    assert (answer.stage, answer.action, answer.reply) == (stage, action, reply)
    assert word.lower().encode()[:3] in TOKEN_PREFIXES


@pytest.mark.parametrize(
    "word",
    [
        "",
        "ann",
        "bouncer",
        "deferred",
        "hang",
        "drop",
        "dropbox",
        "slower",
        "fullerton",
        "grey",
        "rate",
        "399",
        "4500",
        "550-4-1-1",
        "defer-accepted",
        "250",
    ],
)
def test_ordinary_names_mean_nothing(word):
    assert read_token(word) is None


def test_shares_are_fixed_by_the_recipient_and_come_close_to_the_percentage():
    names = [f"user{i}@gmail.example".encode() for i in range(20_000)]
    taken = sum(share(name, "1 rcpt") < 10.0 for name in names)
    assert 1_800 < taken < 2_200
    assert [share(name, "a") for name in names[:9]] == [share(name, "a") for name in names[:9]]
    both = sum(share(name, "1 rcpt") < 10.0 and share(name, "2 rcpt") < 10.0 for name in names)
    assert 120 < both < 300


def test_a_wrong_script_file_names_every_problem(tmp_path):
    with pytest.raises(ConfigurationError) as caught:
        read_rules('[[rule]]\nstage = "later"\n[[rule]]\npercent = 101\nreply="450 x"\n[[rule]]\n[[rule]]\nrepply = "1"\n', "s.toml")
    assert [problem.split(":")[1] for problem in caught.value.problems] == [" rule 1", " rule 2", " rule 3", " rule 4"]
    for text in (
        "rule = 1",
        "x = 1",
        "[[rule",
        '[[rule]]\nreply = "99 no"',
        '[[rule]]\nreply = "550 a\\r\\nb"',
        '[[rule]]\nstage="body"\nreply="550 x"',
    ):
        with pytest.raises(ConfigurationError):
            read_rules(text, "s.toml")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load(tmp_path / "none.toml")


def test_the_first_matching_rule_decides_and_accept_ends_the_search():
    rules = check_rules(
        [
            {"recipient": "vip@*", "action": "accept"},
            {"recipient": "*@a.example", "reply": "550 5.0.0 a"},
            {"reply": "451 4.0.0 rest", "times": 1},
        ],
        "test",
    )
    script = Script(rules)
    bounce = read_token("bounce")

    def answer(recipient):
        found = script.for_recipient(recipient, b"s@x", bounce, 1, 0.0)
        return found and found.reply[:3]

    assert answer(b"VIP@a.example") is None
    assert answer(b"x@A.example") == b"550"
    assert [answer(b"x@b.example"), answer(b"x@b.example"), answer(b"y@b.example")] == [b"451", None, b"451"]


def test_what_a_recipient_went_through_is_remembered_within_a_bound(monkeypatch):
    monkeypatch.setattr("bench.sink_script.MAX_REMEMBERED", 100)
    script = Script()
    for number in range(1000):
        script.for_recipient(b"%d@x" % number, b"", read_token("defer"), 1, 0.0)
    assert len(script._tries) <= 100


def test_deferred_recipients_are_taken_after_n_tries_each(sink):
    with Wire(sink) as wire:
        for recipient in ("defer2+a@y.example", "b@defer2.example"):
            got = []
            for _ in range(4):
                got.append(wire.mail(recipient)[1])
                wire.ask("RSET")
            assert got == ["451", "451", "250", "250"]
        assert wire.mail("defer1-dot@y.example") == ["250", "250", "354", "451"]
        assert wire.mail("defer1-dot@y.example") == OK
    counters = sink.counters()
    assert counters["verdicts"]["deferred"] == 5
    assert counters["replies"]["451"] == 5
    assert counters["domains"]["defer2.example"] == {"accepted": 2, "deferred": 2, "refused": 0, "dropped": 0}


@pytest.mark.parametrize(
    ("recipient", "answers"),
    [
        ("bounce@y.example", ["250", "550"]),
        ("x@bounce.y.example", ["250", "550"]),
        ("full+x@y.example", ["250", "552"]),
        ("block@y.example", ["250", "550"]),
        ("accept@bounce.example", OK),
        ("bounce.x@y.example", OK),
        ("bouncer@y.example", OK),
        ("ann@bounces.y.example", OK),
        ("bo@y.example", OK),
        ("postmaster", OK),
        ("reject-content@y.example", ["250", "250", "354", "554"]),
        ("450-dot@y.example", ["250", "250", "354", "450"]),
        ("452@y.example", ["250", "452"]),
        ("451-data@y.example", ["250", "250", "451"]),
        ("wrong-rcpt@y.example", ["250", "354"]),
        ("wrong-data@y.example", ["250", "250", "250"]),
        ("wrong-dot@y.example", ["250", "250", "354", "354"]),
        ("slow30@y.example", OK),
        ("slow30-data@y.example", OK),
        ("slow30-dot@y.example", OK),
        ("slow30-body@y.example", OK),
        ("split-rcpt@y.example", OK),
        ("split-dot@y.example", OK),
        ("multi-rcpt@y.example", OK),
        ("multi-dot@y.example", OK),
        ("grey0@y.example", ["250", "451"]),
    ],
)
def test_answers_at_their_stage(sink, recipient, answers):
    with Wire(sink) as wire:
        got = wire.mail(recipient)
        assert got[: len(answers)] == answers
        if answers[-1][0] in "45":
            # A refusal ends nothing but itself.
            wire.ask("RSET")
            assert wire.mail("ann@y.example") == OK
    assert sink.counters()["domains"].get("y.example", {"accepted": 0})["accepted"] >= (answers == OK and "@y" in recipient)


@pytest.mark.parametrize(
    ("sender", "answer"),
    [
        ("550-mail@x.example", "550"),
        ("550-mail+ann@x.example", "550"),
        ("ann@550-mail.x.example", "550"),
        ("550-mail.x@x.example", "250"),
        ("bounce+ann@bounces.x.example", "250"),
        ("", "250"),
    ],
)
def test_a_sender_is_refused_where_a_whole_word_of_it_says_so(sink, sender, answer):
    with Wire(sink) as wire:
        assert wire.ask(f"MAIL FROM:<{sender}>").startswith(answer)


@pytest.mark.parametrize("stage", ["mail", "rcpt", "data", "body", "dot", "accepted"])
@pytest.mark.parametrize("action", ["drop", "reset", "hang", "stall"])
@pytest.mark.parametrize("chunked", [False, True])
def test_connections_end_badly_at_every_stage(sink, stage, action, chunked):
    content = "Subject: x\r\n\r\nhi\r\n"
    with Wire(sink) as wire:
        sender = f"{action}-mail@x.example" if stage == "mail" else "s@x.example"
        wire.send(f"MAIL FROM:<{sender}>\r\nRCPT TO:<{action}-{stage}+z@y.example>\r\n")
        expected = {"mail": [], "rcpt": ["250"]}.get(stage, ["250", "250"])
        assert wire.codes(len(expected)) == expected
        if stage not in ("mail", "rcpt"):
            if chunked:
                wire.send(f"BDAT {len(content)} LAST\r\n{content}")
            else:
                wire.send("DATA\r\n")
                if stage != "data":
                    assert wire.codes(1) == ["354"]
                    wire.send(content + ".\r\n")
        if action in ("drop", "reset"):
            assert wire.closed()
        else:
            assert wire.silent(0.04)
            wire.send("NOOP\r\n")
            assert wire.silent(0.02)
    counters = sink.counters()
    assert counters["messages"] == (stage == "accepted")
    assert counters["verdicts"]["dropped" if action in ("drop", "reset") else "hung"] == 1


def test_a_dropped_group_leaves_no_answer_behind(sink):
    with Wire(sink) as wire:
        wire.send("MAIL FROM:<s@x.example>\r\nRCPT TO:<drop-mail@y.example>\r\nDATA\r\n")
        assert wire.closed()


@pytest.mark.parametrize(
    ("word", "wire_text"),
    [
        ("double-dot", b"250 2.0.0 Ok: queued as 1\r\n250 2.0.0 Ok: queued as 1\r\n"),
        ("lf-dot", b"250 2.0.0 Ok: queued as 1\n"),
        ("short-dot", b"250\r\n"),
        ("garbage-dot", b"\x16\x03\x01 What is this\r\n"),
        ("extra-dot", b"250 2.0.0 Ok: queued as 1\r\n250 2.0.0 Nobody asked for this\r\n"),
        ("bye-dot", b"250 2.0.0 Ok: queued as 1\r\n421 4.3.2 Going down\r\n"),
    ],
)
def test_lies_on_the_wire(sink, word, wire_text):
    with Wire(sink) as wire:
        wire.send(f"MAIL FROM:<>\r\nRCPT TO:<{word}@y.example>\r\nDATA\r\n")
        assert wire.codes(3) == ["250", "250", "354"]
        wire.send("Subject: x\r\n\r\nhi\r\n.\r\n")
        got = b""
        while len(got) < len(wire_text):
            got += wire.line()
        assert got.endswith(wire_text)
        assert sink.counters()["messages"] == 1
        if word.startswith("bye"):
            assert wire.closed()


def test_floods_and_huge_lines_come_and_end(sink):
    with Wire(sink) as wire:
        wire.ask("MAIL FROM:<>")
        wire.send("RCPT TO:<huge-rcpt@y.example>\r\n")
        assert len(wire.line()) > 1 << 20
        wire.send("RCPT TO:<flood-rcpt@y.example>\r\n")
        got, tail = 0, b""
        while not tail.endswith(b"250 2.1.5 Ok\r\n"):
            data = wire.socket.recv(1 << 20)
            got += len(data)
            tail = (tail + data)[-64:]
        assert got > 10 << 20
        assert wire.ask("RSET")[:3] == "250"


def test_a_client_may_leave_in_the_middle_of_a_flood(sink):
    with Wire(sink) as wire:
        wire.ask("MAIL FROM:<>")
        wire.send("RCPT TO:<flood-rcpt@y.example>\r\n")
        wire.line()
    with Wire(sink) as wire:
        assert wire.mail("ann@y.example") == OK


def test_greylisting_takes_the_second_try_after_its_time(sink):
    for_long, for_short = (
        {"recipient": f"*@{name}.example", "reply": "451 4.7.1 Greylisted", "grey_seconds": seconds}
        for name, seconds in (("soon", 60), ("grey", 0.1))
    )
    sink.rules(for_long, for_short)
    with Wire(sink) as wire:
        for _ in range(2):
            assert wire.mail("a@soon.example")[-1] == "451"
            wire.ask("RSET")
        assert wire.mail("a@grey.example")[-1] == "451"
        wire.ask("RSET")
        time.sleep(0.11)
        assert wire.mail("a@grey.example") == OK
        assert wire.mail("grey60@y.example")[-1] == "451"


def test_a_rate_is_kept_per_domain_and_second():
    script, token = Script(), read_token("rate3")

    def count(now, domain=b"y"):
        return sum(script.for_recipient(b"%d@%s" % (i, domain), b"", token, 1, now) is None for i in range(10))

    assert [count(5.0), count(5.9), count(5.5, b"z"), count(6.0)] == [3, 0, 3, 3]


def test_connections_beyond_the_limit_of_a_domain_get_421(sink):
    with Wire(sink) as one, Wire(sink) as two, Wire(sink) as three:
        assert one.mail("a@connlimit2.example") == OK
        assert two.mail("b@connlimit2.example") == OK
        assert three.mail("c@connlimit2.example")[-1] == "421"
        assert three.closed()
        assert one.mail("d@connlimit2.example") == OK
        one.ask("QUIT")
        assert one.closed()
        with Wire(sink) as four:
            assert four.mail("e@connlimit2.example") == OK


def test_354_may_be_had_with_no_recipient_taken(sink):
    with Wire(sink) as wire:
        assert wire.mail("norcpt354@y.example")[1] == "550"
        assert wire.ask("DATA")[:3] == "354"
        assert wire.ask(".")[:3] == "554"
        assert wire.mail("ann@y.example") == OK


def test_421_inside_a_pipelined_group_ends_it(sink):
    with Wire(sink) as wire:
        wire.send("MAIL FROM:<s@x.example>\r\nRCPT TO:<ann@y.example>\r\nRCPT TO:<421@y.example>\r\nDATA\r\n")
        assert wire.codes(3) == ["250", "250", "421"]
        assert wire.closed()


@pytest.mark.parametrize(
    ("rule", "greeting", "closes"),
    [
        ({"stage": "banner", "reply": "421 4.3.2 Busy"}, "421", True),
        ({"stage": "banner", "reply": "554 5.0.0 Go away"}, "554", True),
        ({"stage": "banner", "action": "drop"}, "", True),
        ({"stage": "banner", "action": "multi"}, "220", False),
    ],
)
def test_the_greeting_follows_the_script(sink, rule, greeting, closes):
    sink.rules(rule)
    with Wire(sink, greet=False) as wire:
        assert wire.reply()[:3] == greeting
        if closes:
            assert wire.closed()
        else:
            assert wire.ask("EHLO c")[:3] == "250"


def test_a_connection_may_be_reset_as_soon_as_it_is_made(sink):
    sink.rules({"stage": "banner", "action": "reset"})
    try:
        with Wire(sink, greet=False) as wire:
            assert wire.closed()
    except ConnectionResetError:
        pass  # so soon that connecting itself fails
    assert sink.counters()["verdicts"]["dropped"] == 1


def test_a_hanging_greeting_and_shares_of_connections(sink):
    sink.rules({"stage": "banner", "action": "hang", "percent": 50})
    wires = [Wire(sink, greet=False) for _ in range(40)]
    end = time.monotonic() + PATIENCE_SECONDS
    while sum(not wire.silent(0) for wire in wires) + sink.counters()["verdicts"]["hung"] < 40 and time.monotonic() < end:
        time.sleep(0.01)
    silent = sum(wire.silent(0) for wire in wires)
    for wire in wires:
        wire.socket.close()
    assert 8 <= silent <= 32


def test_starttls_can_be_refused_broken_or_injected(sink):
    sink.rules({"stage": "starttls", "reply": "454 4.7.0 TLS not available"})
    with Wire(sink) as wire:
        assert wire.ask("STARTTLS")[:3] == "454"
        assert wire.mail("ann@y.example") == OK
    sink.rules({"stage": "starttls", "action": "extra"})
    with Wire(sink) as wire:
        assert wire.ask("STARTTLS")[:3] == "220"
        assert wire.reply()[:3] == "250"
    for action, ends in (("drop", True), ("garbage", False), ("hang", False)):
        sink.rules({"stage": "handshake", "action": action})
        with Wire(sink) as wire:
            assert wire.ask("STARTTLS")[:3] == "220"
            if ends:
                assert wire.closed()
            elif action == "garbage":
                assert b"TLS" in wire.line()
            else:
                wire.send(b"\x16\x03\x01\x00\x05hello")
                assert wire.silent(0.03)


def test_logins_can_be_refused_for_a_time(sink):
    sink.rules({"stage": "auth", "reply": "454 4.7.0 Temporary authentication failure"})
    with Wire(sink) as wire:
        assert wire.ask("AUTH PLAIN AGEAYg==")[:3] == "454"
    sink.rules({"stage": "auth", "action": "drop"})
    with Wire(sink) as wire:
        wire.send("AUTH PLAIN AGEAYg==\r\n")
        assert wire.closed()


def test_rules_from_a_file_and_tokens_switched_off(tmp_path):
    file = tmp_path / "script.toml"
    file.write_text('[[rule]]\nrecipient = "*@ten.example"\nreply = "451 4.7.1 Slow down"\npercent = 10\n')
    with SinkProcess("--script", str(file), "--no-tokens") as sink, Wire(sink) as wire:
        got = []
        for number in range(500):
            got.append(wire.mail(f"user{number}@ten.example")[1])
            wire.ask("RSET")
        assert 25 <= got.count("451") <= 80
        assert wire.mail("bounce@y.example") == OK
        assert sink.get("/api/v1/script")["rule"][0]["percent"] == 10


def test_a_refused_script_leaves_the_old_one_in_force(sink):
    sink.rules({"recipient": "a@*", "reply": "550 5.0.0 a"})
    for body in (b"", b"[]", b'{"rule": 1}', b'{"rule": [{"stage": "x"}]}', b'{"rule": [], "more": 1}', b"[" * 100_000):
        status, answer, _ = sink.fetch("/api/v1/script", "PUT", body)
        assert status == 400
        assert json.loads(answer)["detail"]
    with Wire(sink) as wire:
        assert wire.mail("a@y.example")[-1] == "550"


def test_rules_for_senders(sink):
    sink.rules({"stage": "mail", "sender": "*@bad.example", "reply": "550 5.7.1 Sender refused"}, {"sender": "b@*", "reply": "452 4.2.2 b"})
    with Wire(sink) as wire:
        assert wire.mail("a@y.example", sender="x@bad.example") == ["550"]
        assert wire.mail("a@y.example", sender="b@x.example")[-1] == "452"


def test_input_that_comes_while_an_answer_waits_is_not_lost(sink):
    with Wire(sink) as wire:
        wire.send("MAIL FROM:<>\r\nRCPT TO:<slow50@y.example>\r\nDATA\r\n")
        time.sleep(0.01)
        wire.send("Subject: x\r\n\r\n")
        wire.send("hi\r\n.\r\nNOOP\r\n")
        assert wire.codes(5) == ["250", "250", "354", "250", "250"]


def test_every_action_and_stage_is_a_rule_that_loads():
    for stage in STAGES:
        for action in ACTIONS:
            if action in ("reply", "norcpt354") and stage in ("body", "accepted", "handshake"):
                continue
            rule = check_rules([{"stage": stage, "action": action, "reply": "450 4.0.0 x" if action == "reply" else ""}], "t")
            assert isinstance(rule[0], Rule)
