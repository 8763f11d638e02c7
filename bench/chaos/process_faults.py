"""Faults of processes: engines, supervisor, control and inbound killed, stopped and told to end (rows 1-6, 36, 37)."""

import asyncio
import os
import resource
import signal
import time
from pathlib import Path

from bench.chaos.fault import Fault, Scene
from bench.chaos.fleet import LEASE_SECONDS
from bench.chaos.load import free_octets
from bench.chaos.world import MemoryGroup

DRAIN_SECONDS = 10.0  # a drain with peers that answer
_OUT_OF_MEMORY_SECONDS = 20.0
DRAIN_LIMIT_SECONDS = 10.0  # drain_timeout of the fleet and two seconds


async def kill_engines(scene: Scene) -> None:
    """kill -9 of one engine, up to three times, each time a random one."""
    for _ in range(1 if scene.quick else 3):
        engine = scene.rng.choice(scene.fleet.engines)
        for _ in range(200):
            if engine.pid:
                break
            await asyncio.sleep(0.02)
        scene.window += scene.fleet.window_of_one()
        engine.send(signal.SIGKILL)
        scene.strike()
        if not scene.quick:
            await asyncio.sleep(scene.rng.uniform(0.6, 1.6))


async def kill_all_engines(scene: Scene) -> None:
    """kill -9 of all engines at the same instant."""
    scene.window += len(scene.fleet.engine_pids()) * scene.fleet.window_of_one()
    for engine in scene.fleet.engines:
        engine.send(signal.SIGKILL)


async def stop_engine(scene: Scene) -> None:
    """SIGSTOP of one engine."""
    engine = scene.rng.choice(scene.fleet.engines)
    scene.window += scene.fleet.window_of_one()
    engine.send(signal.SIGSTOP, ends=False)
    scene.memory["engine"] = engine


async def continue_engine(scene: Scene) -> None:
    """SIGCONT."""
    scene.memory["engine"].send(signal.SIGCONT, ends=False)


async def terminate_engine(scene: Scene) -> None:
    """SIGTERM of one engine; it must be gone soon."""
    await _terminate(scene, DRAIN_SECONDS)


async def _terminate(scene: Scene, limit: float) -> None:
    engine = scene.rng.choice(scene.fleet.engines)
    engine.send(signal.SIGTERM)
    scene.strike()
    took = await engine.gone(limit + 30.0)
    scene.notes.append(f"exit after {took:.2f} s")
    if took > limit:
        scene.broken.append(f"P8: {engine.name} took {took:.1f} s to end after SIGTERM, more than {limit:g} s")


async def terminate_with_hanging_peers(scene: Scene) -> None:
    """SIGTERM while some peers never answer the final dot."""
    await scene.fleet.script([{"stage": "dot", "action": "hang", "percent": 0.5}])
    await asyncio.sleep(1.0)
    await _terminate(scene, DRAIN_LIMIT_SECONDS)


async def terminate_then_kill(scene: Scene) -> None:
    """SIGTERM while peers are slow, SIGKILL a second later."""
    await scene.fleet.script([{"stage": "dot", "action": "slow", "milliseconds": 2500, "percent": 20}])
    await asyncio.sleep(0.5)
    engine = scene.rng.choice(scene.fleet.engines)
    scene.window += scene.fleet.window_of_one()
    engine.send(signal.SIGTERM)
    await asyncio.sleep(1.0)
    engine.send(signal.SIGKILL)
    scene.strike()


async def fair_weather(scene: Scene) -> None:
    """No scripted answers any more."""
    await scene.fleet.script([])


async def kill_supervisor(scene: Scene) -> None:
    """kill -9 of `sluice up`; a service manager starts another one."""
    fleet = scene.fleet
    assert fleet.supervisor is not None
    children = fleet.engine_pids()
    fleet.supervisor.send(signal.SIGKILL)
    scene.strike()
    deadline = time.monotonic() + 45.0
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        if time.monotonic() > deadline:
            scene.broken.append("engines of a dead supervisor still run after 45 s")
            return
        await asyncio.sleep(0.05)
    while not fleet.engine_pids() and time.monotonic() < deadline:
        await asyncio.sleep(0.05)


