"""What surrounds a fleet in the fault harness: clocks, names, certificates; how growth is judged, and the table of results."""

import asyncio
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import dns.asyncquery
import dns.message
import dns.rcode
import pytest

from bench.chaos import growth, report, world
from bench.chaos.growth import Sample
from bench.chaos.runner import Result

# --- clocks -----------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(bool(world.why_not("faketime")), reason=world.why_not("faketime"))
def test_a_clock_jumps_in_its_process_only_and_leaves_the_monotonic_one_alone(tmp_path: Path) -> None:
    clock = world.Clock(tmp_path / "clock")
    clock.set("+3600")
    code = "import time; print(time.time(), time.monotonic())"
    said = subprocess.run([sys.executable, "-c", code], env=clock.environment(), capture_output=True, check=True, text=True).stdout.split()
    assert 3500 < float(said[0]) - time.time() < 3700
    assert abs(float(said[1]) - time.monotonic()) < 60


# --- names ------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(bool(world.why_not("named")), reason=world.why_not("named"))
async def test_the_name_server_answers_as_badly_as_it_is_told(tmp_path: Path) -> None:
    server = world.NameServer(tmp_path / "resolv.conf")
    await server.start()
    try:
        assert server.address in server.resolv.read_text()

        async def ask() -> dns.message.Message:
            answer, _ = await dns.asyncquery.udp_with_fallback(dns.message.make_query("a.chaos.test", "A"), server.address, timeout=2)
            return answer

        assert [str(item) for rrset in (await ask()).answer for item in rrset] == ["127.0.0.1"]
        for mode, code in (("servfail", dns.rcode.SERVFAIL), ("nxdomain", dns.rcode.NXDOMAIN)):
            server.mode = mode
            assert (await ask()).rcode() == code
        server.mode = "many"
        assert len((await ask()).answer[0]) == 1000
        server.mode = "loop"
        assert {str(rrset.name): str(rrset[0]) for rrset in (await ask()).answer} == {
            "a.chaos.test.": "loop.a.chaos.test.", "loop.a.chaos.test.": "a.chaos.test.",
        }  # fmt: skip
        server.mode, asked = "silent", server.asked
        with pytest.raises(dns.exception.Timeout):
            await dns.asyncquery.udp(dns.message.make_query("a.chaos.test", "A"), server.address, timeout=0.3)
        assert server.asked == asked + 1
    finally:
        await server.stop()


# --- certificates -----------------------------------------------------------------------------------------------------------


async def shake_hands(authority: world.Authority, options: tuple[str, ...], host: str) -> None:
    """A TLS handshake of a client that trusts the authority. Raises ssl.SSLCertVerificationError."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(options[1], options[3])
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=server_context, family=socket.AF_INET)
    context = ssl.create_default_context(cafile=str(authority.file))
    try:
        async with asyncio.timeout(60):
            port = server.sockets[0].getsockname()[1]
            _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=host)
            writer.close()
    finally:
        server.close()


async def test_certificates_are_right_or_wrong_on_purpose(tmp_path: Path) -> None:
    authority = world.Authority(tmp_path)
    await shake_hands(authority, authority.issue("good", ["a.chaos.test", "b.chaos.test"], 30), "b.chaos.test")
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        await shake_hands(authority, authority.issue("wrong", ["elsewhere.chaos.test"], 30), "a.chaos.test")
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        await shake_hands(authority, authority.issue("expired", ["a.chaos.test"], -1), "a.chaos.test")


# --- growth -----------------------------------------------------------------------------------------------------------------


def samples(memory: tuple[int, int], descriptors: tuple[int, int], tasks: tuple[int, int]) -> list[Sample]:
    """Ninety looks at one process, from one value to the other."""

    def at(ends: tuple[int, int], n: int) -> int:
        return ends[0] + (ends[1] - ends[0]) * n // 89

    return [
        Sample(at=2.0 * n, slot="engine.0", pid=7, age=20.0 + 2 * n, memory=at(memory, n) << 20, descriptors=at(descriptors, n),
               tasks=at(tasks, n))
        for n in range(90)
    ]  # fmt: skip


def test_what_stays_as_large_as_it_is_is_flat() -> None:
    said, broken = growth.compared("engine.0", samples((90, 93), (40, 44), (30, 33)))
    assert broken == []
    assert "MiB" in said
    assert "descriptors" in said
    assert "tasks" in said


@pytest.mark.parametrize(
    ("memory", "descriptors", "tasks", "word"),
    [((90, 110), (40, 40), (30, 30), "memory"), ((90, 90), (40, 60), (30, 30), "descriptors"), ((90, 90), (40, 40), (30, 60), "tasks")],
    ids=["memory", "descriptors", "tasks"],
)
def test_what_grows_is_named(memory: tuple[int, int], descriptors: tuple[int, int], tasks: tuple[int, int], word: str) -> None:
    _, broken = growth.compared("engine.0", samples(memory, descriptors, tasks))
    assert len(broken) == 1
    assert word in broken[0]


# --- the table --------------------------------------------------------------------------------------------------------------


def test_results_become_a_table_by_groups() -> None:
    made = report.markdown(
        [
            Result(fault="engine-killed", runs=3, recipients=60_000, duplicates_announced=5, heal_seconds=1.25),
            Result(fault="engine-stopped", runs=3, recipients=60_000, heal_seconds=2.0),
            Result(fault="kill-storm", runs=1, recipients=1000, lost=1),
        ]
    ).splitlines()
    assert made[2] == ("| engines killed, stopped, terminated; without descriptors or memory (2) | 6 | 120,000 | 0 | 0 | 5 | 0 | 2.0 s |")
    assert made[3] == "| kill-storm (1) | 1 | 1,000 | 1 | 0 | 0 | 0 | 0.0 s |"
