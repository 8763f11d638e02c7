"""The DKIM keys this engine signs with: found per campaign when it is compiled, parsed once, followed while it runs.

A change of keys is seen by its version, asked for every second and at the word `dkim`; then every live campaign gets what signs
for it now, without being compiled anew.
"""

from collections.abc import Iterable

import structlog

from compose.campaign import CompiledCampaign
from compose.raw import RawMessage
from compose.signing import DkimSigner, ParsedKeys, SigningDomains, domains_of
from config.keys import Keyring
from config.settings import Mail
from domain import dkim
from domain.campaign import CampaignContent
from domain.dkim import DkimKey
from domain.egress import DeliveryServer
from domain.errors import Invalid
from store import dkim as stored
from store.postgres import Pool

log = structlog.get_logger(__name__)


class SigningKeys:
    """Signers for campaigns. `trouble` is a sentence for the operator, empty when all keys can be used."""

    def __init__(self, pool: Pool, keyring: Keyring, mail: Mail) -> None:
        self._pool = pool
        self._keyring = keyring
        self._mail = mail
        self._operator = 0  # whose keys sign for the complaint address; looked up when the first campaign needs one
        self._left_out = ""
        self._parsed = ParsedKeys()
        self._refused: dict[int, str] = {}
        self._said: dict[int, str] = {}  # in the log
        self._lookups = 0
        self._seen = (-1, 0)  # version and lookups at the last look

    @property
    def trouble(self) -> str:
        """What is wrong with keys that should sign and cannot."""
        return next(iter(self._refused.values()), self._left_out)

    async def signer(self, content: CampaignContent, server: DeliveryServer) -> DkimSigner | None:
        """What signs the messages of a campaign behind a delivery server; None: nobody made a key for its domains."""
        domains = domains_of(content, server, self._mail)
        if not domains.names:
            return None
        # The keys may change before the campaign is among those that `follow` sees: it looks again after every lookup
        self._lookups += 1
        return self._signer(domains, await self._active([domains]))

    async def follow(self, campaigns: Iterable[CompiledCampaign | RawMessage]) -> None:
        """Give each campaign its signer anew if any key has changed since the last look."""
        wanted = [(campaign, domains_of(campaign.content, campaign.server, self._mail)) for campaign in campaigns]
        if not wanted:
            return  # an idle engine asks nothing
        seen = (await stored.version(self._pool), self._lookups)
        if seen != self._seen:
            keys = await self._active([domains for _, domains in wanted])
            self._refused.clear()
            for campaign, domains in wanted:
                campaign.signer = self._signer(domains, keys)
            self._seen = seen
        self._left_out = next((_left_out(domains.feedback) for campaign, domains in wanted if _lacks(campaign.signer, domains)), "")

    async def _active(self, wanted: list[SigningDomains]) -> list[DkimKey]:
        """Every key that one of these may sign with."""
        names = {name for domains in wanted for name in domains.names}
        users = {domains.user_id for domains in wanted}
        if any(domains.feedback for domains in wanted):
            self._operator = self._operator or await stored.operator(self._pool)
            users.add(self._operator)
        return await stored.active(self._pool, sorted(users), sorted(names)) if names else []

    def _signer(self, domains: SigningDomains, keys: list[DkimKey]) -> DkimSigner | None:
        sender, feedback = domains.choose(keys, self._operator)
        return self._parsed.signer(self._usable([*sender, *feedback]))

    def _usable(self, keys: list[DkimKey]) -> list[DkimKey]:
        """Parse those that are new; one that cannot be opened is named and left out."""
        usable = []
        for key in keys:
            if not self._parsed.known(key.id):
                try:
                    self._parsed.add(key, self._keyring.open(key.private_key_sealed, dkim.seal_context(key.id)))
                except (Invalid, ValueError) as error:
                    # The mail goes out with what other keys there are: a missing signature costs reputation, a halt costs the campaign
                    reason = str(error) if isinstance(error, Invalid) else "it is damaged"
                    sentence = f"DKIM key {key.record_name} does not sign, mail goes out without it: {reason}"
                    if self._said.get(key.id) != sentence:
                        log.error("DKIM key refused", key=key.id, record=key.record_name, reason=reason)
                    self._said[key.id] = self._refused[key.id] = sentence
                    continue
            self._refused.pop(key.id, None)
            usable.append(key)
        return usable


def _lacks(signer: DkimSigner | None, domains: SigningDomains) -> bool:
    return bool(domains.feedback) and (signer is None or domains.feedback not in signer.domains)


def _left_out(domain: str) -> str:
    return (
        f"no DKIM key signs for {domain}, the domain of mail.cfbl_address: mail of other domains goes out without CFBL-Address; "
        f"`sluice dkim new {domain}` makes one"
    )
