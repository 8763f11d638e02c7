"""compose.dkim_keys: which private keys are taken, and what is said of those that are not (bad input 43)."""

import functools

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

from compose import dkim_keys
from domain.errors import Invalid

Key = rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey | ec.EllipticCurvePrivateKey

# 512 bits can no longer be made by the library: from `openssl genrsa 512`
RSA_512 = """-----BEGIN PRIVATE KEY-----
MIIBVAIBADANBgkqhkiG9w0BAQEFAASCAT4wggE6AgEAAkEA0zog4B2ou4GOxAGs
2qRBE2Y23fhvO2Y4Qu+Ge1CM3LQUiXi4l3QBgToyibAQcT/0+I27co6ECATN2y+c
0uAyUQIDAQABAkAhCtrRtFIM4vt+VfTATymO61Jx7scXt6ndbrLO347ph0kob30z
gPZZYDKgzwUc3CvrmgQN4eGVinfz91wRpcSxAiEA+ufdBQaI1xYUna6V3h84FdhW
KOeEk0+WFXM4lnXvPZcCIQDXhAbVwE8aLdreccjYB3xqXkvB4+LmP0XuSDglzRBc
VwIgYpM9zn+mu3o9V0YEM2RokIySLTfoakfWW08NaG+lMrkCIQDD0+XaCFpYMV51
TfLvyS2WAYTY81dTXB8Q+3J5drHtFQIgXjbPUyqqcWy6w8KYzzvB6QIisSOmENl5
QAJd4LFlAdY=
-----END PRIVATE KEY-----
"""


def pem(key: Key, *, traditional: bool = False, password: bytes = b"") -> str:
    form = serialization.PrivateFormat.TraditionalOpenSSL if traditional else serialization.PrivateFormat.PKCS8
    lock = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, form, lock).decode()


@functools.cache
def rsa_key(bits: int) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, bits)


@pytest.mark.parametrize("traditional", [False, True])
def test_rsa_keys_are_taken_in_both_pem_forms(traditional):
    found = dkim_keys.read_pem("Bag attributes\n" + pem(rsa_key(2048), traditional=traditional).replace("\n", "\r\n"))
    assert (found.algorithm, found.bits) == ("rsa-sha256", 2048)
    parsed = dkim_keys.parse(found.private_key)
    assert isinstance(parsed, rsa.RSAPrivateKey)
    assert parsed.private_numbers() == rsa_key(2048).private_numbers()
    assert dkim_keys.signature_octets(parsed) == 256


def test_ed25519_keys_are_taken():
    made = ed25519.Ed25519PrivateKey.generate()
    found = dkim_keys.read_pem(pem(made))
    assert (found.algorithm, found.bits, found.public_key) == ("ed25519-sha256", 256, made.public_key().public_bytes_raw())


def test_a_key_of_1024_bits_is_taken_with_a_warning():
    found = dkim_keys.read_pem(pem(rsa_key(1024)))
    assert "2048" in dkim_keys.warnings(found.algorithm, found.bits)[0]
    assert dkim_keys.warnings("rsa-sha256", 2048) == []


def test_ed25519_comes_with_the_advice_to_keep_rsa_beside_it():
    assert "RSA" in dkim_keys.warnings("ed25519-sha256", 256)[0]


GOOD = pem(rsa_key(2048))
LINES = GOOD.splitlines()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is no PEM text"),
        ("v=DKIM1; k=rsa; p=AAAA", "is no PEM text"),
        ("x" * 30_000, "is longer than"),
        ("\n".join(LINES[:10]), "is cut off"),
        ("\n".join([*LINES[:10], LINES[-1]]), "damaged or cut off"),
        (GOOD.replace(LINES[3], "!" * 64), "damaged or cut off"),
        (pem(rsa_key(2048), password=b"secret"), "protected by a password"),
        (pem(rsa_key(2048), traditional=True, password=b"secret"), "protected by a password"),
        (pem(ec.generate_private_key(ec.SECP256R1())), "must be RSA or Ed25519"),
        (pem(ec.generate_private_key(ec.SECP256R1()), traditional=True), "must be RSA or Ed25519"),
        (pem(ed448.Ed448PrivateKey.generate()), "must be RSA or Ed25519"),
        (
            rsa_key(2048).public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            ).decode(),
            "holds a public key",
        ),
        ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "holds a certificate"),
        ("-----BEGIN PRIVATE KEY-----\n\ud800\n-----END PRIVATE KEY-----\n", "damaged or cut off"),
        (
            rsa_key(2048).private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
            ).decode(),
            "OpenSSH",
        ),
    ],
)  # fmt: skip
def test_other_keys_are_refused_with_the_reason_and_without_the_key(text, reason):
    with pytest.raises(Invalid, match=reason) as refusal:
        dkim_keys.read_pem(text)
    assert refusal.value.field == "private_key"
    assert refusal.value.value is None
    assert not any(line in str(refusal.value) for line in text.splitlines()[1:] if len(line) > 8)


def test_rsa_below_1024_bits_is_refused():
    with pytest.raises(Invalid, match=r"512 bits.*RFC 8301"):
        dkim_keys.read_pem(RSA_512)


def test_sizes_that_are_not_offered_are_refused():
    for bits in (512, 1536, 8192):
        with pytest.raises(Invalid, match="bits"):
            dkim_keys.make("rsa-sha256", bits)
    assert dkim_keys.make("rsa-sha256").bits == 2048
    assert dkim_keys.make("ed25519-sha256").bits == 256


def test_a_damaged_stored_key_says_so():
    with pytest.raises(ValueError):
        dkim_keys.parse(b"not a key")
    with pytest.raises(ValueError, match="neither"):
        dkim_keys.parse(ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))  # fmt: skip
