"""Server-to-server postbacks: a tracker (Binom, Voluum, ...) reports what became of a click, naming the click id that our redirect gave it.

The address holds a signed token of the user, the click id one of the recipient, so nobody invents conversions of others. A GET acts here,
because trackers know nothing else; a repeated one changes nothing.
"""

import re
import time
from collections import OrderedDict
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Final
from urllib.parse import parse_qsl

from domain import links
from journal.visits import Held
from store import conversions
from store.conversions import Conversion, S2sSettings
from store.postgres import Pool, PooledConnection, connection

STORE_TIMEOUT_SECONDS: Final = 5.0
KEPT_SECONDS: Final = 5.0  # so long a user's names of parameters are not asked for again
MAX_USERS: Final = 1000
MAX_FIELDS: Final = 50
MAX_VALUE: Final = Decimal(10) ** 12

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f]")

Reply = tuple[int, bytes]


def _said(query: bytes, body: bytes) -> dict[str, str]:
    """The parameters. Raises ValueError."""
    return dict(parse_qsl((query + b"&" + body).decode("utf-8"), keep_blank_values=True, max_num_fields=MAX_FIELDS))


class Postbacks:
    """Answers `/s/<user token>?<click id>=...&<value>=...`."""

    def __init__(self, pool: Pool, derive: Callable[[str], bytes], clock: Callable[[], float] = time.monotonic) -> None:
        self._pool = pool
        self._user_key = derive("s2s")
        self._click_key = derive("click-id")
        self._clock = clock
        self._settings: OrderedDict[int, tuple[S2sSettings, float]] = OrderedDict()

    async def answer(self, text: str, query: bytes, body: bytes) -> Reply | None:
        """Status and words; None: the address is none of ours. Raises Unavailable."""
        user = links.read(self._user_key, text)
        if user is None:
            return None
        async with connection(self._pool, timeout_seconds=STORE_TIMEOUT_SECONDS) as conn:
            return await self.act(conn, user.user_id, query, body)

    def held(self, text: str, query: bytes, body: bytes) -> Held | None:
        """A postback to be carried out later, by `act`; None: it names no click of ours under any name, so it is nobody's."""
        user = links.read(self._user_key, text)
        try:
            said = _said(query, body)
        except ValueError:
            return None
        for value in said.values() if user is not None else ():
            click = links.read(self._click_key, value)
            if click is not None and user is not None and click.user_id == user.user_id:
                return Held("postback", user.user_id, click.campaign_id, click.number, query, body, time.time())
        return None

    async def act(self, conn: PooledConnection, user_id: int, query: bytes, body: bytes, at: float | None = None) -> Reply:
        """Carry out a postback of a user, which came at `at` (POSIX seconds; None: now)."""
        try:
            said = _said(query, body)
        except ValueError:
            return 400, b"the parameters cannot be read\n"
        settings = await self._settings_of(conn, user_id)
        if settings.parameter not in said:
            return 400, f"the parameter {settings.parameter} with the click id is missing\n".encode()
        click = links.read(self._click_key, said[settings.parameter])
        if click is None or click.user_id != user_id:
            return 404, b"this click id is none of ours\n"
        try:
            value = Decimal(said.get(settings.value_parameter, "").replace(",", ".") or 0)
        except InvalidOperation:
            value = Decimal("NaN")
        if not value.is_finite() or abs(value) > MAX_VALUE:
            return 400, f"{settings.value_parameter} is no number\n".encode()
        texts = {name: said.get(name) or usual for name, usual in
                 (("unit", settings.unit), ("channel", settings.channel), ("transaction_id", ""))}  # fmt: skip
        if any(len(each) > 100 or _UNPRINTABLE.search(each) for each in texts.values()):
            return 400, b"unit, channel and transaction_id may have 100 characters of one line\n"
        conversion = Conversion(
            campaign_id=click.campaign_id, number=click.number, value=value,
            unit=texts["unit"], channel=texts["channel"], transaction=texts["transaction_id"],
        )  # fmt: skip
        fresh = await conversions.record(conn, user_id, conversion, at=at, timeout_seconds=STORE_TIMEOUT_SECONDS)
        if fresh is None:
            return 404, b"the campaign of this click is gone\n"
        return 200, b"recorded\n" if fresh else b"known\n"

    async def _settings_of(self, conn: PooledConnection, user_id: int) -> S2sSettings:
        kept = self._settings.get(user_id)
        if kept is not None and kept[1] > self._clock():
            return kept[0]
        found = await conversions.settings_of(conn, user_id)
        self._settings[user_id] = found, self._clock() + KEPT_SECONDS
        while len(self._settings) > MAX_USERS:
            self._settings.popitem(last=False)
        return found
