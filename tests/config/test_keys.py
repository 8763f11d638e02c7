"""The master key: where it comes from, what is derived from it, and that sealed values open only where they belong."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from config import load
from config.keys import Keyring, load_keyring
from config.settings import Node, Secrets, Settings
from domain.errors import ConfigurationError, Invalid

MASTER = bytes(range(32))


def in_directory(path: Path) -> Settings:
    return Settings(node=Node(state_directory=str(path)))


def test_derived_keys_are_those_of_hkdf_sha256():
    for purpose in ("return-path", "unsubscribe", "message-id"):
        expected = HKDF(algorithm=hashes.SHA256(), length=32, salt=b"sluice", info=purpose.encode()).derive(MASTER)
        assert Keyring(MASTER).derive(purpose) == expected


def test_purposes_and_masters_give_different_keys():
    ring = Keyring(MASTER)
    keys = {ring.derive("a"), ring.derive("b"), Keyring(hashlib.sha256(MASTER).digest()).derive("a")}
    assert len(keys) == 3


def test_what_is_sealed_opens_in_its_context_only():
    ring = Keyring(MASTER)
    sealed = ring.seal(b"p\xc3\xa4ss word", b"delivery_servers/7")
    assert ring.open(sealed, b"delivery_servers/7") == b"p\xc3\xa4ss word"
    assert Keyring(MASTER).open(sealed, b"delivery_servers/7") == b"p\xc3\xa4ss word"
    assert ring.open(ring.seal(b"", b""), b"") == b""
    with pytest.raises(Invalid):
        ring.open(sealed, b"delivery_servers/8")
    with pytest.raises(Invalid):
        Keyring(hashlib.sha256(MASTER).digest()).open(sealed, b"delivery_servers/7")


def test_the_same_secret_is_never_sealed_the_same_way_twice():
    ring = Keyring(MASTER)
    assert len({ring.seal(b"x", b"c") for _ in range(100)}) == 100


def test_a_sealed_value_that_was_changed_or_cut_is_refused_at_every_byte():
    ring = Keyring(MASTER)
    sealed = ring.seal(b"secret", b"c")
    for place in range(len(sealed)):
        for bad in (sealed[:place], sealed[:place] + bytes([sealed[place] ^ 1]) + sealed[place + 1 :]):
            with pytest.raises(Invalid) as caught:
                ring.open(bad, b"c")
            assert "secret'" not in str(caught.value)


def test_neither_repr_nor_errors_show_the_key():
    ring = Keyring(MASTER)
    assert MASTER.hex() not in repr(ring)
    assert len(ring.fingerprint) == 8
    with pytest.raises(Invalid) as caught:
        Keyring(MASTER[:31])
    assert MASTER[:31].hex() not in str(caught.value)


def test_the_key_of_the_settings_wins_over_the_file(tmp_path):
    settings = Settings(node=Node(state_directory=str(tmp_path)), secrets=Secrets(key=MASTER.hex()))
    assert load_keyring(settings).fingerprint == Keyring(MASTER).fingerprint
    assert list(tmp_path.iterdir()) == []


def test_the_key_file_is_made_once_and_closed_to_others(tmp_path):
    settings = in_directory(tmp_path / "new" / "state")
    first = load_keyring(settings)
    path = load.key_path(settings)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_keyring(settings).fingerprint == first.fingerprint
    assert [entry.name for entry in path.parent.iterdir()] == ["secret.key"]


def test_processes_that_start_together_agree_on_one_key(tmp_path):
    code = "import sys; from config import keys, load; print(keys.load_keyring(load.load()).derive('x').hex())"
    environ = os.environ | {"SLUICE_NODE__STATE_DIRECTORY": str(tmp_path)}
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environ) for _ in range(4)]
    keys = {process.communicate(timeout=60)[0] for process in started}
    assert len(keys) == 1
    assert len(keys.pop().strip()) == 64


@pytest.mark.parametrize(
    ("content", "mode", "reason"),
    [
        ("ab" * 31, 0o600, "does not hold 64 hexadecimal digits"),
        ("", 0o600, "does not hold 64 hexadecimal digits"),
        ("zz" * 32, 0o600, "does not hold 64 hexadecimal digits"),
        ("ab" * 32, 0o640, "open to other users (mode 0640); chmod 600 it"),
    ],
)
def test_a_bad_key_file_is_refused_and_left_alone(tmp_path, content, mode, reason):
    path = tmp_path / "secret.key"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(ConfigurationError) as caught:
        load_keyring(in_directory(tmp_path))
    assert reason in caught.value.problems[0]
    assert "ab" * 8 not in caught.value.problems[0]
    assert path.read_text() == content


def test_a_key_file_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="secrets.key_file: .* cannot be"):
        load_keyring(in_directory(tmp_path / "file"))
