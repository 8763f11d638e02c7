"""Runs faults: builds the fleet each one needs, puts the load on it, harms, heals, waits, and reconciles.

A fleet that came through is used again by the next fault with the same needs; one that did not is replaced, so that nothing is
blamed on the wrong fault.
"""

import asyncio
import contextlib
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import asyncpg
import msgspec

from bench.chaos import world
from bench.chaos.fault import Fault, Scene, nothing
from bench.chaos.fleet import Fleet, Plan
from bench.chaos.load import Copies, Load
from bench.chaos.reconcile import Verdict, reconcile
from bench.chaos.stores import Stores
from domain import states
from domain.errors import SluiceError
from store import accounting

STORE_AWAY: Final = (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError, SluiceError)
FLEET_NEEDS: Final = frozenset(
    {"proxied", "supervised", "small-journal", "small-postgres", "starttls", "faketime", "named", "verified", "lossy"}
)
FULL_LOAD: Final = 1000.0  # messages a second that must be under way before a fault counts, where so many were asked for
_PACE_SECONDS: Final = 6  # in which they must have been reached
_JOURNAL_DISK: Final = "24m"
_POSTGRES_DISK: Final = "512m"
_WAIT_SECONDS: Final = 150.0  # for a healed fleet to finish what is left
_LATE_WORD_SECONDS: Final = 10.0
_FULL_RATE: Final = 0.8  # of the rate before the fault: back to normal


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the command was asked for."""

    directory: Path
    recipients: int = 20_000
    rate: float = 1200.0
    on_uncertain: str = "retry"
    database_url: str = ""
    redis_url: str = ""
    smtp: tuple[str, int] | None = None
    accepted: Path | None = None
    quick: bool = False
    first_load: int = 1


class Result(msgspec.Struct, kw_only=True):
    """What `--json` prints for each fault, over all its runs; the fields are part of the command's contract."""

    fault: str
    runs: int = 0
    recipients: int = 0
    lost: int = 0
    false_delivered: int = 0
    false_bounced: int = 0
    duplicates_announced: int = 0
    duplicates_unexplained: int = 0
    heal_seconds: float = 0.0  # the longest


class Run(msgspec.Struct, kw_only=True):
    """One run of one fault."""

    fault: str
    seed: int
    verdict: Verdict
    heal_seconds: float
    broken: list[str]
    notes: list[str]
    rate: float
    seconds: float


Say = Callable[[str], None]


