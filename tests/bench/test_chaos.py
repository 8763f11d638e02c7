"""The fault harness: its verdict, its proxy, its options; and one whole run with a kill in it."""

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from bench.chaos import __main__ as chaos
from bench.chaos import catalogue, world
from bench.chaos.load import AcceptedLog, Copies, Load
from bench.chaos.proxy import Link, Weather
from bench.chaos.reconcile import reconcile
from bench.chaos.runner import Result, verdict_sentences

ROOT = Path(__file__).resolve().parents[2]
ANN, BOB = "l1.0.1@people.example", "l1.0.2@people.example"


# --- the verdict ------------------------------------------------------------------------------------------------------------


def test_who_was_accepted_once_and_recorded_as_delivered_is_no_news() -> None:
    verdict = reconcile([ANN, BOB], {ANN: ["<1>"], BOB: ["<2>"]}, [("d", ANN, "250 ok"), ("d", BOB, "250 ok")])
    assert (verdict.lost, verdict.false_delivered, verdict.false_bounced, verdict.duplicates_unexplained) == (0, 0, 0, 0)
    assert not verdict_sentences(verdict, "none", 0, "retry")


@pytest.mark.parametrize(
    ("copies", "records", "field"),
    [
        ([], [], "lost"),
        (["<1>"], [], "lost"),
        (["<1>"], [("d", ANN, ""), ("d", ANN, "")], "lost"),
        (["<1>"], [("d", ANN, ""), ("b", ANN, "")], "lost"),
        ([], [("s", ANN, "")], "lost"),
        ([], [("d", ANN, "250 ok")], "false_delivered"),
        ([], [("d", ANN, "assumed delivered: lost")], "false_delivered"),
        (["<1>"], [("b", ANN, "550 no")], "false_bounced"),
        ([], [("x", ANN, "too old")], "false_bounced"),
        ([], [("b", ANN, "given up: lost")], "false_bounced"),
        (["<1>", "<1>"], [("d", ANN, "")], "duplicates_unexplained"),
        (["<1>", "<2>"], [("d", ANN, ""), ("u", ANN, "")], "duplicates_unexplained"),
        (["<1>", "<1>"], [("d", ANN, ""), ("u", ANN, "")], "duplicates_announced"),
    ],
)
def test_each_broken_promise_is_counted_under_its_name(copies: list[str], records: list[tuple[str, str, str]], field: str) -> None:
    verdict = reconcile([ANN], {ANN: copies} if copies else {}, records)
    counts = {name: getattr(verdict, name) for name in Result.__struct_fields__ if name in verdict.__struct_fields__}
    assert {name for name, count in counts.items() if count and name != "recipients"} == {field}
    assert verdict_sentences(verdict, "none", 0, "retry")


def test_what_on_uncertain_decides_is_honest_when_a_u_record_names_it() -> None:
    records = [("d", ANN, "assumed delivered: lost"), ("u", ANN, ""), ("b", BOB, "given up: lost"), ("u", BOB, "")]
    verdict = reconcile([ANN, BOB], {BOB: ["<2>"]}, records)
    assert (verdict.lost, verdict.false_delivered, verdict.false_bounced, verdict.uncertain) == (0, 0, 0, 2)


def test_a_refusal_counts_only_for_those_a_sink_refused() -> None:
    verdict = reconcile([ANN, BOB], {}, [("b", ANN, "550"), ("b", BOB, "550")], may_refuse=lambda address: address == ANN)
    assert verdict.false_bounced == 1


def test_mail_to_a_stranger_is_unexplained() -> None:
    assert reconcile([ANN], {ANN: ["<1>"], BOB: ["<2>"]}, [("d", ANN, "")]).duplicates_unexplained == 1


def test_announced_copies_are_held_against_the_window() -> None:
    verdict = reconcile([ANN], {ANN: ["<1>", "<1>"]}, [("d", ANN, ""), ("u", ANN, "")])
    assert not verdict_sentences(verdict, "window", 1, "retry")
    assert not verdict_sentences(verdict, "named", 0, "retry")
    assert verdict_sentences(verdict, "window", 0, "retry")
    assert verdict_sentences(verdict, "window", 1, "assume_delivered")


