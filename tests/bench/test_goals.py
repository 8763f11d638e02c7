"""What `sluice bench` makes of its rows: medians, ratios, goals; and that its parts measure what they say."""

import os
import subprocess
import sys
import time
from pathlib import Path

from bench import cases, deep_queue, end_to_end, goals, measure, newsletter, peers
from bench.end_to_end import Case
from bench.measure import Row, Sample
from store import feed
from store.embedded import Backends
from store.postgres import Pool


def row(name: str, cpu: float | None = None, rate: float | None = None) -> Row:
    return Row(name=name, messages=1000, cpu_us_per_message=cpu, messages_per_second=rate, sink_cpu_us_per_message=1.0)


def test_a_goal_is_judged_from_rows_of_one_run():
    rows = [row(goals.SOURCE, 40.0), row(goals.ENGINE, 28.0), row("engine, STARTTLS, DATA, 20 connections", 84.0)]
    judged = {goal.name: goal for goal in goals.judge(rows)}
    first = judged["engine end to end / smtp-source, CPU"]
    assert (first.number, first.value, first.goal, first.met) == (1, 0.7, "<= 0.75", True)
    assert judged["TLS / plain, CPU"].met is False


def test_a_goal_without_its_rows_is_left_out():
    assert goals.judge([row(goals.ENGINE, 28.0), measure.skipped(goals.SOURCE, "not installed")]) == []


def test_what_was_measured_beside_a_row_judges_it():
    rows = [row(goals.OPENSSL, 286.0), row(goals.NODEMAILER_SIGNED, 2860.0), row(goals.ENGINE, 30.0)]
    assert goals.judge(rows) == []
    rows[0].beside_cpu_us_per_message, rows[1].beside_cpu_us_per_message = 260.0, 220.0
    judged = {goal.name: (goal.value, goal.met) for goal in goals.judge(rows)}
    assert judged == {
        "signed by OpenSSL / one OpenSSL signature, CPU": (1.1, True),
        "nodemailer with its DKIM / engine signed, CPU": (13.0, True),
    }


def test_memory_and_idle_connections_are_judged():
    deep = Row(name=goals.DEEP, cpu_us_per_message=40.0, memory_mib=180.0)
    idle = Row(name=goals.IDLE, bytes_per_connection=9000.0, connections=5000)
    judged = [(goal.number, goal.value, goal.met) for goal in goals.judge([deep, row(goals.SHALLOW, 40.0), idle])]
    assert judged == [(9, 1.0, True), (9, 180.0, True), (10, 8.789, False)]


def test_every_group_is_measured_by_something():
    assert set(cases.GROUPS) - {"parts"} == {name.removeprefix("_") for name in dir(cases.Run)} & set(cases.GROUPS)
    assert set(cases.QUICK) < set(cases.GROUPS)


def test_a_peer_that_cannot_run_is_a_row_with_the_reason():
    def work() -> list[Sample]:
        raise RuntimeError("it is not installed (how to install it)")

    assert peers.rows_of("a peer", work).skipped == "it is not installed (how to install it)"


async def test_ten_million_or_ten_are_queued_as_the_feeder_would_have_it(
    pool: Pool, fresh_database_url: str, redis_url: str, tmp_path: Path
):
    case = Case(name="deep", recipients=1)
    async with end_to_end.opened(Backends(fresh_database_url, redis_url, "", owned=False), tmp_path) as bench:
        campaign = await deep_queue.DeepQueue(bench, case)._queue(await bench._server(case, "127.0.0.1:25"), 1234)
    async with pool.acquire() as connection:
        first, second, third = await feed.announce(connection, campaign, 9)
        numbers, recipients = await feed.recipients_of(connection, third)
    assert (first.first_number, second.last_number, third.last_number) == (1, 1000, 1234)
    assert (len(numbers), recipients[-1].number, recipients[-1].email) == (234, 1234, "letter.1234@shore34.example")
    built = newsletter.compiled().build(recipients, composed_at=1.7e9, attempt=1)
    assert all(isinstance(one, tuple) and 9_500 < len(one[2]) < 11_500 for one in built)


def test_round_trips_are_counted_per_connection():
    name = "engine, BDAT window 5, 10 connections, 20 ms"
    (goal,) = goals.judge([row(name, 50.0, 2375.0)])
    assert (goal.number, goal.value, goal.met) == (6, 0.95, True)


def test_ratios_are_against_smtp_source_and_only_of_senders():
    rows = [row(goals.SOURCE, 40.0), row("a sender", 60.0), Row(name="a part", cpu_us_per_message=2.0), measure.skipped("gone", "why")]
    goals.add_ratios(rows)
    assert [found.ratio for found in rows] == [1.0, 1.5, None, None]


def test_a_row_is_the_median_of_each_figure():
    samples = [
        Sample(messages=1000, seconds=seconds, cpu_seconds=cpu, sink_seconds=0.01, foreign=foreign)
        for seconds, cpu, foreign in ((1.0, 0.03, 0.0), (4.0, 0.05, 1.2), (2.0, 0.04, 0.1))
    ]
    made = measure.row("x", samples)
    assert (made.messages_per_second, made.cpu_us_per_message, made.sink_cpu_us_per_message) == (500.0, 40.0, 10.0)
    assert (made.store_cpu_us_per_message, made.foreign_cpu, made.runs) == (None, 0.1, 3)


def test_cpu_of_a_child_is_seen_while_it_runs_and_after_it_ended():
    burn = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\nprint(1, flush=True)\ninput()"
    child = subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    before = measure.cpu_seconds(os.getpid())
    child.stdout.readline()
    assert measure.cpu_seconds(child.pid) >= 0.29
    assert child.pid in measure.descendants(os.getpid())
    child.communicate("\n")
    assert measure.cpu_seconds(child.pid) == 0.0
    assert measure.cpu_seconds(os.getpid()) - before >= 0.29


def test_our_own_work_is_not_foreign():
    watch = measure.Watch()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    seconds, foreign = watch.stop()
    assert seconds >= 0.3
    assert foreign <= len(measure.cores())


def test_the_newsletter_is_about_ten_kilobytes_and_the_same_in_every_run():
    mail_from, rcpt, wire = newsletter.wire()
    assert 9_500 <= len(wire) <= 11_500
    assert rcpt == b"letter.0@shore0.example"
    assert mail_from.endswith(b"@" + newsletter.MFROM.encode())
    assert newsletter.rows(50) == newsletter.rows(50)
    assert (mail_from, rcpt, wire) == newsletter.wire()
