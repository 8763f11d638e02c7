"""What `sluice status` and the metrics say while something is dead, silent or stuck."""

import asyncio
import signal
import time
from pathlib import Path

import aiohttp
import pytest
from redis.asyncio import Redis

from control.supervise import free_ports
from store import status
from store.postgres import Pool
from tests.faults import load
from tests.machine import Machine, until


async def test_a_dead_and_a_silent_engine_are_told_from_one_that_lives(machine: Machine, pool: Pool, redis: Redis) -> None:
    living = await machine.engine(0)
    dead = await machine.engine(1)
    silent = await machine.engine(2)

    async def states() -> dict[str, str]:
        return {engine.id: engine.state for engine in (await status.gather(pool, redis)).engines}

    async def all_run() -> bool:
        return list((await states()).values()) == ["running"] * 3

    await until(all_run, "three engines run", 10.0, machine)
    dead.kill(signal.SIGKILL)
    killed = time.monotonic()

    async def dead_is_gone() -> bool:
        found = await states()
        return dead.ready["id"] not in found and found.get(living.ready["id"]) == "running"

    await until(dead_is_gone, "the dead one is gone, the others are not", 5.0, machine)
    assert time.monotonic() - killed < 10.0, "its last word lives for five seconds"

    async def silent_or_forgotten() -> status.Status | None:
        found = await status.gather(pool, redis)
        return None if any((engine.id, engine.state) == (silent.ready["id"], "running") for engine in found.engines) else found

    async def runs_again() -> bool:
        return (await states()).get(silent.ready["id"]) == "running"

    for _ in range(5):  # it is called silent for two seconds, until its last word is forgotten: a busy machine may look too late
        silent.kill(signal.SIGSTOP)
        found: status.Status = await until(silent_or_forgotten, "the stopped one is not called running", 5.0, machine)
        if found.engines[-1].id == silent.ready["id"]:
            break
        silent.kill(signal.SIGCONT)
        await until(runs_again, "it runs again", 5.0, machine)
    assert {engine.id: engine.state for engine in found.engines} == {living.ready["id"]: "running", silent.ready["id"]: "silent"}
    assert any("it has said nothing for" in sentence for sentence in found.trouble)


@pytest.mark.slow
async def test_an_idle_engine_costs_next_to_nothing_and_writes_nothing(machine: Machine, pool: Pool) -> None:
    campaign = await load.start(machine, pool, recipients=500)
    engine = await machine.engine(0)
    await campaign.reconcile()
    await pool.execute("update campaigns set finished_at = null, state = 'paused'")  # it stays among the active ones

    def cpu() -> float:
        fields = Path(f"/proc/{engine.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100

    async def connections_closed() -> bool:
        return bool((await machine.sink_json("/api/v1/counters"))["connections"]["now"] == 0)

    await until(connections_closed, "idle connections closed", 30.0, machine)
    before, lines, began = cpu(), engine.log.read_text(), time.monotonic()
    await asyncio.sleep(5.0)
    share = (cpu() - before) / (time.monotonic() - began)
    assert engine.log.read_text() == lines
    assert share < 0.05, f"{share:.1%} of a core"  # about 1 % on an idle machine


async def test_the_metrics_say_what_is_stuck_and_how_far_the_ledger_is(machine: Machine) -> None:
    (port,) = free_ports(1)
    await machine.engine(0, SLUICE_ENGINE__METRICS_PORT=str(port))
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/metrics") as answer:
        text = await answer.text()
    for kind in ("path", "session", "batch", "ledger", "feeder", "event loop", "task"):
        assert f'sluice_stuck{{kind="{kind}"}} ' in text
    for name in ("sluice_trouble", "sluice_ledger_lag_bytes", "sluice_journal_bytes", "sluice_event_loop_stall_seconds"):
        assert f"\n{name} " in text