class Runner:
    """Owns the stores and the fleet of the moment. A context manager."""

    def __init__(self, options: Options, say: Say) -> None:
        self.options = options
        self._say = say
        self._stores: dict[bool, Stores] = {}
        self.fleet: Fleet | None = None
        self.copies = Copies([])
        self._needs: frozenset[str] | None = None
        self._fleets = 0
        self._loads = options.first_load - 1
        self._mounts: list[Path] = []
        self.deadline = float("inf")  # on the monotonic clock: when nothing is waited for any more

    async def __aenter__(self) -> "Runner":
        self.options.directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end_fleet()
        for stores in self._stores.values():
            await stores.stop()
        await asyncio.to_thread(_unmount, self._mounts)

    # --- ground -----------------------------------------------------------------------------------------------------------
    def why_not(self, fault: Fault) -> str:
        """Why this fault cannot be played here; empty when it can."""
        options = self.options
        if fault.needs & {"own-valkey"} and options.redis_url:
            return "the Redis server is not ours (--redis-url)"
        if fault.needs & {"own-postgres"} and options.database_url:
            return "the PostgreSQL server is not ours (--database-url)"
        if fault.needs & {"own-sink", "starttls", "lossy", "named"} and options.smtp:
            return "the SMTP server is not ours (--smtp): script the fault there"
        return next(filter(None, map(world.why_not, sorted(fault.needs))), "")

    def fits(self, needs: frozenset[str]) -> bool:
        """Whether the running fleet is one for these needs."""
        return self.fleet is not None and self._needs == needs & FLEET_NEEDS

    async def fleet_for(self, needs: frozenset[str]) -> Fleet:
        """A fleet that fits, the running one if it does."""
        wanted = needs & FLEET_NEEDS
        if self.fleet is not None and self.fits(needs):
            return self.fleet
        await self.end_fleet()
        stores = await self._stores_for(small="small-postgres" in wanted)
        with contextlib.suppress(Exception):
            async with stores.redis() as client:
                if not self.options.redis_url:
                    await client.flushall()
        self._fleets += 1
        directory = self.options.directory / f"fleet-{self._fleets}"
        directory.mkdir(mode=0o711)
        plan = Plan(
            rate=self.options.rate,
            on_uncertain=self.options.on_uncertain,
            proxied="proxied" in wanted,
            supervised="supervised" in wanted,
            journal=self._mount(directory / "journal-disk", _JOURNAL_DISK) if "small-journal" in wanted else None,
            smtp=self.options.smtp,
            accepted=self.options.accepted,
            security="starttls" if "starttls" in wanted else "none",
            clocks="faketime" in wanted,
            named="named" in wanted,
            verified="verified" in wanted,
            lossy="lossy" in wanted,
        )
        self.fleet, self._needs = Fleet(directory, stores, plan), wanted
        await self.fleet.start()
        self.copies = Copies(self.fleet.accepted)
        self.copies.start()
        return self.fleet

    async def end_fleet(self) -> None:
        """End the running fleet, if there is one."""
        fleet, self.fleet, self._needs = self.fleet, None, None
        if fleet is not None:
            for stores in self._stores.values():
                await stores.postgres_link.heal()
                await stores.redis_link.heal()
            await self.copies.stop()
            await fleet.stop()
            if self.options.database_url:
                await self._cancel_leftovers(fleet)

    async def _cancel_leftovers(self, fleet: Fleet) -> None:
        with contextlib.suppress(*STORE_AWAY):
            fleet.pool = await asyncpg.create_pool(self.options.database_url, min_size=1, max_size=1)
            await fleet.pool.execute("update delivery_servers set enabled = false, deleted_at = now() where id = any($1)", fleet.server_ids)
            await fleet.pool.execute(
                "update campaigns set state = 'cancelling' where delivery_server_id = any($1) and finished_at is null", fleet.server_ids
            )
            await fleet.pool.execute("update egress_version set version = version + 1")
            await fleet.pool.close()

    async def _stores_for(self, *, small: bool) -> Stores:
        if small not in self._stores:
            directory = self.options.directory / ("stores-small" if small else "stores")
            disk = self._mount(directory.with_name("postgres-disk"), _POSTGRES_DISK) if small else None
            stores = Stores(directory, self.options.database_url, self.options.redis_url, small_disk=disk)
            await stores.start()
            self._stores[small] = stores
        return self._stores[small]

    def _mount(self, directory: Path, size: str) -> Path:
        directory.mkdir(parents=True, mode=0o755)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0755", "sluice-chaos", str(directory)], check=True)
        self._mounts.append(directory)
        return directory

    # --- one run ------------------------------------------------------------------------------------------------------------
    def new_load(self, recipients: int) -> Load:
        """A load whose addresses nobody has used."""
        self._loads += 1
        return Load(self._loads, recipients)

    async def run(self, fault: Fault, seed: int, recipients: int = 0) -> Run:
        """One fault, once; `recipients` 0: as many as the options say."""
        began = time.monotonic()
        try:
            fleet = await self.fleet_for(fault.needs)
        except (SluiceError, OSError, subprocess.SubprocessError) as error:
            await self.end_fleet()
            if self._fleets <= 1:
                raise  # nothing can be run here
            sentence = f"the fleet could not be started: {error}"
            return Run(fault=fault.name, seed=seed, verdict=Verdict(examples=[]), heal_seconds=0.0, broken=[sentence], notes=[], rate=0.0,
                       seconds=time.monotonic() - began)  # fmt: skip
        load = self.new_load(max(recipients or self.options.recipients, fault.recipients))
        scene = Scene(fleet, load, self.copies, random.Random(f"{seed} {fault.name}"), quick=self.options.quick)
        drafts = "drafts" in fault.needs
        await load.seed(fleet, state=states.DRAFT if drafts else states.PREPARING)
        rate, begun = 0.0, False
        try:
            if not drafts:
                rate = await self._under_way(scene)
            begun = True
            if len(self.copies.of(load.number)) >= load.recipients:
                scene.did_not_happen("all mail had been sent before it")
            await fault.inject(scene)
            if not scene.struck_at:
                scene.strike()
            if fault.hold[1]:
                await asyncio.sleep(scene.rng.uniform(*fault.hold))
        except Exception as error:
            scene.broken.append(f"the fault could not be played: {type(error).__name__}: {error}")
        finally:
            if begun:
                await fault.heal(scene)
                if fault.hold[1] or fault.heal is not nothing:
                    scene.strike()  # a server that has to recover first is part of the harm
        if not begun:
            scene.broken.append("the load was not under way within a minute")
        healed = scene.struck_at or time.monotonic()
        finished, late = await self.wait_for([load])
        if not finished:
            scene.broken.append(f"not finished {time.monotonic() - healed:.0f} s after the fault was healed: {late}")
        heal_seconds = self._heal_seconds(healed, rate)
        verdict = await self.reconcile(load, fleet, scene, fault)
        found = verdict_sentences(verdict, fault.duplicates, scene.window, self.options.on_uncertain)
        if found:
            scene.notes += await self._stories(load, fleet)
        scene.broken += found
        if begun:
            await self._prove(fault, scene)
        if rate < FULL_LOAD <= self.options.rate and begun and not drafts and not self.options.quick:
            scene.broken.append(f"the load ran at {rate:,.0f} messages/s before the fault, {FULL_LOAD:,.0f} are asked for: not proven")
        if heal_seconds > fault.heal_limit:
            scene.broken.append(f"healed after {heal_seconds:.1f} s, more than {fault.heal_limit:g} s")
        scene.notes += fleet.surprises()
        if scene.broken:
            await self.end_fleet()
        return Run(
            fault=fault.name, seed=seed, verdict=verdict, heal_seconds=heal_seconds, broken=scene.broken, notes=scene.notes, rate=rate,
            seconds=time.monotonic() - began,
        )  # fmt: skip

    async def _prove(self, fault: Fault, scene: Scene) -> None:
        try:
            await fault.proof(scene)
        except Exception as error:
            scene.broken.append(f"what the fault did cannot be told: {type(error).__name__}: {error}")

    async def _under_way(self, scene: Scene) -> float:
        """Wait until the load is sent at its pace; returns messages a second of the last second before the fault. Raises TimeoutError."""
        copies, load = self.copies, scene.load
        share = scene.rng.uniform(0.1, 0.25)
        async with asyncio.timeout(60.0):
            while len(copies.of(load.number)) < share * load.recipients:
                await asyncio.sleep(0.02)
        if self.options.quick:
            await asyncio.sleep(0.7)
            return copies.rate(time.monotonic() - 0.7, time.monotonic())
        rate = 0.0
        for _ in range(_PACE_SECONDS):  # where the machine was busy elsewhere the fault waits until the load is what it should be
            await asyncio.sleep(1.0)
            copies.read()
            rate = copies.rate(time.monotonic() - 1.0, time.monotonic())
            enough = rate >= min(FULL_LOAD, 0.8 * self.options.rate) or not self.options.rate
            if enough or 2 * len(copies.of(load.number)) > load.recipients:
                break
        return rate

    async def wait_for(self, loads: Sequence[Load], seconds: float = _WAIT_SECONDS) -> tuple[bool, str]:
        """Wait until all campaigns have ended; else say what they are at."""
        assert self.fleet is not None
        deadline = min(time.monotonic() + seconds, self.deadline)
        said = ""
        while time.monotonic() < deadline:
            with contextlib.suppress(*STORE_AWAY):
                if all([await load.completed(self.fleet.pool) for load in loads]):
                    await asyncio.sleep(0.1)
                    self.copies.read()
                    return True, ""
                said = await self._where_it_stands(loads)
            await asyncio.sleep(0.1)
        self.copies.read()
        return False, said

    async def _where_it_stands(self, loads: Sequence[Load]) -> str:
        assert self.fleet is not None
        rows = await self.fleet.pool.fetch(
            "select c.id, c.state, count(b.batch) filter (where b.state <> 'settled') as open, "
            "(select count(*) from retries r where r.campaign_id = c.id) as retries "
            "from campaigns c left join batches b on b.campaign_id = c.id where c.id = any($1) and c.state <> 'completed' group by c.id",
            [campaign for load in loads for campaign in load.campaigns],
        )
        return "; ".join(f"campaign {row['id']} {row['state']}, {row['open']} open batches, {row['retries']} retries" for row in rows)

    def _heal_seconds(self, healed: float, rate: float) -> float:
        """From `healed` to the pace from before; where the load ended first, to its next delivery."""
        now = time.monotonic()
        moments = []
        back = self.copies.back_at(healed, now, _FULL_RATE * rate) if rate else None
        if back is not None:
            moments.append(back)
        else:
            following = self.copies.next_after(healed)
            if following is not None:
                moments.append(following)
        return round(max(0.0, min(moments) - healed), 2) if moments else 0.0

    async def reconcile(self, load: Load, fleet: Fleet, scene: Scene, fault: Fault | None = None) -> Verdict:
        """The verdict on one load; what its audit and the sinks object to goes to `scene.broken`."""
        may_refuse = (fault.may_refuse if fault is not None else None) or (lambda _: False)
        deadline = time.monotonic() + _LATE_WORD_SECONDS
        while True:
            await asyncio.sleep(0.2)
            self.copies.read()
            records = await load.records(fleet.pool)
            copies = dict(self.copies.of(load.number))
            addresses = load.addresses(len(fleet.server_ids))
            verdict = await asyncio.to_thread(reconcile, addresses, copies, records, may_refuse=may_refuse)
            # A campaign ends with its last recipient; what a resumed engine still has to say may reach the ledger after that
            if not verdict.duplicates_unexplained or time.monotonic() > deadline:
                break
        doubts = Counter(diagnostic for kind, _, diagnostic in records if kind == states.KIND_UNCERTAIN)
        scene.notes += [f"{count} in doubt: {diagnostic[:160]}" for diagnostic, count in doubts.most_common(3)]
        for campaign in load.campaigns:
            audit = await accounting.audit(fleet.pool, campaign)
            if not audit.clean or audit.queued:
                scene.broken.append(f"P1: the audit of campaign {campaign} is not clean: {audit}")
        for number in range(len(fleet.sinks)):
            counters = await fleet.sink_counters(number)
            wrong = {name: count for name, count in counters["violations"].items() if count and name != "protocol_errors"}
            if wrong:
                scene.broken.append(f"messages were malformed: {wrong}")
        return verdict

    async def _stories(self, load: Load, fleet: Fleet) -> list[str]:
        """What the ledger says about a few recipients of whom more than one copy was accepted."""
        doubled = [address for address, ids in self.copies.of(load.number).items() if len(ids) > 1][:3]
        rows = await fleet.pool.fetch(
            "select a.recipient, a.kind::text, a.attempt, a.at, a.batch, a.connection, a.diagnostic, b.epoch "
            "from accounting a left join batches b on b.campaign_id = a.campaign_id and b.batch = a.batch "
            "where a.campaign_id = any($1) and a.recipient = any($2) order by a.recipient, a.at",
            load.campaigns, doubled, timeout=60,
        )  # fmt: skip
        return [
            f"{row['recipient']}: {row['kind']} attempt {row['attempt']} at {row['at']:%H:%M:%S.%f} batch {row['batch']} (epoch now "
            f"{row['epoch']}) connection {row['connection']}: {row['diagnostic'][:80]}"
            for row in rows
        ]


