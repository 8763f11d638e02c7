"""A campaign under way, for tests that break something in the middle of it, and the verdict at its end."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import msgspec

from store import accounting, redis_keys
from store.postgres import Pool
from tests.machine import Machine, campaign_state, until
from tests.store import seed

CONNECTIONS = 8
SHORT_LEASES = {"SLUICE_ENGINE__LEASE_SECONDS": "4", "SLUICE_ENGINE__LEASE_MARGIN_SECONDS": "1", "SLUICE_ENGINE__BATCH_RECIPIENTS": "200"}
SMALL_BATCHES = {"SLUICE_ENGINE__BATCH_RECIPIENTS": "200"}


@dataclass
class Load:
    """One campaign to the sink of `machine`."""

    machine: Machine
    pool: Pool
    campaign: int
    recipients: int

    async def accepted(self) -> int:
        """Messages the sink has taken."""
        return int((await self.machine.sink_json("/api/v1/counters"))["messages"])

    async def begun(self, messages: int) -> None:
        """Wait until the sink has taken `messages`."""

        async def enough() -> bool:
            return await self.accepted() >= messages

        await until(enough, f"{messages} messages sent", 60.0, self.machine)

    async def goes_on(self, messages: int = 1) -> None:
        """Wait until more messages arrive."""
        await self.begun(await self.accepted() + messages)

    async def hurry(self) -> None:
        """Send what is left as fast as it goes: what the pace was for is over."""
        await self.pool.execute("update delivery_servers set limits = limits - 'max_messages_per_second', version = version + 1")
        await self.pool.execute("update egress_version set version = version + 1")

    def copies(self) -> Counter[tuple[str, str]]:
        """What the sink has taken: (Message-ID, recipient) -> copies."""
        lines = (json.loads(line) for line in (self.machine.directory / "accepted.jsonl").read_text().splitlines())
        return Counter((line["message_id"], line["recipient"]) for line in lines)

    def doubled(self) -> set[str]:
        """Recipients of more than one copy."""
        return {recipient for (_, recipient), count in self.copies().items() if count > 1}

    async def announced(self) -> set[str]:
        """Recipients whose possible second copy stands in the ledger."""
        rows = await self.pool.fetch("select distinct recipient from accounting where campaign_id = $1 and kind = 'u'", self.campaign)
        return {row["recipient"] for row in rows}

    async def heartbeats(self, client: Any) -> list[dict[str, Any]]:
        """What the engines say of themselves."""
        keys = [key async for key in client.scan_iter(match=redis_keys.ENGINE_STATUS_PATTERN)]
        return [msgspec.json.decode(value) for key in keys if (value := await client.get(key))]

    async def completed(self, *, seconds: float = 60.0) -> None:
        """Wait for the end of the campaign."""

        async def is_completed() -> bool:
            return await campaign_state(self.pool, self.campaign) == "completed"

        await until(is_completed, "campaign completed", seconds, self.machine)

    async def reconcile(self, *, duplicates: int = 0, seconds: float = 60.0) -> None:
        """The campaign ends with a clean ledger, and the sink agrees: nothing missing, at most `duplicates` copies, each announced."""
        await self.completed(seconds=seconds)
        found = await accounting.audit(self.pool, self.campaign)
        assert found.clean, (found, await self.machine.explain())
        assert (found.input, found.delivered, found.queued) == (self.recipients, self.recipients, 0), found
        copies, doubled = self.copies(), self.doubled()  # each line is written before its reply, so they are all there
        assert len(copies) == self.recipients, "lost"
        assert sum(copies.values()) - len(copies) <= duplicates, f"{len(doubled)} doubled: {self.machine.words()}"
        assert doubled <= await self.announced(), "a second copy that no `u` record announced"


async def start(
    machine: Machine, pool: Pool, *, recipients: int = 8000, rate: int = 2000, sink: tuple[str, ...] = (), state: str = "preparing",
    **limits: object,
) -> Load:  # fmt: skip
    """Start the sink and a campaign at `rate` messages a second; engines are the test's own to start."""
    await machine.sink("--accepted", str(machine.directory / "accepted.jsonl"), "--accepted-before-reply", *sink)
    campaign = await seed.campaign(
        pool,
        recipients=recipients,
        port=machine.sink_port,
        state=state,
        limits={"max_connections": CONNECTIONS, "max_messages_per_second": rate, **limits},
    )
    return Load(machine, pool, campaign, recipients)