def test_the_log_of_a_sink_is_followed_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "accepted.jsonl"
    file.write_text('{"message_id":"<0>","recipient":"old@people.example"}\n')
    copies = Copies([AcceptedLog(file)])
    with file.open("a") as log:
        log.write('{"message_id":"<1>","recipient":"l7.0.1@people.example","at":"now"}\n{"message_id":"<2>","reci')
        log.flush()
        copies.read()
        assert copies.of(7) == {"l7.0.1@people.example": ["<1>"]}
        log.write('pient":"l7.0.1@people.example"}\n')
    copies.read()
    assert copies.of(7) == {"l7.0.1@people.example": ["<1>", "<2>"]}
    assert copies.total == 2


def test_every_recipient_of_a_load_has_an_address_of_its_own() -> None:
    addresses = Load(3, 10).addresses(4)
    assert len(set(addresses)) == 10
    assert addresses[0] == "l3.0.1@people.example"


# --- the proxy ---------------------------------------------------------------------------------------------------------------

Dial = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


@pytest.fixture
async def link() -> AsyncIterator[Link]:
    """A link to a server that says everything back in capitals."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data.upper())
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    made = Link("echo", ("127.0.0.1", server.sockets[0].getsockname()[1]))
    await made.start()
    try:
        yield made
    finally:
        await made.stop()
        server.close()


async def dial(link: Link) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", link.port)


async def says(reader: asyncio.StreamReader, seconds: float = 5.0) -> bytes:
    async with asyncio.timeout(seconds):
        return await reader.read(100)


async def test_a_link_passes_everything_on_in_order(link: Link) -> None:
    reader, writer = await dial(link)
    sent = b"abc" * 200_000
    writer.write(sent)
    async with asyncio.timeout(60):
        assert await reader.readexactly(len(sent)) == sent.upper()
    writer.close()


async def test_a_deaf_link_swallows_and_its_connections_are_reset_when_it_heals(link: Link) -> None:
    reader, writer = await dial(link)
    writer.write(b"one")
    assert await says(reader) == b"ONE"
    await link.set(Weather(lose_down=True))
    writer.write(b"two")
    with pytest.raises(TimeoutError):
        await says(reader, 0.2)
    async with asyncio.timeout(60):
        while link.swallowed < 3:
            await asyncio.sleep(0.01)
    assert link.swallowed == 3
    await link.heal()
    with pytest.raises(ConnectionResetError):
        await says(reader)
    reader, writer = await dial(link)
    writer.write(b"three")
    assert await says(reader) == b"THREE"
    writer.close()


async def test_a_stalled_link_goes_on_where_it_stopped(link: Link) -> None:
    reader, writer = await dial(link)
    writer.write(b"one")
    assert await says(reader) == b"ONE"
    await link.set(Weather(stalled=True))
    writer.write(b"two")
    with pytest.raises(TimeoutError):
        await says(reader, 0.2)
    await link.heal()
    assert await says(reader) == b"TWO"
    writer.close()


async def test_a_slow_link_delays_without_disorder(link: Link) -> None:
    await link.set(Weather(delay_seconds=0.1))
    reader, writer = await dial(link)
    started = asyncio.get_running_loop().time()
    for word in (b"a", b"b", b"c"):
        writer.write(word)
        await asyncio.sleep(0.01)
    async with asyncio.timeout(60):
        assert await reader.readexactly(3) == b"ABC"
    assert asyncio.get_running_loop().time() - started >= 0.2
    writer.close()


async def test_a_link_refuses_and_listens_on_the_same_port_again(link: Link) -> None:
    port = link.port
    await link.set(Weather(refuse=True))
    with pytest.raises(OSError):
        await dial(link)
    await link.heal()
    assert link.port == port
    _, writer = await dial(link)
    writer.close()


async def test_a_link_resets_what_is_open_and_what_comes(link: Link) -> None:
    reader, writer = await dial(link)
    writer.write(b"one")
    assert await says(reader) == b"ONE"
    assert link.reset() == 1
    with pytest.raises(ConnectionResetError):
        await says(reader)
    await link.set(Weather(reset_new=True))
    with pytest.raises(ConnectionError):
        reader, writer = await dial(link)
        writer.write(b"one")
        assert await says(reader) == b""
        raise ConnectionError  # an end of file is as good


# --- the command --------------------------------------------------------------------------------------------------------------


def test_names_of_faults_are_unique_and_every_row_of_the_matrix_is_there_or_excused() -> None:
    names = [fault.name for fault in catalogue.FAULTS]
    assert len(names) == len(set(names))
    assert {fault.row for fault in catalogue.FAULTS} | {entry.row for entry in catalogue.CANNOT} == set(range(1, 41))


def test_quick_holds_every_process_fault(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = chaos.parser().parse_args(["--quick"])
    assert [fault.name for fault in catalogue.FAULTS if fault.process and fault not in chaos.chosen(arguments)] == []


@pytest.mark.parametrize(
    "options", [["--fault", "no-such-fault"], ["--smtp", "127.0.0.1:25"], ["--smtp", "nonsense", "--accepted", "x"]], ids=" ".join
)
def test_wrong_options_are_refused_with_a_sentence(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert chaos.main(options) == 2
    assert "sluice chaos:" in capsys.readouterr().err


async def run_chaos(*options: str) -> tuple[int, str, str]:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.chaos", *options, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=ROOT
    )
    out, err = await asyncio.wait_for(child.communicate(), 900.0)
    assert child.returncode is not None
    return child.returncode, out.decode(), err.decode()


# Process faults that no other test plays, so that every one is played once with each run of the tests. The rest is in
# tests/faults/test_process_*.py (rows 3, 4, 6, 37), tests/faults/test_store_*.py (7 to 9, 13) and tests/engine/test_engine_killed.py (1, 2)
ONLY_HERE = (
    "engine-killed",
    "engine-terminated-killed",
    "no-memory",
    "valkey-data-lost",
    "control-killed",
    "inbound-killed",
    "no-descriptors",
)


async def test_process_faults_that_are_played_nowhere_else_break_no_promise() -> None:
    options = [word for fault in ONLY_HERE for word in ("--fault", fault)]
    # Four seconds' mail, of which two are left when the load is seen to be under way
    code, out, err = await run_chaos("--recipients", "2400", "--rate", "600", "--json", *options)
    assert code == 0, err
    results = json.loads(out)
    assert all(list(result) == list(Result.__struct_fields__) for result in results)
    assert all(result["lost"] == result["duplicates_unexplained"] == 0 and result["runs"] == 1 for result in results)
    able = [fault.name for fault in catalogue.FAULTS if fault.name in ONLY_HERE and not any(map(world.why_not, fault.needs))]
    assert {result["fault"] for result in results} == set(able), err


@pytest.mark.slow
async def test_every_process_fault_once_breaks_no_promise() -> None:
    """What operators run as `sluice chaos --quick`."""
    code, out, err = await run_chaos("--quick", "--recipients", "3200", "--rate", "800", "--json")
    assert code == 0, err
    played = {result["fault"] for result in json.loads(out)}
    able = {fault.name for fault in catalogue.FAULTS if fault.process and not any(map(world.why_not, fault.needs))}
    assert played == able, err


@pytest.mark.slow
async def test_several_fleets_play_at_a_time() -> None:
    faults = ("valkey-data-lost", "engine-terminated")
    options = [word for fault in faults for word in ("--fault", fault)]
    code, out, err = await run_chaos("--recipients", "2000", "--rate", "800", "--jobs", "2", "--json", *options)
    assert code == 0, err
    assert [(result["fault"], result["recipients"]) for result in json.loads(out)] == [(fault, 2000) for fault in faults]


async def test_foreign_servers_are_harmed_through_their_links_only(tmp_path: Path, database_url: str, redis_url: str) -> None:
    accepted = tmp_path / "accepted.jsonl"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sink = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.sink", "--port", str(port), "--http-port", "0", "--accepted", str(accepted), "--accepted-before-reply",
        stdout=asyncio.subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    try:
        assert sink.stdout is not None
        await sink.stdout.readline()
        code, out, err = await run_chaos(
            "--quick", "--recipients", "1600", "--rate", "400", "--fault", "postgres-link-reset", "--fault", "valkey-killed", "--json",
            "--database-url", database_url, "--redis-url", redis_url, "--smtp", f"127.0.0.1:{port}", "--accepted", str(accepted),
        )  # fmt: skip
    finally:
        sink.terminate()
        await sink.wait()
    assert code == 0, err
    assert [result["fault"] for result in json.loads(out)] == ["postgres-link-reset"]
    assert "valkey-killed: the Redis server is not ours" in err
