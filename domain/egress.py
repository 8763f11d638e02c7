"""DeliveryServer and EgressConfig: the configured ways out, as one versioned snapshot."""

from typing import Literal

import msgspec

Security = Literal["none", "starttls", "tls"]
OnUncertain = Literal["retry", "assume_delivered", "fail"]


class DeliveryServerLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of one delivery server, over all engines together. A missing key takes the default; an unknown key is an error."""

    max_connections: int = 10
    max_messages_per_second: float = 0.0  # 0 = no limit
    max_messages_per_connection: int = 0  # 0 = no limit
    pipelining: bool = True  # False: lock-step even where the server offers PIPELINING
    chunking: bool = True  # False: DATA even where the server offers CHUNKING
    eightbitmime: bool = False  # True: text beyond ASCII goes as 8bit where the server offers 8BITMIME, which may cost a DKIM signature
    bdat_window: int = 4  # messages in flight per connection with CHUNKING = the duplicate window (P3)
    final_dot_timeout_seconds: float = 600.0  # RFC 5321 §4.5.3.2.6; at least 60
    command_timeout_seconds: float = 300.0  # RFC 5321 §4.5.3.2
    retry_schedule_seconds: tuple[float, ...] = (60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 14400.0)  # waits after attempt 1, 2, ...
    retry_growth: float = 1.0  # behind the list each wait is the one before times this; 1 = the last repeats
    retry_longest_seconds: float = 14400.0  # waits do not grow beyond this
    max_age_seconds: float = 4.5 * 86400.0  # from the first attempt; older is expired
    on_uncertain: OnUncertain = "retry"
    fallback_after_seconds: float = 300.0  # unusable for so long, its mail goes out through the fallback server


class DeliveryServer(msgspec.Struct, frozen=True, kw_only=True):
    """A configured way out: a relay host with its credentials, domains and limits (requirements 8-22)."""

    id: int
    user_id: int
    name: str
    host: str
    port: int = 25
    security: Security = "none"
    connect_timeout_seconds: float = 10.0
    username: str = ""
    password_sealed: bytes = b""  # AES-256-GCM (S11); opened by `config.keys.Keyring.open`
    link_domain: str = ""
    open_domain: str = ""
    mfrom: str = ""  # a domain: signed return paths below it; an address: exactly that address
    enforced_from: str = ""
    use_list_sender_as_mfrom: bool = False
    use_list_sender_as_from: bool = False
    fallback_server_id: int | None = None  # takes over while this one is unusable; its own fallback does not count then
    limits: DeliveryServerLimits = DeliveryServerLimits()
    enabled: bool = True
    version: int = 1

    @property
    def mfrom_domain(self) -> str:
        """The domain of the return path, whichever way `mfrom` is written."""
        return self.mfrom.rpartition("@")[2]


class EgressConfig(msgspec.Struct, frozen=True):
    """Every delivery server at one version; an engine swaps the whole snapshot."""

    version: int
    servers: dict[int, DeliveryServer]
    operator: int = 0  # the user whose servers may serve the whole installation; 0: there is none yet

    def fallback(self, name: str) -> DeliveryServer | None:
        """The operator's delivery server of this name, which may stand in for everybody's."""
        return next((server for server in self.servers.values() if server.name == name and server.user_id == self.operator), None)
