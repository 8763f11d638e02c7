"""The process that reads messages: the kernel's limits hold, and the messages behind one that was too much are read."""

import asyncio
import os
from pathlib import Path

import pytest

from domain.bounce_patterns import Pattern
from domain.errors import Unavailable
from inbound.summary import Summary
from inbound.triage_process import Question, TriageProcess, Unreadable
from tests.inbound import mails
from tests.inbound.test_mutations import WORLD, forms

SMALL = Question(True, b"Subject: hello\r\n\r\nhello\r\n")


async def answers(process: TriageProcess, *messages: Question) -> list[Summary | Unreadable]:
    return [answer async for answer in process.read(messages)]


async def test_memory_is_bounded_and_the_next_message_is_read() -> None:
    process = TriageProcess(memory_bytes=120 << 20)
    try:
        first, huge, last = await answers(process, SMALL, Question(True, b"a: b\r\n\r\n" + b"x\r\n" * 25_000_000), SMALL)
    finally:
        await process.close()
    assert isinstance(first, Summary)
    assert isinstance(huge, Unreadable)
    assert "memory" in huge.why
    assert isinstance(last, Summary)
    assert process.restarts == 1


async def test_the_largest_message_we_take_and_the_dearest_need_no_restart() -> None:
    process = TriageProcess()
    largest = mails.dsn(WORLD)[:-8] + b"y" * 76 + b"\r\n" + (b"x" * 76 + b"\r\n") * 134_000
    try:
        found = await answers(process, *(Question(True, raw) for raw in (largest, *(mails.soup(seed) for seed in range(8)), *forms())))
    finally:
        await process.close()
    assert [answer for answer in found if isinstance(answer, Unreadable)] == []
    assert process.restarts == 0


async def test_a_caller_who_goes_away_leaves_no_answers_behind_for_the_next() -> None:
    process = TriageProcess()
    try:
        reading = process.read([Question(True, mails.plain(f"number {number}")) for number in range(50)])
        assert isinstance(await anext(reading), Summary)
        await reading.aclose()
        (answer,) = await answers(process, SMALL)
        assert isinstance(answer, Summary)
        assert answer.subject == "hello"
        asking = asyncio.create_task(answers(process, *[Question(True, mails.soup(seed)) for seed in range(20)]))
        await asyncio.sleep(0.05)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        (answer,) = await answers(process, SMALL)
        assert isinstance(answer, Summary)
        assert answer.subject == "hello"
    finally:
        await process.close()


async def test_a_process_that_does_not_start_is_trouble_and_no_answer() -> None:
    process = TriageProcess()
    await process.use([Pattern("/(/", "Hard")])  # nobody checked it
    with pytest.raises(Unavailable, match="does not start"):
        await answers(process, SMALL)
    assert process.pid is None


async def test_it_knows_neither_key_nor_database_and_reads_with_the_operator_s_patterns() -> None:
    process = TriageProcess()
    os.environ["SLUICE_SECRETS__KEY"] = "planted"
    try:
        await process.use([Pattern("we do not want you", "Hard")])
        (answer,) = await answers(process, Question(True, mails.dsn(WORLD, status="5.7.1", text="550 5.7.1 We do not want you")))
        assert isinstance(answer, Summary)
        assert (answer.failed[0].means.hard, answer.failed[0].means.rule) == (True, "pattern we do not want you==>Hard")
        assert b"planted" not in Path(f"/proc/{process.pid}/environ").read_bytes()
    finally:
        del os.environ["SLUICE_SECRETS__KEY"]
        await process.close()
