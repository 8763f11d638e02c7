"""The exception tree of Sluice.

A refusal by a peer is a value (`domain.reply.SmtpReply`), never an exception. Exceptions are for input we refuse,
a broken link, a broken peer, or a bug of ours. Every message says what was wrong and, where it can, what to do.
"""


class SluiceError(Exception):
    """Root of every exception Sluice raises on purpose."""


class Invalid(SluiceError):
    """Input that is refused. `field` names it the way the caller wrote it (`limits.max_connections`, `row 7: email`)."""

    def __init__(self, field: str, reason: str, value: object = None) -> None:
        self.field = field
        self.reason = reason
        self.value = value
        shown = "" if value is None else f" (got {value!r:.120})"
        super().__init__(f"{field}: {reason}{shown}")


class NotFound(SluiceError):
    """There is no such thing, or it belongs to somebody else: both look the same from outside (S10)."""

    def __init__(self, kind: str, identity: object) -> None:
        self.kind = kind
        self.identity = identity
        super().__init__(f"there is no {kind} {identity!r:.80}")


class Conflict(SluiceError):
    """The thing exists, but not in a state that allows this."""


class Unavailable(SluiceError):
    """A store we need does not answer; trying again later is right."""


class ConfigurationError(SluiceError):
    """Settings that are refused whole. `problems` are sentences of the form `file: key: reason`."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class ConnectFailed(SluiceError):
    """No usable SMTP session could be opened. `stage` is one of resolve, connect, tls, greeting, ehlo, auth.

    `permanent` tells that waiting alone will not help (wrong password, TLS required but not offered): an operator must act.
    """

    def __init__(self, stage: str, sentence: str, *, permanent: bool = False, reply: str = "") -> None:
        self.stage = stage
        self.permanent = permanent
        self.reply = reply
        super().__init__(sentence)


class JournalError(SluiceError):
    """The journal cannot be written or read; nothing may be sent until it can (R5)."""
