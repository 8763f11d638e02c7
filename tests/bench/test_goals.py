"""What `sluice bench` makes of its rows: medians, ratios, goals; and that its parts measure what they say."""

import os
import subprocess
import sys
import time

from bench import goals, measure, newsletter
from bench.measure import Row, Sample


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