def verdict_sentences(verdict: Verdict, duplicates: str, window: int, on_uncertain: str) -> list[str]:
    """The promises a verdict breaks, one sentence each."""
    broken = []
    if verdict.lost:
        broken.append(f"P1, P2: {verdict.lost} recipients came to no end, or to more than one")
    if verdict.false_delivered:
        broken.append(f"P5: {verdict.false_delivered} recipients recorded as delivered that no sink accepted")
    if verdict.false_bounced:
        broken.append(f"P5: {verdict.false_bounced} recipients recorded as refused that no sink refused")
    if verdict.duplicates_unexplained:
        broken.append(f"P4: {verdict.duplicates_unexplained} second copies that no `u` record announced")
    most = {"none": 0, "window": window}.get(duplicates)
    if on_uncertain != "retry":
        most = 0
    if most is not None and verdict.duplicates_announced > most:
        broken.append(f"P3: {verdict.duplicates_announced} second copies, at most {most} may be")
    return [*broken, *verdict.examples]


def summed(runs: Sequence[Run]) -> list[Result]:
    """One result per fault, in the order of their first runs."""
    results: dict[str, Result] = {}
    for run in runs:
        result = results.setdefault(run.fault, Result(fault=run.fault))
        verdict = run.verdict
        result.runs += 1
        result.recipients += verdict.recipients
        result.lost += verdict.lost
        result.false_delivered += verdict.false_delivered
        result.false_bounced += verdict.false_bounced
        result.duplicates_announced += verdict.duplicates_announced
        result.duplicates_unexplained += verdict.duplicates_unexplained
        result.heal_seconds = max(result.heal_seconds, run.heal_seconds)
    return list(results.values())


def _unmount(mounts: Sequence[Path]) -> None:
    for mount in mounts:
        subprocess.run(["umount", "--lazy", str(mount)], check=False, capture_output=True)
