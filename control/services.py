"""What every handler may need: the stores, the keyring and the settings of this process."""

import asyncio
import logging
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field

import msgspec
import redis.asyncio

from config.keys import Keyring
from config.settings import Settings
from store import batch_queue
from store.campaigns import Progress
from store.postgres import Pool

_PUBLISH_TIMEOUT_SECONDS = 1.0

_log = logging.getLogger(__name__)


class Rates:
    """Remembers what each campaign's progress was when it was last asked for, to tell how fast it goes."""

    WINDOW_SECONDS = 60.0
    MAX_CAMPAIGNS = 1000

    def __init__(self) -> None:
        self._seen: OrderedDict[int, deque[tuple[float, int]]] = OrderedDict()

    def with_rate(self, progress: Progress) -> Progress:
        """The same with `messages_per_second`: recipients that got an outcome; null when nobody asked before."""
        now = time.monotonic()
        ended = progress.recipients - progress.queued
        seen = self._seen.setdefault(progress.id, deque(maxlen=240))
        self._seen.move_to_end(progress.id)
        while len(self._seen) > self.MAX_CAMPAIGNS:
            self._seen.popitem(last=False)
        while seen and now - seen[0][0] > self.WINDOW_SECONDS:
            seen.popleft()
        if not seen or now - seen[-1][0] >= self.WINDOW_SECONDS / 240:
            seen.append((now, ended))
        then, before = seen[0]
        if now - then < 0.2:
            return progress
        return msgspec.structs.replace(progress, messages_per_second=round(max(0, ended - before) / (now - then), 1))


@dataclass(frozen=True)
class Services:
    """Made once, in `app.create_app`."""

    pool: Pool
    redis: redis.asyncio.Redis
    keyring: Keyring
    settings: Settings
    rates: Rates = field(default_factory=Rates)

    async def announce(self, what: str) -> None:
        """Tell the engines that `campaigns`, `egress`, `suppressions`, `bounce_patterns` or `dkim` changed.

        Never fails: the change is committed, and engines look by themselves every second.
        """
        try:
            async with asyncio.timeout(_PUBLISH_TIMEOUT_SECONDS):
                await batch_queue.publish_change(self.redis, what)
        except (TimeoutError, OSError, batch_queue.RedisError) as error:
            _log.warning("engines were not told of changed %s: %s", what, error or type(error).__name__)
