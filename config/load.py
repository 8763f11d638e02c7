"""Reads the TOML file and the `SLUICE_*` variables into Settings, once, at start; and says where things live because of them.

A variable wins over the file: `SLUICE_ENGINE__BATCH_RECIPIENTS` or `SLUICE_ENGINE_BATCH_RECIPIENTS` for `batch_recipients`
of `[engine]`; an empty one counts as not set. Nothing is guessed: an unknown key or a value out of range refuses the whole
configuration, with every problem found, each with file, line, key and reason (bad inputs 58 and 59).
"""

import difflib
import ipaddress
import os
import re
import socket
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from config.settings import Mail, Settings
from domain import mailbox
from domain.errors import ConfigurationError, Invalid
from domain.links import is_web_address

# Variables of ours that are no settings: the launcher, the build and the command read them
OTHER_VARIABLES: Final = frozenset({"SLUICE_CONFIG", "SLUICE_DKIM_LANES", "SLUICE_NO_SYSTEM", "SLUICE_CYTHON_DEBUG", "SLUICE_NATIVE"})
SECRET_KEYS: Final = frozenset({"secrets.key", "control.admin_key"})
# Their values may hold a password, so no message repeats them
UNQUOTED_KEYS: Final = SECRET_KEYS | {"database.url", "redis.url", "inbound.mailboxes"}
DATABASE_SCHEMES: Final = ("postgresql", "postgres")
REDIS_SCHEMES: Final = ("redis", "rediss", "unix", "redis+cluster")
MINIMUM_ADMIN_KEY_CHARACTERS: Final = 16

_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f]")


