"""The suppressed addresses, in memory: asked for every recipient just before its message is built (P7).

PostgreSQL is the truth; the set is loaded at start and follows what changed, at once when told (`redis_keys.CHANGES`) and
every second anyway. While PostgreSQL is away the set as last known is used.
"""

import asyncio
import os
from typing import Any

from domain import address
from domain.errors import Invalid
from ext.address_set import AddressSet
from store import suppressions
from store.postgres import Pool


class SuppressionSet:
    """Three scopes: the whole system, one user, one list of a user; addresses, domains and local parts in each."""

    def __init__(self) -> None:
        self._set = AddressSet(os.urandom(16), _key_of)
        self._since = ""
        self._refreshing = asyncio.Lock()

    def __len__(self) -> int:
        return len(self._set)

    async def refresh(self, pool: Pool) -> None:
        """Read what changed since the last time; the first time, everything."""
        async with self._refreshing:
            self._set.begin_copy()
            self._since = await suppressions.changes(pool, self._since, self._set.feed_copy)

    def among(self, user_id: int, list_id: int, recipients: list[Any], indexes: list[int]) -> list[int]:
        """Those of `indexes` whose `recipients[index].email` must not be mailed by this user, on this list (0: none)."""
        return self._set.suppressed(user_id, list_id, recipients, indexes)


def _key_of(email: str) -> str:
    """The key of an address; of one that cannot be read, which cannot be suppressed or composed either, the text as it is."""
    try:
        return address.key(email)
    except Invalid:
        return email
