"""Opens and clicks: what a GET of a link of ours means, who seems to have made it, and where it leads.

A redirect leads only where the campaign's own content leads: to the address looked up by a link number, or to one that we signed. The
verdict `bot` says why we think no person was there; it changes nothing in the answer, so nobody is kept from the page.
"""

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from domain import links
from domain.errors import Unavailable
from store import conversions, tracking
from store.postgres import Pool
from store.tracking import Visit

STORE_TIMEOUT_SECONDS: Final = 5.0
MAX_CAMPAIGNS: Final = 1000  # whose links are kept in memory
UNKNOWN_SECONDS: Final = 5.0  # so long it is remembered that a campaign has no links
PARAMETER_SECONDS: Final = 60.0  # so long it is remembered what a campaign calls its click id
PARAMETER_TIMEOUT_SECONDS: Final = 1.0
SAME_SECONDS: Final = 60.0  # the same visit again within this time is not counted again
BURST_LINKS: Final = 4  # different links of one message ...
BURST_SECONDS: Final = 10.0  # ... within this time are a scanner's
MAX_REMEMBERED: Final = 100_000
MAX_AGENT_CHARACTERS: Final = 200

# Programs that look at links before or instead of people; lower case
_AGENTS: Final = re.compile(
    r"bot\b|bot/|crawl|spider|scanner|preview|facebookexternalhit|slackbot|whatsapp|telegrambot|barracuda|proofpoint|mimecast|"
    r"safelinks|bingpreview|microsoft office|microsoft outlook|ms-office|symantec|fireeye|trendmicro|zscaler|forcepoint|sophos|"
    r"curl/|wget/|python-|go-http-client|java/|libwww|headlesschrome|phantomjs|okhttp|urlscan|virustotal|google-safety"
)

# One transparent pixel
GIF: Final = bytes.fromhex("47494638396101000100800000000000ffffff21f90401000000002c00000000010001000002024401003b")


class Keys(NamedTuple):
    """The keys of each purpose."""

    click: bytes
    link: bytes
    destination: bytes
    open: bytes
    click_id: bytes

    @classmethod
    def derived(cls, derive: Callable[[str], bytes]) -> "Keys":
        """From `Keyring.derive`."""
        return cls(derive("click"), derive("click-link"), derive("click-destination"), derive("open"), derive("click-id"))


def machine(method: str, headers: Mapping[bytes, bytes]) -> str:
    """Why a request was no person's, as far as one request tells: head, prefetch, agent; "" for a person."""
    if method == "HEAD":
        return "head"
    for name in (b"sec-purpose", b"purpose", b"x-purpose", b"x-moz"):
        if any(word in headers.get(name, b"").lower() for word in (b"prefetch", b"prerender", b"preview")):
            return "prefetch"
    agent = headers.get(b"user-agent", b"").decode("latin-1").lower()
    return "agent" if not agent or _AGENTS.search(agent) else ""


class Tracker:
    """Answers opens and clicks. `keep` writes a visit down before it is answered."""

    def __init__(self, pool: Pool, keys: Keys, keep: Callable[[Visit], None], clock: Callable[[], float] = time.time) -> None:
        self._pool = pool
        self._keys = keys
        self._keep = keep
        self._clock = clock
        self._links: OrderedDict[tuple[int, int], tuple[dict[int, str], float]] = OrderedDict()
        self._parameters: OrderedDict[tuple[int, int], tuple[str, float]] = OrderedDict()
        self._seen: OrderedDict[tuple[int, int, str, int, str], float] = OrderedDict()
        self._clicked: OrderedDict[tuple[int, int], dict[int, float]] = OrderedDict()

    async def click(self, method: str, text: str, headers: Mapping[bytes, bytes]) -> str | None:
        """Where the click at `/c/<text>` leads; None when it is none of ours. Raises Unavailable when that cannot be looked up now."""
        token, slash, own = text.partition("/")
        read = links.read_click(self._keys.click, self._keys.link, token)
        if read is None:
            return None
        parts, link = read
        url: str | None
        if slash:
            url = links.read_destination(self._keys.destination, token, own)
        else:
            url = (await self._links_of(parts)).get(link)
        if not url or not url.startswith(("http://", "https://")):
            return None
        self._note(parts, "c", link, method, headers)
        parameter = await self._parameter_of(parts)
        return links.with_parameter(url, parameter, links.token(self._keys.click_id, parts)) if parameter else url

    def open(self, method: str, text: str, headers: Mapping[bytes, bytes]) -> bool:
        """Note the open at `/o/<text>`; False when it is none of ours."""
        parts = links.read(self._keys.open, text)
        if parts is None:
            return False
        self._note(parts, "o", 0, method, headers)
        return True

    async def _parameter_of(self, parts: links.LinkParts) -> str:
        """What the click id is called; "" where the campaign wants none, or nobody can be asked: the reader is not kept waiting."""
        key = parts.user_id, parts.campaign_id
        found, until = self._parameters.get(key, ("", 0.0))
        if until < self._clock():
            self._parameters[key] = found, self._clock() + UNKNOWN_SECONDS  # others do not ask meanwhile
            try:
                async with asyncio.timeout(PARAMETER_TIMEOUT_SECONDS):
                    found = await conversions.click_parameter(self._pool, *key, timeout_seconds=PARAMETER_TIMEOUT_SECONDS)
            except (Unavailable, TimeoutError):
                return found
            self._parameters[key] = found, self._clock() + PARAMETER_SECONDS
            _forget_oldest(self._parameters, MAX_CAMPAIGNS)
        return found

    async def _links_of(self, parts: links.LinkParts) -> dict[int, str]:
        key = parts.user_id, parts.campaign_id
        found, until = self._links.get(key, ({}, 0.0))
        if not found and until < self._clock():
            found = await tracking.links(self._pool, *key, timeout_seconds=STORE_TIMEOUT_SECONDS)
            self._links[key] = found, self._clock() + UNKNOWN_SECONDS
            _forget_oldest(self._links, MAX_CAMPAIGNS)
        return found

    def _note(self, parts: links.LinkParts, kind: str, link: int, method: str, headers: Mapping[bytes, bytes]) -> None:
        now = self._clock()
        who = parts.campaign_id, parts.number
        bot = machine(method, headers)
        if kind == "c" and not bot and self._burst(who, link, now):
            bot = "burst"
        same = (*who, kind, link, bot)
        if self._seen.get(same, 0.0) > now:
            return
        self._seen[same] = now + SAME_SECONDS
        self._seen.move_to_end(same)
        _forget_oldest(self._seen, MAX_REMEMBERED)
        agent = headers.get(b"user-agent", b"").decode("latin-1")
        agent = "".join(character for character in agent if character.isprintable())[:MAX_AGENT_CHARACTERS]
        self._keep(Visit(parts.campaign_id, parts.number, kind, link, now, bot, agent))

    def _burst(self, who: tuple[int, int], link: int, now: float) -> bool:
        clicked = self._clicked.setdefault(who, {})
        self._clicked.move_to_end(who)
        _forget_oldest(self._clicked, MAX_REMEMBERED)
        clicked[link] = now
        for other in [other for other, at in clicked.items() if at < now - BURST_SECONDS]:
            del clicked[other]
        return len(clicked) >= BURST_LINKS


def _forget_oldest(held: OrderedDict[Any, Any], most: int) -> None:
    while len(held) > most:
        held.popitem(last=False)
