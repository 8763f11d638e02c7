"""domain.connect_failure: when a certificate must be valid, which AUTH is chosen, what a failed handshake is called."""

import ssl

import pytest

from domain.connect_failure import checks_certificate, choose_auth, is_loopback, shown, tls_sentence


@pytest.mark.parametrize(
    ("host", "username", "checked"),
    [
        ("mail.example", "", True),
        ("mail.example", "ada", True),
        ("192.0.2.7", "", False),
        ("192.0.2.7", "ada", True),
        ("[2001:db8::7]", "ada", True),
        ("2001:db8::7", "", False),
        ("127.0.0.1", "ada", False),
        ("::1", "ada", False),
        ("LocalHost.", "ada", False),
        ("localhost.example", "", True),
    ],
)
def test_a_certificate_is_checked_wherever_somebody_could_be_in_between(host: str, username: str, checked: bool) -> None:
    assert checks_certificate(host, username) is checked


def test_loopback_is_an_address_or_the_one_name() -> None:
    assert [is_loopback(host) for host in ("127.8.8.8", "[::1]", "localhost", "10.0.0.1", "local")] == [True, True, True, False, False]


def test_the_password_goes_in_clear_only_inside_tls_or_where_nothing_else_is_had() -> None:
    every = ("login", "plain", "cram-md5", "xoauth2")
    assert choose_auth(every, encrypted=True) == "plain"
    assert choose_auth(every, encrypted=False) == "cram-md5"
    assert choose_auth(("login",), encrypted=False) == "login"
    assert choose_auth(("xoauth2",), encrypted=True) is None


def test_of_a_chain_of_exceptions_the_one_about_tls_is_named() -> None:
    inner = ssl.SSLError(1, "wrong version number")
    outer = OSError("it failed")
    outer.__cause__ = inner
    assert "TLS handshake with mail.example:25 failed" in tls_sentence("mail.example:25", outer)
    assert tls_sentence("m:25", ConnectionResetError()) == "m:25 closed the connection during the TLS handshake"
    assert tls_sentence("m:25", TimeoutError()) == "the TLS handshake with m:25 took too long"


def test_a_reply_is_one_clean_line() -> None:
    assert shown(550, "5.1.1 no\r\n\x1b[31msuch user") == "550 5.1.1 no   [31msuch user"
    assert shown(0, "hello") == "hello"
    assert len(shown(550, "x" * 5000)) <= 304
