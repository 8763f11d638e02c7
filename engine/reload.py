"""Which settings a running engine takes over on SIGHUP; all others need a restart, and are named when they differ."""

from typing import Final

import msgspec

from config.settings import Settings

RELOADABLE: Final = frozenset(
    {
        "node.log_level",
        "engine.batch_recipients",
        "engine.queue_low_batches",
        "engine.queue_high_batches",
        "engine.held_batches",
        "engine.drain_timeout_seconds",
        "engine.fallback_server",
    }
)
# Replaced at the start by where the private servers are
_RESOLVED: Final = frozenset({"database.url", "redis.url"})


def differences(old: Settings, new: Settings) -> tuple[list[str], list[str]]:
    """(what changes now, what changes after a restart): names such as `engine.held_batches`."""
    now: list[str] = []
    later: list[str] = []
    for section in Settings.__struct_fields__:
        before, after = getattr(old, section), getattr(new, section)
        for key in before.__struct_fields__:
            name = f"{section}.{key}"
            if getattr(before, key) != getattr(after, key) and name not in _RESOLVED:
                (now if name in RELOADABLE else later).append(name)
    return now, later


def apply(old: Settings, new: Settings) -> Settings:
    """`old` with the reloadable values of `new`."""
    sections = {}
    for section in Settings.__struct_fields__:
        keys = [key for key in getattr(old, section).__struct_fields__ if f"{section}.{key}" in RELOADABLE]
        if keys:
            sections[section] = msgspec.structs.replace(getattr(old, section), **{key: getattr(getattr(new, section), key) for key in keys})
    return msgspec.structs.replace(old, **sections)
