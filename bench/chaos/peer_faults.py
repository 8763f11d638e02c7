"""Faults of the receiving side and of the links to it (rows 18-33): answers scripted at run time, and links that do what networks do."""

import re

from bench.chaos.fault import Fault, Scene, Step
from bench.chaos.proxy import Weather

_VICTIM = re.compile(r"l\d+\.\d+\.\d*7@")  # one recipient in ten
_VICTIMS_GLOB = "l*.*.*7@*"


def is_victim(address: str) -> bool:
    """Whether the rules that refuse for good mean this address."""
    return _VICTIM.match(address) is not None


def _script(*rules: dict[str, object], one: bool = False) -> Step:
    """Rules for both sinks, or for `one` of them, chosen by the seed."""

    async def step(scene: Scene) -> None:
        sinks = (scene.rng.randrange(2),) if one else (0, 1)
        await scene.fleet.script(list(rules), sinks)

    return step


async def no_script(scene: Scene) -> None:
    """The sinks answer as usual."""
    await scene.fleet.script([])


def _rule(stage: str, action: str, percent: float, **more: object) -> dict[str, object]:
    return {"stage": stage, "action": action, "percent": percent, **more}


def _reply(stage: str, reply: str, percent: float = 100.0, **more: object) -> dict[str, object]:
    return {"stage": stage, "reply": reply, "percent": percent, **more}


def _weather(weather: Weather, *, count: int = 4) -> Step:
    """What happens to the links of `count` delivery servers, chosen by the seed."""

    async def step(scene: Scene) -> None:
        for link in scene.rng.sample(scene.fleet.smtp_links, count):
            await link.set(weather)

    return step


async def refuse_and_reset(scene: Scene) -> None:
    """Nobody listens at one delivery server, and its connections are gone."""
    link = scene.rng.choice(scene.fleet.smtp_links)
    await link.set(Weather(refuse=True))
    link.reset()


async def reset_at_accept(scene: Scene) -> None:
    """Every new connection to half of the delivery servers is reset; the old ones too."""
    for link in scene.rng.sample(scene.fleet.smtp_links, 2):
        await link.set(Weather(reset_new=True))
        link.reset()


async def cut_old_connections(scene: Scene) -> None:
    """Connections must be opened anew to meet a fault of the greeting."""
    for link in scene.fleet.smtp_links:
        link.reset()


def _greeting(*rules: dict[str, object]) -> Step:
    """A script of the greeting, and connections that have to be opened anew."""

    async def step(scene: Scene) -> None:
        await _script(*rules, one=True)(scene)
        await cut_old_connections(scene)

    return step


async def heal_links(scene: Scene) -> None:
    """Fair weather, no script."""
    for link in scene.fleet.smtp_links:
        await link.heal()
    if scene.fleet.sinks:
        await scene.fleet.script([])


async def operator_acts(scene: Scene) -> None:
    """The password is right again, and an operator has saved the delivery servers: an engine does not go on trying by itself (row 33)."""
    await heal_links(scene)
    pool = scene.fleet.pool
    await pool.execute("update delivery_servers set version = version + 1 where id = any($1)", scene.fleet.server_ids)
    await pool.execute("update egress_version set version = version + 1")


_OWN_SINK = frozenset({"own-sink"})
_LINKS = frozenset({"proxied"})
_BOTH = _OWN_SINK | _LINKS
_TLS = _BOTH | {"starttls"}


def _scripted(name: str, row: int, about: str, *rules: dict[str, object], refuses: bool = False, heal_limit: float = 60.0) -> Fault:
    return Fault(
        name=name, row=row, about=about, inject=_script(*rules), heal=no_script, hold=(3.0, 5.0), duplicates="named", needs=_OWN_SINK,
        mixed=heal_limit <= 60.0 and not refuses, heal_limit=heal_limit, may_refuse=is_victim if refuses else None,
    )  # fmt: skip


