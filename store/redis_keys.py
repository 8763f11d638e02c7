"""Every Redis key: its name, type, writer, reader and lifetime. Nothing else in the tree spells one.

key                                     type     writer          reader        lifetime
sluice:{server}:queue:{class}           list     feeder RPUSH    intake LPOP   until taken; packed `Batch` values
sluice:generation                       string   feeder          feeder        for ever; gone = Redis was wiped, announce anew
sluice:engine:{id}:status               string   engine          status, top   5 s after the last heartbeat; JSON
sluice:inbound:{id}:status              string   inbound         status, top   the same
sluice:console:{hash}                   string   console         console       12 h; whose session, named by the SHA-256 of its cookie
sluice:changes                          channel  whoever changes engine        what changed, in a word: `services.announce` names them

Losing all of it costs a rebuild from PostgreSQL, never a recipient and never a second copy. The braces around the server
id are Redis Cluster hash tags: all keys of one command live in one slot.
"""

from typing import Final

GENERATION: Final = "sluice:generation"
CHANGES: Final = "sluice:changes"
ENGINE_STATUS_PATTERN: Final = "sluice:engine:*:status"
INBOUND_STATUS_PATTERN: Final = "sluice:inbound:*:status"

# Served in this order by weighted turns
PRIORITY_CLASSES: Final = ("transactional", "autoresponder", "marketing")


def queue(delivery_server_id: int, priority_class: str) -> str:
    """The list of announced batches of one way out and one priority class."""
    return f"sluice:{{{delivery_server_id}}}:queue:{priority_class}"


def engine_status(engine_id: str) -> str:
    """The last heartbeat of one engine process."""
    return f"sluice:engine:{engine_id}:status"


def inbound_status(process_id: str) -> str:
    """The last heartbeat of one inbound process."""
    return f"sluice:inbound:{process_id}:status"


def console_session(token_hash: str) -> str:
    """One signed-in browser."""
    return f"sluice:console:{token_hash}"
