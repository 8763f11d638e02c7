"""AUTH on the submission port (RFC 4954): PLAIN and LOGIN, where nobody else hears the password, three tries a session."""

import binascii
import ipaddress
from typing import Any, Final

import structlog

from domain.errors import Unavailable
from inbound.door import Account, Door, Refused

log = structlog.get_logger(__name__)

MAX_SIGN_INS: Final = 3  # that fail


class SignIn:
    """The part of a session that learns who the client is. `account` is None until it has said so."""

    account: Account | None = None
    _failed = 0

    # what it needs of the rest of the session
    peer: str
    session: Any
    envelope: Any
    _door: Door
    _encrypted: bool
    _reader: Any
    push: Any
    _reset_timeout: Any

    def may_sign_in(self) -> bool:
        """Whether a password that is said here is heard by nobody else."""
        submissions = self._door.submissions
        if submissions is None:
            return False
        return self._encrypted or (submissions.clear_from_loopback and bool(self.peer) and ipaddress.ip_address(self.peer).is_loopback)

    async def smtp_AUTH(self, arg: str | None) -> None:
        submissions = self._door.submissions
        mechanism, _, initial = (arg or "").partition(" ")
        if submissions is None:
            await self.push("502 5.5.1 This server takes no credentials")
        elif not self.session.extended_smtp or not self.session.host_name:
            await self.push("503 5.5.1 Say EHLO first")
        elif self.account is not None or self.envelope.mail_from:
            await self.push("503 5.5.1 Sign in once, before MAIL")
        elif not self.may_sign_in():
            await self.push("538 5.7.11 Say STARTTLS first")
        elif mechanism.upper() == "PLAIN":
            words = (await self._answer("", initial)).split("\0")  # RFC 4616: who to act as, name, password
            if len(words) != 3 or words[0] not in ("", words[1]):
                raise Refused("501 5.5.2 AUTH PLAIN: not what RFC 4616 says")
            await self._check(words[1], words[2])
        elif mechanism.upper() == "LOGIN":
            await self._check(await self._answer("VXNlcm5hbWU6", initial), await self._answer("UGFzc3dvcmQ6", ""))
        else:
            await self.push("504 5.5.4 Say AUTH PLAIN or AUTH LOGIN")

    async def _answer(self, challenge: str, initial: str) -> str:
        """What the client says to a challenge. Raises Refused when it gives up, or says no base64 of UTF-8."""
        if not initial:
            await self.push(f"334 {challenge}")
            self._reset_timeout()
            initial = (await self._reader.readuntil()).decode("ascii", "replace").rstrip("\r\n")
        if initial == "*":
            raise Refused("501 5.7.0 Given up")
        try:
            return binascii.a2b_base64("" if initial == "=" else initial, strict_mode=True).decode("utf-8")
        except ValueError:
            raise Refused("501 5.5.2 Not base64 of UTF-8") from None

    async def _check(self, name: str, password: str) -> None:
        assert self._door.submissions is not None
        try:
            self.account = await self._door.submissions.sign_in(name, password)
        except Unavailable as failure:
            log.warning("nobody can sign in now", reason=str(failure))
            await self.push("454 4.7.0 Cannot check it now, try again later")
            return
        if self.account is not None:
            await self.push("235 2.7.0 Welcome")
            return
        self._failed += 1
        log.warning("a sign-in failed", peer=self.peer, name=name[:100])
        if self._failed >= MAX_SIGN_INS:
            raise Refused("421 4.7.0 Too many wrong passwords")
        await self.push("535 5.7.8 Wrong name or password; the password is an API key of user scope")
