"""The one secret of an installation and everything derived from it.

The master key is 32 random bytes. Each purpose ("return-path", "unsubscribe", "message-id", "seal" ...) gets a key of its own
by HKDF-SHA256 (RFC 5869), so a key that leaks tells nothing about the others. Small secrets such as passwords of delivery
servers are sealed with AES-256-GCM; the context (which row, which column) is authenticated, so a sealed value cannot be
moved to another row. No error shows key or plain text (S11).
"""

import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from config import load
from config.settings import Settings
from domain.errors import ConfigurationError, Invalid

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
SEAL_VERSION = b"\x01"  # first byte of a sealed value: AES-256-GCM under the key of the purpose "seal"
_SALT = b"sluice"


class Keyring:
    """Derives keys and seals secrets under one master key. `repr` shows a fingerprint only."""

    __slots__ = ("_aead", "_derived", "_extracted")

    def __init__(self, master: bytes) -> None:
        if len(master) != KEY_BYTES:
            raise Invalid("secrets.key", f"must be {KEY_BYTES} bytes, not {len(master)}")
        self._extracted = hmac.digest(_SALT, master, hashlib.sha256)  # HKDF-Extract
        self._derived: dict[str, bytes] = {}
        self._aead = AESGCM(self.derive("seal"))

    def __repr__(self) -> str:
        return f"Keyring({self.fingerprint})"

    @property
    def fingerprint(self) -> str:
        """8 hex digits that are the same on nodes with the same key; they tell nothing about it."""
        return self.derive("fingerprint")[:4].hex()

    def derive(self, purpose: str) -> bytes:
        """The 32-byte key of one purpose; always the same for the same master key."""
        key = self._derived.get(purpose)
        if key is None:
            # HKDF-Expand for one block: T(1) = HMAC(PRK, info | 0x01)
            key = self._derived[purpose] = hmac.digest(self._extracted, purpose.encode() + b"\x01", hashlib.sha256)
        return key

    def seal(self, plain: bytes, context: bytes) -> bytes:
        """version byte, 12 random bytes, AES-256-GCM of `plain` with 16 bytes of tag; `context` is needed again to open it."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        return SEAL_VERSION + nonce + self._aead.encrypt(nonce, plain, SEAL_VERSION + context)

    def open(self, sealed: bytes, context: bytes) -> bytes:
        """What was sealed. Raises Invalid when it was sealed with another key, for another context, or was changed."""
        if len(sealed) < 1 + NONCE_BYTES + TAG_BYTES or sealed[:1] != SEAL_VERSION:
            raise Invalid("secret", f"is not a sealed value of this version ({len(sealed)} bytes)")
        try:
            return self._aead.decrypt(sealed[1 : 1 + NONCE_BYTES], sealed[1 + NONCE_BYTES :], SEAL_VERSION + context)
        except InvalidTag:
            raise Invalid("secret", "cannot be opened: sealed with another secrets.key or changed since; enter it again") from None


def load_keyring(settings: Settings) -> Keyring:
    """The keyring of this node: `secrets.key`, else the key file, which is made on first start.

    Raises ConfigurationError when the file cannot be read or made, holds no key, or is open to other users.
    """
    if settings.secrets.key:
        try:
            master = bytes.fromhex(settings.secrets.key)
        except ValueError:
            master = b""
        if len(master) != KEY_BYTES:
            raise ConfigurationError([f"secrets.key: must be {KEY_BYTES * 2} hexadecimal digits"])
        return Keyring(master)
    path = load.key_path(settings)
    try:
        return Keyring(_read(path))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ConfigurationError([f"secrets.key_file: {path} cannot be read: {error.strerror}"]) from error
    try:
        _create(path)
        return Keyring(_read(path))
    except OSError as error:
        raise ConfigurationError(
            [f"secrets.key_file: {path} cannot be made: {error.strerror}; name a file in a writable directory"]
        ) from error


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        text = file.read(4096)
    if mode & 0o077:
        raise ConfigurationError([f"secrets.key_file: {path} is open to other users (mode {mode & 0o777:04o}); chmod 600 it"])
    try:
        key = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigurationError([f"secrets.key_file: {path} does not hold {KEY_BYTES * 2} hexadecimal digits; restore it from the backup"])
    return key


def _create(path: Path) -> None:
    """Make a key file, whole or not at all. Several processes may do it at once: the first one's stays, all then read that one."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_hex(KEY_BYTES).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        # Unlike rename, link never replaces the key of somebody who was faster
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    finally:
        aside.unlink(missing_ok=True)
