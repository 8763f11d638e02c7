"""Settings: what one process needs to know before it starts, as frozen Structs with units in the names.

Read once by `config.load`; every field has a default that works on one machine. `sluice.example.toml` shows each with
its default (a test compares the two). Anything that changes while running (delivery servers, campaigns) is not here.
"""

from typing import Annotated, Literal

import msgspec

# What a value may be; `config.load` turns a bound that is broken into a sentence
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
OptionalPort = Annotated[int, msgspec.Meta(ge=0, le=65535)]  # 0: not used
Seconds = Annotated[float, msgspec.Meta(ge=0.01, le=86400)]
Bytes = Annotated[int, msgspec.Meta(ge=64 * 1024, le=1 << 50)]


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Node(_Section, frozen=True):
    """This machine."""

    name: str = ""  # empty: the host name
    state_directory: str = ""  # empty: /var/lib/sluice as root, else $XDG_STATE_HOME/sluice
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class Database(_Section, frozen=True):
    """PostgreSQL 14 or newer. `embedded:` runs a private server under the state directory."""

    url: str = "embedded:"
    pool_size: Annotated[int, msgspec.Meta(ge=2, le=500)] = 10
    command_timeout_seconds: Seconds = 30.0


class Redis(_Section, frozen=True):
    """Redis 6.2 / Valkey 7.2 or newer. `embedded:` runs a private server under the state directory."""

    url: str = "embedded:"
    timeout_seconds: Seconds = 5.0


class Secrets(_Section, frozen=True):
    """The key all tokens and sealed passwords hang on; every node of a fleet needs the same one."""

    key_file: str = ""  # empty: secret.key in the state directory, made on first start
    key: str = ""  # 64 hex digits; better set by SLUICE_SECRETS__KEY than written in a file


class Engine(_Section, frozen=True):
    """The sending processes."""

    processes: Annotated[int, msgspec.Meta(ge=0, le=256)] = 0  # 0: one per core
    batch_recipients: Annotated[int, msgspec.Meta(ge=1, le=5000)] = 2000  # at most; 500 in a small campaign
    queue_low_batches: Annotated[int, msgspec.Meta(ge=1, le=10000)] = 6  # per campaign in Redis: below this the feeder announces more ...
    queue_high_batches: Annotated[int, msgspec.Meta(ge=1, le=10000)] = 16  # ... up to this
    held_batches: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 3  # per delivery server and engine
    lease_seconds: Seconds = 30.0
    lease_margin_seconds: Seconds = 5.0
    drain_timeout_seconds: Seconds = 30.0
    fallback_server: str = ""  # name of a delivery server of the operator; stands in for all that have no fallback of their own
    metrics_port: OptionalPort = 0  # first engine's port, the next ones count up; 0: none


class Journal(_Section, frozen=True):
    """The append-only journal on local disk."""

    directory: str = ""  # empty: journal/ in the state directory
    segment_bytes: Bytes = 4 * 1024 * 1024  # what was carried over goes soon, and its memory is used again for the next
    fsync_interval_seconds: Seconds = 0.1
    ledger_interval_seconds: Seconds = 0.5
    disk_budget_bytes: Bytes = 4 * 1024 * 1024 * 1024


class Accounting(_Section, frozen=True):
    """PowerMTA-style accounting files `<stem>-YYYY-MM-DD-NNNN.csv`."""

    path: str = ""  # empty: accounting/acct.csv in the state directory
    records: tuple[Literal["d", "b", "t"], ...] = ("d", "b", "t")
    max_size_bytes: Bytes = 250 * 1024 * 1024
    flush_interval_seconds: Seconds = 1.0
    remote_path: str = ""  # rb and rs records; empty: accounting/remote.csv in the state directory
    feedback_path: str = ""  # f records; empty: accounting/fbl.csv in the state directory


