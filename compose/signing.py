"""Signs messages with the DKIM keys of their domains: RSA first, Ed25519 second, each a field of its own (RFC 6376, 8301, 8463).

RSA PKCS #1 v1.5 and Ed25519 draw no random numbers, so the same message at the same time gets the same octets from every engine.
Keys are parsed once per process and shared by all campaigns of a domain; nothing is looked up per message.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA256

from compose import dkim_keys, mail_headers, signing_lanes
from compose.header_rules import address_octets, domain_octets, from_address, mail_from
from config.settings import Mail
from domain import dkim
from domain.campaign import CampaignContent
from domain.dkim import DkimKey
from domain.egress import DeliveryServer
from domain.errors import Invalid
from ext.dkim import Fields

_PADDING: Final = PKCS1v15()
_PREHASHED: Final = Prehashed(SHA256())

# Messages: by OpenSSL each takes 0.3 ms, and behind so many everything else a turn does is cold
_WITHOUT_LANES: Final = 16

MAX_PARSED: Final = 20_000  # about 9 KiB each once it has signed; of those not used lately the oldest goes


class SigningKey:
    """One key, parsed. `repr` shows no key. `lanes` sign eight at once where they can."""

    __slots__ = ("_how", "_lane_key", "_lanes", "algorithm", "domain", "octets", "private", "selector")

    def __init__(
        self, domain: str, selector: str, algorithm: str, private: dkim_keys.PrivateKey, *, lanes: signing_lanes.Lanes | None = None
    ) -> None:
        self.domain = domain
        self.selector = selector
        self.algorithm = algorithm
        self.private = private
        self.octets = dkim_keys.signature_octets(private)
        self._lanes = lanes
        self._lane_key: signing_lanes.LaneKey | None = None
        # What stands behind a hash; RFC 8463 §3: PureEdDSA signs the hash itself
        self._how = (_PADDING, _PREHASHED) if isinstance(private, rsa.RSAPrivateKey) else ()
        if lanes is not None and isinstance(private, rsa.RSAPrivateKey) and lanes.takes(private):
            self._lane_key = signing_lanes.LaneKey(private)

    def __repr__(self) -> str:
        return f"SigningKey({self.selector}._domainkey.{self.domain}, {self.algorithm})"

    @property
    def in_lanes(self) -> bool:
        """Whether it signs eight at once."""
        return self._lane_key is not None

    def sign(self, digests: list[bytes]) -> list[bytes]:
        """The signatures of SHA-256 hashes, in order. OpenSSL works without the GIL, and checks each RSA signature against faults."""
        made = self._lanes.sign(self._lane_key, digests) if self._lanes is not None and self._lane_key is not None else []
        sign: Callable[..., bytes] = self.private.sign
        how = self._how
        return made + [sign(digest, *how) for digest in digests[len(made) :]]


class DkimSigner:
    """Signs with all of the keys it was given. `domains`: those they are of; `at_once`: how many messages it is best given together."""

    def __init__(self, keys: Sequence[SigningKey]) -> None:
        if not keys:
            raise ValueError("a signer needs a key")
        self.keys = tuple(keys)
        self.domains = frozenset(key.domain for key in keys)
        # One full round: of two, the second would wait with messages that are ready, and a rest of them would not fill its lanes
        self.at_once = signing_lanes.LANES if any(key.in_lanes for key in keys) else _WITHOUT_LANES
        self._fields = Fields([(k.algorithm.encode(), k.domain.encode(), k.selector.encode(), k.octets) for k in keys])

    def sign(self, messages: list[bytes], timestamp: int) -> list[bytes | Invalid]:
        """Each message with its signatures in front; `timestamp` (POSIX seconds) is said in them. Invalid: its header cannot be read."""
        hashes, fields = self._fields.prepare(messages, timestamp)
        signatures = [key.sign(digests) for key, digests in zip(self.keys, hashes, strict=True)]
        answers = self._fields.complete(messages, fields, signatures)
        return [answer if isinstance(answer, bytes) else Invalid("header", f"cannot be signed: {answer}") for answer in answers]


class ParsedKeys:
    """The keys of this process by row id, parsed once. A row's key never changes, so what is kept never grows old."""

    def __init__(self, most: int = MAX_PARSED) -> None:
        self._most = most
        self._parsed: OrderedDict[int, SigningKey] = OrderedDict()

    def __len__(self) -> int:
        return len(self._parsed)

    def known(self, key_id: int) -> bool:
        """Whether `add` has seen it."""
        return key_id in self._parsed

    def add(self, key: DkimKey, private_key: bytes) -> None:
        """Parse an opened key. Raises ValueError when it is damaged."""
        private = dkim_keys.parse(private_key)
        self._parsed[key.id] = SigningKey(key.domain, key.selector, key.algorithm, private, lanes=signing_lanes.load())
        while len(self._parsed) > self._most:
            self._parsed.popitem(last=False)

    def signer(self, keys: Iterable[DkimKey]) -> DkimSigner | None:
        """What signs with those of `keys` that were added; None when there is none."""
        found = []
        for key in keys:
            if key.id in self._parsed:
                self._parsed.move_to_end(key.id)
                found.append(self._parsed[key.id])
        return DkimSigner(found) if found else None


class SigningDomains(NamedTuple):
    """Whose keys may sign the messages of one campaign."""

    user_id: int
    sender: list[str]  # one of these does, best first
    feedback: str  # and this one beside it, for the CFBL-Address (RFC 9477 §3.1.3); empty where no other need

    @property
    def names(self) -> list[str]:
        """All of them."""
        return [*self.sender, self.feedback] if self.feedback else self.sender

    def choose(self, keys: Iterable[DkimKey], operator: int) -> tuple[list[DkimKey], list[DkimKey]]:
        """Of these keys those that sign for the sender, and those beside them: none where the former are of that domain already.

        Only the user's own sign for the sender. For the complaint address the operator's go before his (docs/decisions/0031).
        """
        keys = list(keys)
        own = [key for key in keys if key.user_id == self.user_id]
        sender = dkim.choose(own, self.sender)
        if not self.feedback or any(key.domain == self.feedback for key in sender):
            return sender, []
        operators = [key for key in keys if key.user_id == operator]
        return sender, dkim.choose(operators, [self.feedback]) or dkim.choose(own, [self.feedback])


def domains_of(content: CampaignContent, server: DeliveryServer, mail: Mail) -> SigningDomains:
    """The domains whose keys may sign a campaign; none for mail of others, and where an address is no good."""
    if not content.sign:
        return SigningDomains(content.user_id, [], "")
    try:
        sender = address_octets(*from_address(content, server))[0].rpartition(b"@")[2]
        kind, back = mail_from(content, server, mail.sender_domain, mail.catch_all_domain)
        back_domain = domain_octets("mfrom", back) if kind == "domain" else address_octets("mfrom", back)[0].rpartition(b"@")[2]
        # A raw message goes out with the header it came with
        feedback = "" if content.raw else mail_headers.cfbl(mail, sender)[1]
    except Invalid:
        return SigningDomains(content.user_id, [], "")
    return SigningDomains(content.user_id, dkim.signing_domains(sender.decode("ascii"), back_domain.decode("ascii")), feedback)
