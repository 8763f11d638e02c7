"""The suppressed addresses, in memory: asked for every recipient just before its message is built (P7).

PostgreSQL is the truth; the set is loaded at start and follows what changed, at once when told (`redis_keys.CHANGES`) and
every second anyway. While PostgreSQL is away the set as last known is used.
"""

from domain import address
from store import engines
from store.engines import SuppressionChange
from store.postgres import Pool


class SuppressionSet:
    """Three scopes: the whole system, one user, one list of a user."""

    def __init__(self) -> None:
        self._scopes: dict[tuple[int, int], set[str]] = {}
        self._horizon = 0

    def __len__(self) -> int:
        return sum(map(len, self._scopes.values()))

    def apply(self, change: SuppressionChange) -> None:
        """Add or remove one address."""
        scope = self._scopes.setdefault((change.user_id, change.list_id), set())
        if change.removed:
            scope.discard(change.email_key)
        else:
            scope.add(change.email_key)

    async def refresh(self, pool: Pool) -> None:
        """Read what changed since the last time; the first time, everything."""
        self._horizon = await engines.suppression_changes(pool, self._horizon, self.apply)

    def scopes_for(self, user_id: int, list_id: int) -> list[set[str]]:
        """The sets that matter for mail of this user to this list; empty ones left out."""
        keys = ((0, 0), (user_id, 0), (user_id, list_id))
        return [scope for key in keys if (scope := self._scopes.get(key))]


def is_suppressed(scopes: list[set[str]], email: str) -> bool:
    """Tell whether any of `scopes` holds the address."""
    key = address.key(email)
    return any(key in scope for scope in scopes)
