"""Signs messages with the DKIM keys of one domain: RSA first, Ed25519 second, each a field of its own (RFC 6376, 8301, 8463).

RSA PKCS #1 v1.5 and Ed25519 draw no random numbers, so the same message at the same time gets the same octets from every engine.
Keys are parsed once per process and shared by all campaigns of a domain; nothing is looked up per message.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA256

from compose import dkim_keys, signing_lanes
from compose.header_rules import address_octets, domain_octets, from_address, mail_from
from domain import dkim
from domain.campaign import CampaignContent
from domain.dkim import DkimKey
from domain.egress import DeliveryServer
from domain.errors import Invalid
from ext.dkim import Fields

_PADDING: Final = PKCS1v15()
_PREHASHED: Final = Prehashed(SHA256())

MAX_PARSED: Final = 20_000  # about 9 KiB each once it has signed; of those not used lately the oldest goes


class SigningKey:
    """One key, parsed. `repr` shows no key. `lanes` sign eight at once where they can."""

    __slots__ = ("_lane_key", "_lanes", "algorithm", "domain", "octets", "private", "selector")

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
        if lanes is not None and isinstance(private, rsa.RSAPrivateKey) and lanes.takes(private):
            self._lane_key = signing_lanes.LaneKey(private)

    def __repr__(self) -> str:
        return f"SigningKey({self.selector}._domainkey.{self.domain}, {self.algorithm})"

    def sign(self, digests: list[bytes]) -> list[bytes]:
        """The signatures of SHA-256 hashes, in order. OpenSSL works without the GIL, and checks each RSA signature against faults."""
        private = self.private
        if isinstance(private, rsa.RSAPrivateKey):
            made: list[bytes] = []
            if self._lanes is not None and self._lane_key is not None:
                made = self._lanes.sign(self._lane_key, digests)
            sign = private.sign
            return made + [sign(digest, _PADDING, _PREHASHED) for digest in digests[len(made) :]]
        return [private.sign(digest) for digest in digests]  # RFC 8463 §3: PureEdDSA over the hash


class DkimSigner:
    """Signs for one domain with all of its active keys."""

    def __init__(self, keys: Sequence[SigningKey]) -> None:
        if not keys:
            raise ValueError("a signer needs a key")
        self.keys = tuple(keys)
        self._fields = Fields([(k.algorithm.encode(), k.domain.encode(), k.selector.encode(), k.octets) for k in keys])

    def sign(self, messages: list[bytes], timestamp: int) -> list[bytes | Invalid]:
        """Each message with its signatures in front; `timestamp` (POSIX seconds) is said in them. Invalid: its header cannot be read."""
        prepare, complete = self._fields.prepare, self._fields.complete
        answers: list[bytes | Invalid] = []
        prepared: list[tuple[int, list[bytes]]] = []
        hashes: list[list[bytes]] = [[] for _ in self.keys]
        for message in messages:
            try:
                digests, fields = prepare(message, timestamp)
            except ValueError as error:
                answers.append(Invalid("header", f"cannot be signed: {error}"))
                continue
            prepared.append((len(answers), fields))
            answers.append(message)
            for kept, digest in zip(hashes, digests, strict=True):
                kept.append(digest)
        signatures = [key.sign(digests) for key, digests in zip(self.keys, hashes, strict=True)]
        for row, (at, fields) in enumerate(prepared):
            answers[at] = complete(messages[at], fields, [of_key[row] for of_key in signatures])
        return answers


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


def domains_of(content: CampaignContent, server: DeliveryServer) -> list[str]:
    """The domains whose keys may sign a campaign, best first; none for mail of others, and where an address is no good."""
    if not content.sign:
        return []
    try:
        sender, _ = address_octets(*from_address(content, server))
        kind, back = mail_from(content, server)
        back_domain = domain_octets("mfrom", back) if kind == "domain" else address_octets("mfrom", back)[0].rpartition(b"@")[2]
    except Invalid:
        return []
    return dkim.signing_domains(sender.rpartition(b"@")[2].decode("ascii"), back_domain.decode("ascii"))