async def kill_engine_under_supervisor(scene: Scene) -> None:
    """kill -9 of an engine that `sluice up` keeps."""
    pids = scene.fleet.engine_pids()
    scene.window += scene.fleet.window_of_one()
    os.kill(scene.rng.choice(pids), signal.SIGKILL)


async def kill_control(scene: Scene) -> None:
    """Start the campaigns over the API and kill -9 the API as soon as it has said yes (P2). Needs campaigns that are drafts."""
    fleet = scene.fleet
    for campaign in scene.load.campaigns:
        status, body = await fleet.api("POST", f"/campaigns/{campaign}/start")
        if status != 200:
            scene.broken.append(f"the API answered {status} to the start of a campaign: {body[:200]!r}")
    for pid in fleet.supervised("control"):
        os.kill(pid, signal.SIGKILL)


async def kill_inbound(scene: Scene) -> None:
    """kill -9 of inbound while mail comes in; whatever it answered 250 to must be in the database (P11)."""
    fleet = scene.fleet
    kept_before = await fleet.pool.fetchval("select count(*) from inbound_messages")
    sending = asyncio.create_task(_send_mail(fleet.inbound_port, seconds=4.0 if scene.quick else 8.0))
    for _ in range(1 if scene.quick else 2):
        await asyncio.sleep(scene.rng.uniform(0.5, 1.5))
        for pid in fleet.supervised("inbound"):
            os.kill(pid, signal.SIGKILL)
        scene.strike()
    promised = await sending
    kept = await fleet.pool.fetchval("select count(*) from inbound_messages") - kept_before
    scene.notes.append(f"inbound: {promised} answered 250, {kept} in the database")
    if kept < promised:
        scene.broken.append(f"P11: {promised} messages were answered 250, but only {kept} are in the database")
    if not promised:
        scene.broken.append("inbound took no mail at all")


async def _send_mail(port: int, seconds: float) -> int:
    """Send small messages one after the other over connections that may break; returns how many were answered 250."""
    promised, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.05)
            continue
        try:
            async with asyncio.timeout(10.0):
                if not await _reply(reader, writer, b"") or not await _reply(reader, writer, b"EHLO chaos.example\r\n"):
                    continue
                while time.monotonic() < end:
                    steps = (b"MAIL FROM:<>\r\n", b"RCPT TO:<postmaster@bounces.sender.example>\r\n", b"DATA\r\n")
                    if not all([await _reply(reader, writer, step) for step in steps]):
                        break
                    if await _reply(reader, writer, b"Subject: chaos\r\n\r\nHello\r\n.\r\n"):
                        promised += 1
                    await asyncio.sleep(0.005)
        except (OSError, TimeoutError):
            pass
        finally:
            writer.close()
    return promised


async def _reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, command: bytes) -> bool:
    if command:
        writer.write(command)
    while line := await reader.readline():
        if line[3:4] != b"-":
            return line[:1] in b"23"
    raise ConnectionResetError("inbound closed the connection")


async def reload_often(scene: Scene) -> None:
    """A hundred changes of delivery servers over the API, every fifth of them wrong (P12)."""
    fleet = scene.fleet
    for number in range(40 if scene.quick else 100):
        server = fleet.server_ids[number % len(fleet.server_ids)]
        wrong = number % 5 == 4
        connections = -1 if wrong else scene.rng.randint(4, 8)
        status, body = await fleet.api("PATCH", f"/delivery-servers/{server}", {"limits": {"max_connections": connections}})
        if (status == 422) != wrong:
            scene.broken.append(f"P12: a {'wrong' if wrong else 'good'} change was answered {status}: {body[:200]!r}")
            return
        await asyncio.sleep(0.02)


