"""Mutated mail: whatever a message becomes, reading it raises nothing, takes no second and keeps no memory.

A short run here; a million with `-m slow`. Each message follows from its seed, which a failure names.
"""

import random
import resource
import time
from typing import Final

import pytest

from config.keys import Keyring
from domain.bounce import shipped_rules
from domain.reply import one_line
from inbound import triage
from inbound.summary import Summary, summarize
from tests.inbound import mails
from tests.inbound.bounce_forms import FORMS
from tests.inbound.conftest import World

LONGEST_SECONDS: Final = 1.0  # S17
MOST_GROWTH_BYTES: Final = 160 * 1024 * 1024  # RE2's tables of up to 64 MiB for the rules and for each list of words
HOSTILE: Final = (
    b"\r\n\r\n", b"\n", b"\x00", b"\xff\xfe", b"--x\r\n", b"Content-Type: multipart/mixed; boundary=x\r\n\r\n", b"=?utf-8?b?", b"?=",
    b"Content-Type: message/rfc822\r\n\r\n", b"Content-Transfer-Encoding: base64\r\n", b"Final-Recipient: rfc822; a@b.example\r\n",
    b"Action: failed\r\n", b"Status: 5.1.1\r\n", b"Diagnostic-Code: smtp; 550 5.1.1 unknown\r\n", b"Reporting-MTA: dns; x\r\n", b"a@",
    b"<a@b.example>", b"550-5.1.1 ", b"(" * 40, b'"', b"\\", b"%s%n", b"\xe2\x80\xa8", b"\x1b$B", b"charset=utf-7", b"boundary=", b";" * 30,
    b"RCPT TO:<", b"550 ", b"=20=\r\n", b"<style>", b"<a ", b"&nbsp;", b"\r", b">From ", b"Feedback-Type: abuse\r\n",
)  # fmt: skip


def mutated(choose: random.Random, sources: list[bytes]) -> bytes:
    """One message made of others."""
    message = choose.choice(sources)
    for _ in range(choose.choice((1, 1, 2, 3, 6, 12))):
        at, length = choose.randrange(len(message) + 1), choose.choice((1, 2, 8, 40, 300, 2000))
        match choose.randrange(8):
            case 0:
                message = message[:at] + message[at + length :]
            case 1:
                message = message[:at] + choose.choice(HOSTILE) + message[at:]
            case 2:
                message = message[:at] + message[at : at + length] * choose.choice((2, 3, 50)) + message[at + length :]
            case 3:
                message = message[:at] + bytes(choose.randrange(256) for _ in range(min(length, 40))) + message[at + length :]
            case 4:
                other = choose.choice(sources)
                start = choose.randrange(len(other) + 1)
                message = message[:at] + other[start : start + length] + message[at:]
            case 5:
                message = message[:at]
            case 6:
                message = message.replace(b"\r\n", choose.choice((b"\n", b"\r\n", b"\n\n", b"\r\n\r\n")))
            case 7:
                lines = message.split(b"\n")
                choose.shuffle(lines)
                message = b"\n".join(lines)
        message = message[:400_000]
    return message


def run(world: World, first_seed: int, count: int) -> float:
    """Read `count` mutations; the longest took so many seconds of processor time."""
    sources = [mails.dsn(world), mails.arf(world), mails.plain("unsubscribe"), mails.dsn(world, action="delayed", status="4.4.1"),
               mails.soup(recipients=20), *forms()]  # fmt: skip
    shipped_rules()
    longest, before = 0.0, 0
    for seed in range(first_seed, first_seed + count):
        choose = random.Random(seed)
        message = mutated(choose, sources)
        started = time.process_time()
        try:
            summary = summarize(triage.read(message, null_sender=choose.random() < 0.7))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
        took = time.process_time() - started
        longest = max(longest, took)
        assert took < LONGEST_SECONDS, f"seed {seed} took {took:.2f} s"
        check(seed, summary)
        if seed == first_seed + count // 4:  # what is built once is there
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < MOST_GROWTH_BYTES, f"{grown >> 20} MiB more than after the first quarter"
    return longest


def forms() -> list[bytes]:
    """Reports in prose of many makes."""
    return [
        f"From: {sender}\r\nSubject: {subject}\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n{body}".encode()
        for _, sender, subject, body, *_ in FORMS
    ]


def check(seed: int, summary: Summary) -> None:
    """What is said of a message is bounded, and clean."""
    texts = [summary.subject, summary.sender, *summary.returned.values(), *summary.report.values()]
    for about in (*summary.failed, *summary.delayed):
        texts += [about.recipient, about.status, about.diagnostic, about.mta, *about.also]
        assert not (about.means.hard and about.means.fault != "recipient"), f"seed {seed}"
    for text in texts:
        assert text == one_line(text.encode()), f"seed {seed}: {text!r}"
    assert len(summary.failed) <= 20, f"seed {seed}"


WORLD: Final = World(Keyring(bytes(range(32))), 1, 1, 1, 1, "Ada@reader.example")


def test_a_mutated_message_is_read_like_any_other() -> None:
    run(WORLD, 0, 4000)


@pytest.mark.slow
def test_a_million_mutated_messages() -> None:
    run(WORLD, 1_000_000, 1_000_000)
