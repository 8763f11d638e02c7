"""What an engine holds in memory: live campaigns, and the batches it has leased, with what is still open in each."""

import msgspec
from asyncpg import BitString

from compose.campaign import CompiledCampaign
from compose.raw import RawMessage
from domain import states
from domain.campaign import Batch
from domain.errors import Invalid

SUSPECT_LOSSES = 2  # a recipient that lost so many connections is sent alone
GUILTY_LOSSES = 8  # so many are no chance any more


class Losses(msgspec.Struct):
    """Connections that ended under one recipient's message before its answer.

    `counted` are those that say something about the message: between one and the next the server answered somebody.
    """

    counted: int
    answers: int  # the server's, at the last one
    since: float  # POSIX seconds of the first


class LiveCampaign:
    """A campaign, or a part of a message stream, that this engine sends: compiled once, with its state as last seen in PostgreSQL."""

    __slots__ = (
        "compiled",
        "held",
        "id",
        "list_id",
        "priority_class",
        "queued_at_us",
        "refusal",
        "server_version",
        "state",
        "user_id",
    )

    def __init__(self, campaign_id: int, user_id: int, list_id: int, priority_class: str, queued_at: float, server_version: int) -> None:
        self.id = campaign_id
        self.user_id = user_id
        self.list_id = list_id
        self.priority_class = priority_class
        self.queued_at_us = int(queued_at * 1e6)
        self.server_version = server_version  # MFROM, link domain and From rules are compiled in
        self.state = states.RUNNING
        self.compiled: CompiledCampaign | RawMessage | None = None
        self.refusal: Invalid | None = None  # its content could not be compiled: every recipient gets an `x` record saying so
        self.held = 0

    def queued(self, at: float) -> "LiveCampaign":
        """The same content for one batch of a message stream, whose recipients were queued at `at` (POSIX seconds)."""
        made = LiveCampaign(self.id, self.user_id, self.list_id, self.priority_class, at, self.server_version)
        made.compiled, made.refusal, made.state = self.compiled, self.refusal, self.state
        return made

    @property
    def running(self) -> bool:
        """Whether its recipients may be sent now."""
        return self.state == states.RUNNING


class HeldBatch:
    """A leased batch. Recipient `i` is `batch.recipients[i]`; its bit in the batch row is `batch.positions[i]`."""

    __slots__ = (
        "batch", "campaign", "cursor", "epoch", "in_flight", "key", "lease_until", "losses", "lost", "open", "returned", "returning",
        "server_id",
    )  # fmt: skip

    def __init__(self, batch: Batch, campaign: LiveCampaign, epoch: int, done: BitString, lease_until: float) -> None:
        bits = done.bytes
        # An outcome may have been recorded after the batch was packed: what the lease says is what counts.
        if any(bits):
            left = [i for i, position in enumerate(batch.positions) if not bits[position >> 3] & (0x80 >> (position & 7))]
            batch.positions = [batch.positions[i] for i in left]
            batch.recipients = [batch.recipients[i] for i in left]
        self.batch = batch
        self.campaign = campaign
        self.server_id = batch.delivery_server_id  # the one it goes out through; a fallback where it is not the batch's own
        self.key = (batch.campaign_id, batch.batch)
        self.epoch = epoch
        self.lease_until = lease_until
        self.open = len(batch.recipients)  # recipients without an outcome
        self.in_flight = 0  # of those, handed to a connection
        self.cursor = 0
        self.returned: list[int] = []  # came back unsent: taken again when everybody else has been
        self.losses: dict[int, Losses] = {}
        self.lost = False  # nothing more of it may be sent under this lease (R4)
        self.returning = False  # it is being handed back: lost for good

    @property
    def ready(self) -> int:
        """Recipients that have not been taken."""
        return len(self.returned) + len(self.batch.recipients) - self.cursor

    @property
    def untried(self) -> bool:
        """Whether some of its recipients were never taken."""
        return self.cursor < len(self.batch.recipients)

    def is_suspect(self, index: int) -> bool:
        """Whether recipient `index` has lost so many connections that it is to be sent alone: then only the guilty one is charged."""
        losses = self.losses.get(index)
        return losses is not None and losses.counted >= SUSPECT_LOSSES

    def lost_with(self, index: int, answers: int, now: float) -> Losses:
        """A connection ended with recipient `index` begun; the server had given `answers` answers by then. `now` in POSIX seconds."""
        losses = self.losses.get(index)
        if losses is None:
            losses = self.losses[index] = Losses(1, answers, now)
        elif answers > losses.answers:
            losses.counted += 1
            losses.answers = answers
        return losses

    @property
    def progress(self) -> tuple[int, int, int, int]:
        """Differs when anything of it was sent, or came back, in between."""
        return (self.cursor, len(self.returned), self.in_flight, self.open)

    def take(self, count: int) -> list[int]:
        """Take up to `count` recipients for sending; returns their indexes."""
        upto = min(len(self.batch.recipients), self.cursor + count)
        taken = list(range(self.cursor, upto))
        self.cursor = upto
        # Last, because one of them may be what the server ends its connections for
        left = count - len(taken)
        taken.extend(self.returned[:left])
        del self.returned[:left]
        self.in_flight += len(taken)
        return taken

    def give_back(self, index: int) -> None:
        """Recipient `index` was not sent after all."""
        self.in_flight -= 1
        self.returned.append(index)

    def settle(self) -> bool:
        """One taken recipient has its outcome. True: it was the last one open."""
        self.in_flight -= 1
        self.open -= 1
        return self.open == 0