async def flood_api(scene: Scene) -> None:
    """Many requests at once and bodies that are too large: refused where it must, never a server error."""
    fleet, counts, end = scene.fleet, dict[int, int](), time.monotonic() + 4.0

    async def ask(number: int) -> None:
        while time.monotonic() < end:
            if number == 0:
                status, _ = await fleet.api("POST", "/campaigns", {"name": "x" * 6_000_000})
            else:
                status, _ = await fleet.api("GET", f"/campaigns/{scene.load.campaigns[0]}/progress")
            counts[status] = counts.get(status, 0) + 1

    await asyncio.gather(*(ask(number) for number in range(9)))
    scene.notes.append("answers " + ", ".join(f"{status}: {count}" for status, count in sorted(counts.items())))
    bad = {status: count for status, count in counts.items() if status >= 500 and status != 503}
    if bad or not counts.get(200):
        scene.broken.append(f"the API under load answered {bad or 'nobody'}")


async def take_descriptors(scene: Scene) -> None:
    """No file descriptor is free for one engine, and its connections are lost: it cannot open all of them again."""
    engine = scene.rng.choice(scene.fleet.engines)
    used = len(list(Path(f"/proc/{engine.pid}/fd").iterdir()))
    scene.memory["engine"] = engine
    scene.memory["pid"] = engine.pid
    scene.memory["limit"] = resource.prlimit(engine.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(engine.pid, resource.RLIMIT_NOFILE, (max(16, used - 6), resource.prlimit(engine.pid, resource.RLIMIT_NOFILE)[1]))
    for link in scene.fleet.smtp_links:
        link.reset()


async def give_descriptors(scene: Scene) -> None:
    """The old limit again."""
    engine, pid, limit = (scene.memory[name] for name in ("engine", "pid", "limit"))
    if engine.pid == pid:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)


async def take_memory(scene: Scene) -> None:
    """No page more for one engine: the kernel ends it as soon as it needs one, so it counts as killed."""
    engine, group = scene.rng.choice(scene.fleet.engines), MemoryGroup()
    scene.window += scene.fleet.window_of_one()
    scene.memory["group"] = group
    group.start()
    engine.expected = True
    group.take(engine.pid)
    took = await engine.gone(_OUT_OF_MEMORY_SECONDS)
    scene.strike()
    if took == float("inf"):
        scene.did_not_happen(f"{engine.name} lived for {_OUT_OF_MEMORY_SECONDS:g} s without a page more")
    else:
        scene.notes.append(f"the kernel ended {engine.name} after {took:.2f} s without memory")


async def give_memory(scene: Scene) -> None:
    """No limit any more."""
    if "group" in scene.memory:
        scene.memory["group"].stop()


async def lose_sockets(scene: Scene) -> None:
    """Every SMTP connection is reset at the same instant, three times."""
    for _ in range(3):
        lost = sum(link.reset() for link in scene.fleet.smtp_links)
        scene.notes.append(f"{lost} connections reset")
        scene.strike()
        await asyncio.sleep(scene.rng.uniform(0.5, 1.0))


async def fill_journal_disk(scene: Scene) -> None:
    """The file system of the journals is full to the last octet."""
    journal = scene.fleet.plan.journal
    assert journal is not None
    filler = journal / ".filler"
    scene.memory["filler"] = filler
    with filler.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(b"\0" * max(4096, min(1 << 20, free_octets(journal))))
            except OSError:
                break
    before = scene.copies.total
    await asyncio.sleep(1.5)
    scene.copies.read()
    early = scene.copies.total
    await asyncio.sleep(1.0)
    scene.copies.read()
    scene.notes.append(f"disk full: {early - before} messages accepted in 1.5 s, {scene.copies.total - early} in the second after that")
    if scene.copies.total > early:
        scene.broken.append("P6: messages were still sent 1.5 s after the journal's disk was full")


async def free_journal_disk(scene: Scene) -> None:
    """Space again."""
    scene.memory["filler"].unlink()