def load(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """Settings from `path`, else the file SLUICE_CONFIG names, else the defaults; variables on top. Raises ConfigurationError."""
    return check(path, environ)[0]


def check(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> tuple[Settings, list[str]]:
    """Like `load`, and warnings about what is allowed but unwise. Raises ConfigurationError with all problems."""
    if path is None and environ.get("SLUICE_CONFIG"):
        path = Path(environ["SLUICE_CONFIG"])
    reader = _Reader()
    if path is not None:
        reader.read_file(path)
    reader.read_environment(environ)
    settings = reader.build()
    return settings, reader.warnings


class _Reader:
    """Collects values with the place each came from, and every problem on the way."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self._sections = {field.name: {inner.name: inner for inner in msgspec.structs.fields(field.type)} for field in _fields(Settings)}
        self._values: dict[str, dict[str, Any]] = {name: {} for name in self._sections}
        self._places: dict[str, str] = {}

    def read_file(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigurationError([f"{path}: not UTF-8 text (byte {error.start})"]) from error
        except OSError as error:
            raise ConfigurationError([f"{path}: cannot be read: {error.strerror}"]) from error
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            at = re.search(r"at line (\d+)", str(error))
            line = int(at[1]) if at else len(text.splitlines())  # the parser says "at end of document"
            raise ConfigurationError([f"{path}, line {line}: not valid TOML: {error}"]) from error
        lines = _lines_of_keys(text)
        for section, content in document.items():
            place = _place(path, lines, section)
            if section not in self._sections:
                what = "section" if isinstance(content, dict) else "key outside any section"
                self.problems.append(f"{place}: {section}: unknown {what}{_suggest(section, self._sections)}")
            elif not isinstance(content, dict):
                self.problems.append(f"{place}: {section}: is a section; write [{section}] and its keys below it")
            else:
                for key, value in content.items():
                    self._take(section, key, value, _place(path, lines, f"{section}.{key}"), strict=True)

    def read_environment(self, environ: Mapping[str, str]) -> None:
        for variable in sorted(environ):
            value = environ[variable]
            # `SLUICE_X=` in a shell or a compose file means: not set
            if not variable.startswith("SLUICE_") or variable in OTHER_VARIABLES or not value:
                continue
            # No section has an underscore in its name, so one underscore is as clear as two
            section, _, key = variable.removeprefix("SLUICE_").lower().partition("_")
            key = key.removeprefix("_")
            if section not in self._sections or not key:
                self.problems.append(f"{variable} (environment): no such setting; {self._variable_like(variable)}")
                continue
            place = f"{variable} (environment)"
            if _CONTROL_CHARACTER.search(value):
                self.problems.append(f"{place}: {section}.{key}: contains a line end or another control character; check how it was set")
                continue
            field = self._sections[section].get(key)
            given: Any = value
            if field is not None and _is_list(field.type):
                given = [part.strip() for part in value.split(",") if part.strip()]
            self._take(section, key, given, place, strict=False)

    def _variable_like(self, variable: str) -> str:
        """What was probably meant: the key with its section left out, or the most alike."""
        known = {f"{section.upper()}__{key.upper()}": key.upper() for section, keys in self._sections.items() for key in keys}
        wanted = variable.removeprefix("SLUICE_").strip("_")
        meant = [name for name, key in known.items() if key == wanted] or difflib.get_close_matches(wanted, list(known), 1, 0.75)
        if meant:
            return f"did you mean SLUICE_{' or SLUICE_'.join(meant)}?"
        return f"variables are SLUICE_SECTION__KEY, and sections are {', '.join(section.upper() for section in self._sections)}"

    def _take(self, section: str, key: str, value: Any, place: str, *, strict: bool) -> None:
        name = f"{section}.{key}"
        field = self._sections[section].get(key)
        if field is None:
            self.problems.append(f"{place}: {name}: unknown key{_suggest(key, self._sections[section])}")
            return
        try:
            converted = msgspec.convert(value, field.type, strict=strict)
        except msgspec.ValidationError:
            got = "" if name in UNQUOTED_KEYS else f" (got {value!r:.80})"
            self.problems.append(f"{place}: {name}: must be {_expected(field.type)}{got}")
            return
        if isinstance(converted, str) and _CONTROL_CHARACTER.search(converted):
            self.problems.append(f"{place}: {name}: contains a line end or another control character")
            return
        if strict and name in SECRET_KEYS and converted:
            self.warnings.append(f"{place}: {name}: a secret in clear text; better set SLUICE_{section.upper()}__{key.upper()}")
        if strict and name in ("database.url", "redis.url") and _has_password(str(converted)):
            self.warnings.append(f"{place}: {name}: a password in clear text; better set SLUICE_{section.upper()}_{key.upper()}")
        self._values[section][key] = converted
        self._places[name] = place

    def build(self) -> Settings:
        sections = {field.name: field.type(**self._values[field.name]) for field in _fields(Settings)}
        settings = Settings(**sections)
        for name, reason in _contradictions(settings):
            self.problems.append(f"{self._places.get(name, 'defaults')}: {name}: {reason}")
        for name, reason in _unwise(settings):
            self.warnings.append(f"{self._places.get(name, 'defaults')}: {name}: {reason}")
        if self.problems:
            raise ConfigurationError(self.problems)
        return settings


def with_stores(settings: Settings, database_url: str, redis_url: str) -> Settings:
    """The same settings with the stores that were found: `embedded:` is replaced by where the private servers answer."""
    return msgspec.structs.replace(
        settings,
        database=msgspec.structs.replace(settings.database, url=database_url),
        redis=msgspec.structs.replace(settings.redis, url=redis_url),
    )


def state_directory(settings: Settings) -> Path:
    """Where this node keeps what must survive it. Not created here."""
    given = settings.node.state_directory
    if given:
        return Path(given).expanduser().absolute()
    if os.geteuid() == 0:
        return Path("/var/lib/sluice")
    base = os.environ.get("XDG_STATE_HOME", "")
    # The XDG specification tells to ignore a relative path
    return (Path(base) if base.startswith("/") else Path.home() / ".local" / "state") / "sluice"


def journal_root(settings: Settings) -> Path:
    """The directory with one journal directory per engine incarnation."""
    return _below(settings, settings.journal.directory, "journal")


def accounting_path(settings: Settings) -> Path:
    """The stem of the accounting files: `acct.csv` becomes `acct-YYYY-MM-DD-NNNN.csv` beside it."""
    return _below(settings, settings.accounting.path, "accounting/acct.csv")


def remote_path(settings: Settings) -> Path:
    """The same for rb and rs records."""
    return _below(settings, settings.accounting.remote_path, "accounting/remote.csv")


def feedback_path(settings: Settings) -> Path:
    """The same for f records."""
    return _below(settings, settings.accounting.feedback_path, "accounting/fbl.csv")


def key_path(settings: Settings) -> Path:
    """The file of the master key."""
    return _below(settings, settings.secrets.key_file, "secret.key")


def admin_key_path(settings: Settings) -> Path:
    """The file that keeps the API key of the local administrator."""
    return state_directory(settings) / "admin.key"


def node_name(settings: Settings) -> str:
    """The name of this machine in tables, records and keys."""
    return settings.node.name or socket.gethostname() or "localhost"


def _below(settings: Settings, given: str, default: str) -> Path:
    # A relative path would mean another place for every process that starts elsewhere
    return state_directory(settings) / Path(given or default).expanduser()


def _contradictions(settings: Settings) -> list[tuple[str, str]]:
    """Values that are fine alone but wrong together, or wrong in a way a type cannot say: (key, reason)."""
    found: list[tuple[str, str]] = []
    engine, journal, control, inbound = settings.engine, settings.journal, settings.control, settings.inbound
    if engine.lease_margin_seconds >= engine.lease_seconds:
        found.append(
            ("engine.lease_margin_seconds", f"must be less than lease_seconds ({engine.lease_seconds:g}), or no batch can be sent")
        )
    if engine.queue_low_batches > engine.queue_high_batches:
        found.append(("engine.queue_low_batches", f"must not be above queue_high_batches ({engine.queue_high_batches})"))
    if engine.metrics_port and engine.metrics_port + max(engine.processes, 1) - 1 > 65535:
        found.append(("engine.metrics_port", f"leaves no ports for {engine.processes} processes below 65536"))
    if journal.segment_bytes * 2 > journal.disk_budget_bytes:
        found.append(("journal.disk_budget_bytes", f"must hold at least two segments of {journal.segment_bytes} bytes"))
    if not re.fullmatch(r"[A-Za-z0-9._-]{0,200}", settings.node.name):
        found.append(("node.name", "must be letters, digits, dots, dashes and underscores"))
    if settings.node.state_directory and not settings.node.state_directory.startswith(("/", "~")):
        found.append(("node.state_directory", "must begin with / or ~: every process would take another place for it"))
    if settings.secrets.key and not re.fullmatch(r"[0-9a-fA-F]{64}", settings.secrets.key):
        found.append(("secrets.key", f"must be 64 hexadecimal digits, but has {len(settings.secrets.key)} characters or others among them"))
    if control.admin_key and len(control.admin_key) < MINIMUM_ADMIN_KEY_CHARACTERS:
        found.append(("control.admin_key", f"must have at least {MINIMUM_ADMIN_KEY_CHARACTERS} characters"))
    if control.admin_key and not re.fullmatch(r"[!-~]+", control.admin_key):
        found.append(("control.admin_key", "must be printable ASCII without spaces, because it travels in a header"))
    found += _url_problem("database.url", settings.database.url, DATABASE_SCHEMES)
    found += _redis_problem(settings.redis.url)
    found += _url_problem("inbound.public_url", inbound.public_url, ("http", "https"), embedded=False)
    if not settings.accounting.records:
        found.append(("accounting.records", "must name at least one of d, b, t"))
    listeners = [("control.port", control.host, control.port), ("inbound.http_port", inbound.http_host, inbound.http_port)]
    listeners += [
        (f"inbound.{name}", inbound.smtp_host, port)
        for name, port in (("smtp_port", inbound.smtp_port), ("submission_port", inbound.submission_port), ("lmtp_port", inbound.lmtp_port))
        if port
    ]
    for index, (name, host, port) in enumerate(listeners):
        if (not host or re.search(r"[\s/@]", host)) and name not in ("inbound.submission_port", "inbound.lmtp_port"):
            found.append((name.rpartition("port")[0] + "host", "must be a host name or an address"))
        for other, other_host, other_port in listeners[:index]:
            if port == other_port and (host == other_host or "0.0.0.0" in (host, other_host) or "::" in (host, other_host)):
                found.append((name, f"{port} is the same as {other}; two servers cannot listen on it"))
    found += [
        ("inbound.relay_domains", f"{domain!r:.80} is not a domain name") for domain in inbound.relay_domains if not _is_domain(domain)
    ]
    if inbound.tls_key_file and not inbound.tls_certificate_file:
        found.append(("inbound.tls_key_file", "is a key without a certificate; set inbound.tls_certificate_file, too"))
    found += [("inbound.proxy_addresses", reason) for each in inbound.proxy_addresses if (reason := _network_problem(each))]
    for each in inbound.mailboxes:
        try:
            mailbox.parse(each)
        except Invalid as error:
            found.append(("inbound.mailboxes", error.reason))
    return found + _mail_problems(settings.mail)


def _network_problem(text: str) -> str:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return f"{text!r:.80} is no address and no network such as 10.0.0.0/8"
    return ""


def _is_domain(text: str) -> bool:
    return bool(re.fullmatch(r"(?=.{1,253}$)([a-z0-9_]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z0-9-]{2,63}", text.lower()))


def _mail_problems(mail: Mail) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if not re.fullmatch(r"[ -~]{0,200}", mail.x_mailer) or mail.x_mailer != mail.x_mailer.strip():
        found.append(("mail.x_mailer", "must be at most 200 printable ASCII characters"))
    if is_web_address(mail.list_unsubscribe_to):
        found += _receiver_problem("mail.list_unsubscribe_to", mail.list_unsubscribe_to)
    for name in ("complaints_to", "cfbl_address", "list_unsubscribe_to"):
        address: str = getattr(mail, name)
        local, _, domain = address.replace("%sender_domain%", "a.example").rpartition("@")
        may_be_url = name == "list_unsubscribe_to"
        if may_be_url and is_web_address(address):
            continue
        if address and not (re.fullmatch(r"[A-Za-z0-9._+=-]{1,64}", local) and _is_domain(domain)):
            url = ", or a URL such as https://example.com/unsubscribed" if may_be_url else ""
            found.append((f"mail.{name}", f"must be an address, such as complaints@%sender_domain%{url}"))
    if mail.feedback_sender_id and not re.fullmatch(r"[A-Za-z0-9_-]{5,15}", mail.feedback_sender_id):
        found.append(("mail.feedback_sender_id", "must be 5 to 15 letters, digits, dashes and underscores"))
    found += [
        (f"mail.{name}", f"{domain!r:.80} is not a domain name")
        for name, domain in (("sender_domain", mail.sender_domain), ("catch_all_domain", mail.catch_all_domain))
        if domain and not _is_domain(domain)
    ]
    found += [
        ("mail.forbidden_from", f"{pattern!r:.80} matches no address; write one, with * for anything, such as *@hotmail.com")
        for pattern in mail.forbidden_from
        if not re.fullmatch(r"[^\s@]*@[^\s@]+|\*", pattern)
    ]
    return found


def _receiver_problem(name: str, url: str) -> list[tuple[str, str]]:
    """What is wrong with a URL that we post to."""
    if found := _url_problem(name, url, ("http", "https"), embedded=False):
        return found
    parts = urlsplit(url)
    shown = f"{parts.scheme}://{parts.hostname}{parts.path}"[:80]
    if "%sender_domain%" in url:
        return [(name, "is a URL and may not hold %sender_domain%: users choose that domain, and we would connect to it")]
    if parts.username is not None or parts.fragment:
        return [(name, f"{shown!r} may hold no user, password or fragment; each request is signed instead")]
    if not re.fullmatch(r"[!-~]{1,2000}", url):
        return [(name, f"{shown!r} must be at most 2000 printable ASCII characters; write others as %XX")]
    return []


def _unwise(settings: Settings) -> list[tuple[str, str]]:
    """Values that are allowed, but that most people do not mean: (key, advice)."""
    found: list[tuple[str, str]] = []
    if settings.engine.drain_timeout_seconds < 1:
        found.append(("engine.drain_timeout_seconds", "below 1 s a stop breaks mails that are on the wire, and they may be sent twice"))
    if settings.journal.fsync_interval_seconds > 5:
        found.append(
            ("journal.fsync_interval_seconds", "a power failure can lose the outcomes of that many seconds, and they are sent again")
        )
    if settings.control.host in ("0.0.0.0", "::"):
        found.append(("control.host", "the API is open to every network of this machine and has no TLS of its own; put a proxy before it"))
    return found


def _url_problem(name: str, url: str, schemes: tuple[str, ...], *, embedded: bool = True) -> list[tuple[str, str]]:
    if embedded and url == "embedded:":
        return []
    allowed = ", ".join([*(["embedded:"] if embedded else []), *(f"{scheme}://..." for scheme in schemes)])
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return [(name, f"is no URL, or its port is no number from 1 to 65535; it must be {allowed}")]
    if parts.scheme not in schemes or not url.startswith(f"{parts.scheme}://"):
        return [(name, f"must be {allowed}")]
    if port == 0 or (parts.scheme in ("http", "https", "rediss", "redis+cluster") and not parts.hostname):
        return [(name, "names no host or port 0")]
    return []


def _redis_problem(url: str) -> list[tuple[str, str]]:
    if found := _url_problem("redis.url", url, REDIS_SCHEMES):
        return found
    parts = urlsplit(url)
    # The client reads what is no number as database 0
    if parts.scheme in ("redis", "rediss") and parts.path.strip("/") and not parts.path.strip("/").isdecimal():
        return [("redis.url", "names its database by a number, such as redis://host:6379/0")]
    return []


def _has_password(url: str) -> bool:
    try:
        return bool(urlsplit(url).password)
    except ValueError:
        return False


def _fields(kind: type[msgspec.Struct]) -> tuple[msgspec.structs.FieldInfo, ...]:
    return msgspec.structs.fields(kind)


def _is_list(kind: Any) -> bool:
    return isinstance(msgspec.inspect.type_info(kind), msgspec.inspect.VarTupleType)


def _expected(kind: Any) -> str:
    """What a value of this type must be, for people."""
    info = msgspec.inspect.type_info(kind)
    if isinstance(info, msgspec.inspect.IntType | msgspec.inspect.FloatType):
        word = "a whole number" if isinstance(info, msgspec.inspect.IntType) else "a number"
        return f"{word} from {info.ge} to {info.le}" if info.ge is not None and info.le is not None else word
    if isinstance(info, msgspec.inspect.LiteralType):
        return f"one of {', '.join(str(value) for value in info.values)}"
    if isinstance(info, msgspec.inspect.VarTupleType):
        item = info.item_type
        if isinstance(item, msgspec.inspect.LiteralType):
            return f"a list of {', '.join(str(value) for value in item.values)}"
        return "a list of texts"
    return "text"


def _suggest(word: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


def _place(path: Path, lines: Mapping[str, int], name: str) -> str:
    return f"{path}, line {lines[name]}" if name in lines else str(path)


def _lines_of_keys(text: str) -> dict[str, int]:
    """Line numbers of `section` and `section.key`, as far as a plain reading finds them; for messages only."""
    found: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([A-Za-z0-9_.\"-]+)\s*\]", line):
            section = header[1].replace('"', "")
            found.setdefault(section, number)
        elif key := re.match(r"\s*([A-Za-z0-9_.\"-]+)\s*=", line):
            name = key[1].replace('"', "")
            found.setdefault(f"{section}.{name}" if section else name, number)
    return found