def _linked(name: str, row: int, about: str, inject: Step, *, hold: tuple[float, float] = (3.0, 5.0), heal_limit: float = 60.0) -> Fault:
    return Fault(name=name, row=row, about=about, inject=inject, heal=heal_links, hold=hold, duplicates="named", needs=_LINKS,
                 heal_limit=heal_limit, mixed=True)  # fmt: skip


def _greeted(name: str, row: int, about: str, *rules: dict[str, object], tls: bool = False, heal_limit: float = 60.0) -> Fault:
    return Fault(name=name, row=row, about=about, inject=_greeting(*rules), heal=heal_links, hold=(3.0, 5.0), duplicates="named",
                 needs=_TLS if tls else _BOTH, heal_limit=heal_limit)  # fmt: skip


FAULTS = (
    _linked("smtp-refused", 18, "connection refused", refuse_and_reset),
    _linked("smtp-reset-at-accept", 18, "reset at accept", reset_at_accept),
    _greeted("banner-hangs", 18, "no banner", _rule("banner", "hang", 100)),
    _greeted("banner-421", 18, "421 for a banner", _reply("banner", "421 4.3.2 Not now")),
    _greeted("banner-554", 18, "554 for a banner", _reply("banner", "554 5.3.2 No service here"), heal_limit=90.0),
    _greeted("ehlo-hangs", 19, "no answer to EHLO", _rule("ehlo", "hang", 50)),
    _scripted("mail-hangs", 19, "no answer to MAIL", _rule("mail", "hang", 2)),
    _scripted("rcpt-hangs", 19, "no answer to RCPT", _rule("rcpt", "hang", 1)),
    _scripted("data-hangs", 19, "no answer to DATA", _rule("data", "hang", 1)),
    _scripted("dot-hangs", 19, "no answer to the dot", _rule("dot", "hang", 0.3), heal_limit=80.0),
    _scripted("mail-drops", 20, "closed at MAIL", _rule("mail", "drop", 2)),
    _scripted("rcpt-drops", 20, "closed at RCPT", _rule("rcpt", "drop", 2)),
    _scripted("data-resets", 20, "reset at DATA", _rule("data", "reset", 2)),
    _scripted("body-drops", 20, "closed in the content", _rule("body", "drop", 2)),
    _scripted("dot-resets", 20, "reset at the dot, nothing taken", _rule("dot", "reset", 2)),
    _scripted("accepted-drops", 21, "taken, then closed", _rule("accepted", "drop", 2)),
    _scripted("accepted-resets", 21, "taken, then reset", _rule("accepted", "reset", 2)),
    _scripted("accepted-hangs", 21, "taken, then silence", _rule("accepted", "hang", 0.3), heal_limit=80.0),
    _scripted("rcpt-421", 22, "421 in a group", _reply("rcpt", "421 4.3.2 Later", 2)),
    _scripted("mail-421", 22, "421 to MAIL", _reply("mail", "421 4.3.2 Later", 2)),
    _scripted("dot-250-421", 22, "250 and 421 together", _rule("dot", "bye", 5)),
    _scripted("rcpt-550", 23, "one recipient in ten refused", _reply("rcpt", "550 5.1.1 No such mailbox", recipient=_VICTIMS_GLOB),
              refuses=True),
    _scripted("data-354-no-recipient", 23, "354 although nobody was accepted", _rule("rcpt", "norcpt354", 100, recipient=_VICTIMS_GLOB),
              refuses=True),
    _scripted("data-250", 23, "250 to DATA", _rule("data", "wrong", 2)),
    _scripted("dot-554", 23, "content of one in ten refused", _reply("dot", "554 5.7.1 Content refused", recipient=_VICTIMS_GLOB),
              refuses=True),
    _scripted("dot-double", 24, "the answer twice", _rule("dot", "double", 2)),
    _scripted("rcpt-double", 24, "the answer to RCPT twice", _rule("rcpt", "double", 2)),
    _scripted("mail-double", 24, "the answer to MAIL twice", _rule("mail", "double", 2)),
    _scripted("unsolicited-line", 24, "a line nobody asked for", _rule("dot", "extra", 2)),
    _scripted("dot-garbage", 24, "no reply but garbage", _rule("dot", "garbage", 2)),
    _scripted("dot-bare-lf", 24, "a bare LF", _rule("dot", "lf", 2)),
    _scripted("rcpt-wrong", 24, "354 to RCPT", _rule("rcpt", "wrong", 2)),
    _scripted("dot-wrong", 24, "354 to the dot", _rule("dot", "wrong", 2)),
    _scripted("split-replies", 25, "one octet a segment", _rule("dot", "split", 100)),
    _scripted("many-lines", 25, "30-line replies", _rule("rcpt", "multi", 100)),
    _scripted("short-replies", 25, "codes without text", _rule("dot", "short", 100)),
    _greeted("banner-flood", 26, "16 MiB of banner", _rule("banner", "flood", 20)),
    _scripted("dot-flood", 26, "16 MiB of reply", _rule("dot", "flood", 0.3)),
    _scripted("rcpt-huge", 26, "one line of 1 MiB", _rule("rcpt", "huge", 1)),
    _scripted("slow-replies", 27, "50 ms a reply", _rule("rcpt", "slow", 100, milliseconds=50)),
    _linked("narrow-link", 27, "2 kB/s at one delivery server", _weather(Weather(octets_per_second=2000.0), count=1)),
    _scripted("body-stalls", 28, "stops reading in the content", _rule("body", "stall", 1)),
    _linked("smtp-stalled", 28, "windows of one delivery server fill up", _weather(Weather(stalled=True), count=1)),
    _linked("smtp-half-open", 29, "nothing arrives either way", _weather(Weather(lose_up=True, lose_down=True))),
    _linked("smtp-replies-lost", 29, "mail arrives, replies do not", _weather(Weather(lose_down=True), count=2)),
    _linked("smtp-slow", 29, "200 ms each way", _weather(Weather(delay_seconds=0.2))),
    _scripted("greylist", 31, "451 until 2 s after the first try", _reply("rcpt", "451 4.7.1 Greylisted", 30, grey_seconds=2)),
    _scripted("rate-451", 31, "451 beyond 50 a second", _reply("rcpt", "451 4.7.1 Too fast", per_second=50)),
    _scripted("too-many-452", 31, "452 too many recipients", _reply("rcpt", "452 4.5.3 Too many recipients", 10)),
    _scripted("quota-552", 31, "552 mailbox full", _reply("rcpt", "552 5.2.2 Mailbox full", recipient=_VICTIMS_GLOB), refuses=True),
    _greeted("starttls-454", 32, "454 to STARTTLS", _reply("starttls", "454 4.7.0 TLS not available"), tls=True, heal_limit=90.0),
    _greeted("starttls-injected", 32, "a reply injected before TLS", _rule("starttls", "extra", 100), tls=True, heal_limit=90.0),
    _greeted("handshake-garbage", 32, "garbage for the handshake", _rule("handshake", "garbage", 100), tls=True, heal_limit=90.0),
    _greeted("handshake-drops", 32, "closed in the handshake", _rule("handshake", "drop", 100), tls=True, heal_limit=90.0),
    _greeted("handshake-hangs", 32, "silence in the handshake", _rule("handshake", "hang", 50), tls=True, heal_limit=90.0),
    _greeted("auth-temporary", 33, "454 to AUTH", _reply("auth", "454 4.7.0 Temporary failure"), tls=True, heal_limit=90.0),
    Fault(
        name="auth-refused", row=33, about="535 to AUTH, until an operator acts", inject=_greeting(_reply("auth", "535 5.7.8 No")),
        heal=operator_acts, hold=(3.0, 5.0), duplicates="named", needs=_TLS,
    ),
    _greeted("auth-drops", 33, "closed at AUTH", _rule("auth", "drop", 100), tls=True, heal_limit=90.0),
)  # fmt: skip