async def fail_fsync(scene: Scene) -> None:
    """fsync of one engine returns EIO for a few seconds (strace)."""
    engine = scene.rng.choice(scene.fleet.engines)
    tracer = await asyncio.create_subprocess_exec(
        "strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:error=EIO",
        "-p", str(engine.pid), stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    scene.memory["tracer"] = tracer
    scene.memory["log"] = engine.log
    scene.memory["said"] = _failed_syncs(engine.log)


def _failed_syncs(log: Path) -> int:
    return log.read_bytes().count(b"fsync failed")


async def stop_failing_fsync(scene: Scene) -> None:
    """The tracer lets go."""
    tracer = scene.memory["tracer"]
    if tracer.returncode is None:
        tracer.terminate()
        await tracer.wait()
    else:
        scene.did_not_happen(f"strace ended with code {tracer.returncode}")
    failed = _failed_syncs(scene.memory["log"]) - scene.memory["said"]
    scene.notes.append(f"{failed} times fsync failed in the engine's journal, which went on in a new file each time")
    if not failed:
        scene.did_not_happen("the engine said nothing of a failed fsync")


_SUPERVISED = frozenset({"supervised"})
_PROXIED = frozenset({"proxied"})

FAULTS = (
    Fault(name="engine-killed", row=1, about="kill -9 of an engine, again and again", inject=kill_engines, duplicates="window",
          process=True,
          mixed=True),
    Fault(name="all-engines-killed", row=2, about="kill -9 of all engines at once", inject=kill_all_engines, duplicates="window",
          process=True,
          mixed=True),
    Fault(name="engine-stopped", row=3, about="SIGSTOP for three leases, then SIGCONT", inject=stop_engine, heal=continue_engine,
          hold=(3 * LEASE_SECONDS, 3 * LEASE_SECONDS + 1), duplicates="window", process=True, mixed=True),
    Fault(name="engine-terminated", row=4, about="SIGTERM under load", inject=terminate_engine, process=True, mixed=True),
    Fault(name="engine-terminated-hanging", row=4, about="SIGTERM while peers never answer the dot", inject=terminate_with_hanging_peers,
          heal=fair_weather, duplicates="named", heal_limit=75.0, needs=frozenset({"own-sink"})),
    Fault(name="engine-terminated-killed", row=5, about="SIGTERM, and SIGKILL a second later", inject=terminate_then_kill,
          heal=fair_weather,
          duplicates="window", needs=frozenset({"own-sink"}), process=True),
    Fault(name="supervisor-killed", row=6, about="kill -9 of `sluice up`, then another one", inject=kill_supervisor, duplicates="none",
          needs=_SUPERVISED, process=True),
    Fault(name="supervised-engine-killed", row=6, about="kill -9 of an engine under `sluice up`", inject=kill_engine_under_supervisor,
          duplicates="window", needs=_SUPERVISED, process=True),
    Fault(name="control-killed", row=38, about="kill -9 of the API after it said yes to a start", inject=kill_control,
          needs=_SUPERVISED | {"drafts"}, process=True),
    Fault(name="inbound-killed", row=38, about="kill -9 of inbound while mail comes in", inject=kill_inbound, needs=_SUPERVISED,
          process=True),
    Fault(name="journal-disk-full", row=16, about="journal on a full tmpfs", inject=fill_journal_disk, heal=free_journal_disk, hold=(1.0,
          2.0),
          needs=frozenset({"small-journal"})),
    Fault(name="fsync-fails", row=17, about="fsync of an engine returns EIO", inject=fail_fsync, heal=stop_failing_fsync, hold=(2.0, 3.0),
          needs=frozenset({"strace"})),
    Fault(name="no-descriptors", row=36, about="EMFILE in one engine", inject=take_descriptors, heal=give_descriptors, hold=(3.0, 5.0),
          duplicates="named", needs=_PROXIED, process=True),
    Fault(name="no-memory", row=36, about="the kernel ends an engine that is out of memory", inject=take_memory, heal=give_memory,
          duplicates="window", needs=frozenset({"memory-group"}), process=True, mixed=True),
    Fault(name="sockets-lost", row=36, about="all SMTP connections reset at once, three times", inject=lose_sockets, duplicates="named",
          needs=_PROXIED, mixed=True),
    Fault(name="reload", row=37, about="100 changes over the API, every fifth wrong", inject=reload_often, needs=_SUPERVISED,
          process=True),
    Fault(name="api-flood", row=38, about="many requests, bodies too large", inject=flood_api, needs=_SUPERVISED,
          process=True),
)  # fmt: skip
