"""Reading messages of strangers in a process of its own (S17): a second of processor time and a bounded memory for each message.

    python -m inbound.triage_process MEMORY_BYTES CPU_SECONDS

The child reads frames on standard input and answers each on standard output, in order. A frame is four octets of length and MessagePack;
the first one holds the operator's bounce patterns, and its answer is a single octet: ready.
Its limits are the kernel's, so they hold inside compiled code, too: a message that is over one of them ends the process, and only that
message is lost to reading. The parent starts another and goes on behind it.
"""

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, Sequence
from typing import Final, NamedTuple

import msgspec

from domain.bounce_patterns import Pattern
from domain.errors import Unavailable
from inbound.summary import Summary

MEMORY_BYTES: Final = 256 * 1024 * 1024  # of address space, libraries and RE2's tables included
CPU_SECONDS: Final = 1.0
REAL_SECONDS: Final = 10.0  # a machine that is busy may take this long for them
START_SECONDS: Final = 30.0
LARGEST_ANSWER_BYTES: Final = 4 * 1024 * 1024


class Question(msgspec.Struct, frozen=True, array_like=True):
    """One message to read."""

    null_sender: bool
    raw: bytes


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """How it was read, or why it could not be."""

    summary: Summary | None
    trouble: str = ""


class Unreadable(NamedTuple):
    """A message that is kept raw because reading it took too much."""

    why: str


class TriageProcess:
    """The child and its restarts. Not for several callers at once."""

    def __init__(self, *, memory_bytes: int = MEMORY_BYTES, cpu_seconds: float = CPU_SECONDS, real_seconds: float = REAL_SECONDS) -> None:
        self.restarts = 0  # after a message that took too much
        self._limits = (str(memory_bytes), str(cpu_seconds))
        self._real_seconds = real_seconds
        self._cpu_seconds = cpu_seconds
        self._process: Process | None = None
        self._patterns: Sequence[Pattern] = ()
        self._decode = msgspec.msgpack.Decoder(Answer).decode

    async def use(self, patterns: Sequence[Pattern]) -> None:
        """From now on read with these patterns of the operator, which were checked."""
        self._patterns = patterns
        await self._end()

    async def read(self, messages: Sequence[Question]) -> AsyncGenerator[Summary | Unreadable, None]:
        """One answer for each message, in order. Raises Unavailable when the child does not start."""
        done = 0
        while done < len(messages):
            process = await self._running()
            sending = asyncio.create_task(_send(process, messages[done:]))
            try:
                while done < len(messages):
                    answer = await self._answer(process)
                    done += 1
                    yield answer
                    if isinstance(answer, Unreadable):
                        await self._end()
                        self.restarts += 1
                        break
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
                if done < len(messages) and self._process is process:
                    await self._end()  # the caller went away: answers nobody reads must not be taken for the next ones

    async def _answer(self, process: Process) -> Summary | Unreadable:
        assert process.stdout is not None
        try:
            async with asyncio.timeout(self._real_seconds):
                size = int.from_bytes(await process.stdout.readexactly(4))
                if size > LARGEST_ANSWER_BYTES:
                    return Unreadable("the reader's answer was too large")
                answer = self._decode(await process.stdout.readexactly(size))
        except TimeoutError:
            return Unreadable(f"reading it took more than {self._real_seconds:g} s")
        except asyncio.IncompleteReadError:
            code = await process.wait()
            if code == -signal.SIGPROF:
                return Unreadable(f"reading it took more than {self._cpu_seconds:g} s of processor time")
            return Unreadable(f"the reader ended at it (exit code {code})")
        return answer.summary if answer.summary is not None else Unreadable(answer.trouble)

    async def _running(self) -> Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "inbound.triage_process", *self._limits, stdin=PIPE, stdout=PIPE,
            # nothing of ours that a message could be made to tell: neither the database nor the key
            env={name: value for name, value in os.environ.items() if name in _ENVIRONMENT},
        )  # fmt: skip
        assert process.stdout is not None
        try:
            async with asyncio.timeout(START_SECONDS):
                await _send(process, [self._patterns])
                await process.stdout.readexactly(1)
        except (TimeoutError, asyncio.IncompleteReadError):
            await _kill(process)
            raise Unavailable(f"the process that reads messages does not start (exit code {process.returncode})") from None
        except BaseException:
            await _kill(process)
            raise
        self._process = process
        return process

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await _kill(process)

    async def close(self) -> None:
        """End the child."""
        await self._end()

    @property
    def pid(self) -> int | None:
        """Of the running child."""
        return self._process.pid if self._process else None


_ENVIRONMENT: Final = frozenset({"PATH", "PYTHONPATH", "LANG", "LC_ALL", "TMPDIR", "PYTHONHASHSEED"})


async def _kill(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()
    if process.stdin is not None:
        process.stdin.close()


async def _send(process: Process, messages: Sequence[Question | Sequence[Pattern]]) -> None:
    assert process.stdin is not None
    encode = msgspec.msgpack.Encoder().encode
    with contextlib.suppress(ConnectionError):
        for message in messages:
            frame = encode(message)
            process.stdin.write(len(frame).to_bytes(4))
            process.stdin.write(frame)
            await process.stdin.drain()


# --- the child ------------------------------------------------------------------------------------------------------------------


def main(memory_bytes: int, cpu_seconds: float) -> int:
    """Read until standard input ends."""
    import resource

    from domain.bounce import shipped_rules
    from inbound import triage
    from inbound.summary import summarize

    questions, answers = sys.stdin.buffer, sys.stdout.buffer
    patterns = msgspec.msgpack.decode(questions.read(int.from_bytes(questions.read(4))), type=list[Pattern])
    rules = shipped_rules().with_patterns(patterns)
    triage.read(b"Subject: Undelivered mail\n\n<a@b.example>: 550 5.1.1 unknown\n", null_sender=True, rules=rules)  # what is built once
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    decode, encode = msgspec.msgpack.Decoder(Question).decode, msgspec.msgpack.Encoder().encode
    answers.write(b"\n")
    answers.flush()
    while len(head := questions.read(4)) == 4:
        trouble = ""
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            question = decode(questions.read(int.from_bytes(head)))
            answer = encode(Answer(summarize(triage.read(question.raw, null_sender=question.null_sender, rules=rules))))
        except MemoryError:
            trouble = "reading it took more memory than there is for it"
        except Exception as bug:  # a bug of ours must cost one message, not the mail behind it
            trouble = f"it could not be read: {type(bug).__name__}: {bug}"[:300]
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        if trouble:
            answer = encode(Answer(None, trouble))
        answers.write(len(answer).to_bytes(4) + answer)
        answers.flush()
        if trouble:
            return 1  # what it left behind goes with the process
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2])))