class Control(_Section, frozen=True):
    """The API and the console."""

    host: str = "127.0.0.1"
    port: Port = 8025
    max_body_bytes: Bytes = 4 * 1024 * 1024  # imports are streamed and not limited by it
    default_custom_fields: tuple[str, ...] = ()  # text fields that every new list begins with
    admin_key: str = ""  # set by SLUICE_CONTROL__ADMIN_KEY; empty: made on first start, kept in admin.key


class Inbound(_Section, frozen=True):
    """What the world sends back."""

    smtp_host: str = "127.0.0.1"
    smtp_port: Port = 2525
    submission_port: OptionalPort = 0  # the same, and with AUTH mail to anybody; usually 587
    submission_clear_from_loopback: bool = False  # programs on this machine may sign in without TLS
    lmtp_port: OptionalPort = 0  # for an MTA in front of us
    tls_certificate_file: str = ""  # empty: no STARTTLS
    tls_key_file: str = ""  # empty: the key is in the certificate's file
    proxy_addresses: tuple[str, ...] = ()  # addresses or networks that begin every connection with a PROXY header
    http_host: str = "127.0.0.1"
    http_port: Port = 8080
    public_url: str = "http://127.0.0.1:8080"  # how recipients reach the web side; a link domain of a delivery server replaces its host
    relay_domains: tuple[str, ...] = ()  # besides the MFROM domains of the delivery servers
    max_message_bytes: Bytes = 10 * 1024 * 1024
    max_connections: Annotated[int, msgspec.Meta(ge=1, le=100000)] = 500
    mailboxes: tuple[str, ...] = ()  # URLs, see inbound.mailboxes
    mailbox_interval_seconds: Seconds = 60.0
    soft_bounce_threshold: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 3  # without a delivery in between; 0: never a hard one
    pause_sender_faults: Annotated[int, msgspec.Meta(ge=0, le=1000000)] = 20  # 0: nothing is paused for its sender
    pause_sender_fault_percent: Annotated[float, msgspec.Meta(ge=0.0, le=100.0)] = 5.0
    admin_address: str = ""  # gets reports that could not be processed; empty: nobody
    keep_days: Annotated[float, msgspec.Meta(ge=1.0, le=3650.0)] = 30.0  # of received mail, after it was handled
    metrics_port: OptionalPort = 0


class Mail(_Section, frozen=True):
    """What all outgoing mail says, whoever sends it. `%sender_domain%` in an address stands for the domain of the From address."""

    x_mailer: str = ""  # empty: no X-Mailer
    complaints_to: str = ""  # X-Complaints-To; empty: none
    cfbl_address: str = ""  # CFBL-Address (RFC 9477), signed for by a DKIM key of its domain; empty: none
    list_unsubscribe_to: str = ""  # mailto of List-Unsubscribe, or a URL; gets a copy of each unsubscribe; empty: our own mailto
    feedback_sender_id: str = ""  # last part of Feedback-ID; empty: none
    sender_domain: str = ""  # return-path domain of delivery servers without one
    catch_all_domain: str = ""  # the same, after sender_domain
    preheader_template: str = ""  # HTML around `_PreHeaderText_`; empty: two hidden blocks, the second of blanks
    max_attachment_bytes: Bytes = 10 * 1024 * 1024  # all attachments of a campaign together
    forbidden_from: tuple[str, ...] = ()  # From addresses nobody may use; * stands for anything


class Preflight(_Section, frozen=True):
    """What providers would object to, looked at before a campaign starts."""

    hold_start: Literal["never", "content", "all"] = "content"  # what may hold a start: nothing, the samples, the samples and the DNS
    nameservers: tuple[str, ...] = ()  # IP addresses, `address@port` where it is not 53; empty: those of the machine
    timeout_seconds: Seconds = 5.0


class Settings(_Section, frozen=True):
    """All of them."""

    node: Node = Node()
    database: Database = Database()
    redis: Redis = Redis()
    secrets: Secrets = Secrets()
    engine: Engine = Engine()
    journal: Journal = Journal()
    accounting: Accounting = Accounting()
    control: Control = Control()
    inbound: Inbound = Inbound()
    mail: Mail = Mail()
    preflight: Preflight = Preflight()
