"""inbound.triage: what a message is; bounds on what reading one costs."""

import base64
import pathlib
import quopri
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import score_bounces
from inbound.mime_reader import MAX_PARTS, Reader, decode, without_tags
from inbound.triage import read

CORPUS = pathlib.Path(__file__).parents[3] / "shared" / "corpus"
STATUS = (
    b"Reporting-MTA: dns; mx.b.example\n\nFinal-Recipient: rfc822;anna@b.example\nAction: failed\nStatus: 5.1.1\n"
    b"Diagnostic-Code: smtp; 550 5.1.1 User unknown\n"
)
WRAP = b'Content-Type: multipart/mixed; boundary="o"\n\n--o\n\nSee below.\n--o\nContent-Type: message/rfc822\n\n'


def report(status: bytes = STATUS, encoding: bytes = b"7bit", outer: bytes = b"From: MAILER-DAEMON@b.example\nReturn-Path: <>\n") -> bytes:
    return (
        outer + b"Subject: Undelivered\nMIME-Version: 1.0\nContent-Type: multipart/report; report-type=delivery-status;"
        b' boundary="=_b"\n\n'
        b"--=_b\nContent-Type: text/plain\n\nIt failed.\n--=_b\n"
        b"Content-Type: message/delivery-status\nContent-Transfer-Encoding: " + encoding + b"\n\n"
        + status + b"\n--=_b\nContent-Type: text/rfc822-headers\n\nTo: anna@b.example\nFeedback-ID: t:1\n--=_b--\n"
    )  # fmt: skip


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("encoding", ["7bit", "base64", "quoted-printable"])
def test_an_encoded_report_reads_as_a_plain_one(encoding: str, end: bytes) -> None:
    coded = {"7bit": STATUS, "base64": base64.encodebytes(STATUS), "quoted-printable": quopri.encodestring(STATUS)}[encoding]
    got = read(report(coded, encoding.encode()).replace(b"\n", end))
    assert (got.kind, got.action, [failure.recipient for failure in got.failed]) == ("dsn", "failed", ["anna@b.example"])
    assert got.failed[0].means.hard
    assert got.returned[b"feedback-id"] == b"t:1"


def test_a_report_somebody_forwards_is_not_a_report() -> None:
    outer = b"From: anna@b.example\nSubject: Fwd: what is this\n" + WRAP
    assert read(outer + report() + b"\n--o--\n").kind in ("reply", "other")


def test_the_parts_of_a_report_in_a_person_s_mail_are_not_a_report() -> None:
    parts = report(outer=b"From: anna@b.example\n").replace(b"Subject: Undelivered", b"Subject: Fwd: Undelivered")
    assert read(parts.replace(b"multipart/report", b"multipart/mixed")).kind in ("reply", "other")


def test_a_report_a_gateway_wraps_is_one() -> None:
    outer = b"From: MAILER-DAEMON@gw.example\nReturn-Path: <>\nSubject: Undelivered\n" + WRAP
    assert [failure.recipient for failure in read(outer + report() + b"\n--o--\n").failed] == ["anna@b.example"]


def test_a_delay_is_never_hard_and_success_is_no_failure() -> None:
    delayed = read(report(STATUS.replace(b"failed", b"delayed").replace(b"5.1.1", b"4.1.1")))
    assert (delayed.action, delayed.failed, [item.means.hard for item in delayed.delayed]) == ("delayed", (), [False])
    assert read(report(STATUS.replace(b"failed", b"delivered"))).action == "delivered"


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        ("From: a@b.example\nSubject: Out of office: Re: news\nAuto-Submitted: auto-replied", "autoreply"),
        ("From: a@b.example\nSubject: Abwesenheitsnotiz", "autoreply"),
        ("From: a@b.example\nSubject: 自動返信: Re: news", "autoreply"),
        ("From: a@b.example\nSubject: Re: your offers\nIn-Reply-To: <m1@sluice.example>", "reply"),
        ("From: a@b.example\nSubject: Re: your offers\nX-Autoreply: yes", "autoreply"),
        ("From: a@b.example\nSubject: unsubscribe", "unsubscribe"),
        ("From: a@b.example\nSubject: Please confirm your message", "challenge"),
        ("From: shop@b.example\nSubject: Delivery failed: your parcel\nList-Unsubscribe: <https://b.example>", "other"),
        ("From: news@b.example\nSubject: Why mail bounces\nList-Id: <l.b.example>", "other"),
        ("From: noreply@b.example\nSubject: Your delivery is delayed", "other"),
    ],
)
def test_what_is_not_a_bounce(header: str, kind: str) -> None:
    assert (
        read(f"{header}\nMIME-Version: 1.0\nContent-Type: text/plain; charset=utf-8\n\nHello, 550 things were returned.\n".encode()).kind
        == kind
    )


AWAY = (
    "Automatische Antwort: Angebote", "Réponse automatique : offres",
    "Respuesta automática: ofertas", "Resposta automática", "Risposta automatica",
    "Automatisch antwoord: post", "Odpowiedź automatyczna", "Nieobecność", "自動応答: お知らせ", "不在通知",
    "부재중 알림", "자동 회신", "自动回复: 优惠", "Automatisk svar", "Autosvar", "Automaattinen vastaus",
    "Automatická odpověď", "Automatikus válasz", "Αυτόματη απάντηση", "Otomatik Yanıt",
    "Răspuns automat", "Автоматический ответ", "Автоответ", "תשובה אוטומטית", "رد تلقائي",
    "Trả lời tự động", "Out of Office", "On vacation until Monday",
)  # fmt: skip
NOT_MAIL = (
    "Your parcel was returned to sender", "Delivery of your order is delayed",
    "Zustellung Ihres Pakets fehlgeschlagen", "Rejected: expense report",
    "Re: Undelivered Mail Returned to Sender", "Fwd: failure notice",
    "Warning: your domain expires", "Bounce house rental", "Failed login attempt",
)  # fmt: skip


@pytest.mark.parametrize("subject", AWAY)
def test_who_is_away_says_so_in_the_subject(subject: str) -> None:
    for more in ("", "Return-Path: <>\nAuto-Submitted: auto-replied\n"):
        header = f"From: a@b.example\nSubject: {subject}\n{more}Content-Type: text/plain; charset=utf-8\n\n"
        assert read(f"{header}Your mail was not read. Write to hans@b.example.\n".encode()).kind == "autoreply"


@pytest.mark.parametrize("subject", NOT_MAIL)
@pytest.mark.parametrize(
    "body",
    [
        "We could not deliver your parcel.\n\nE-Mail: anna@c.example\nAddress: 12 Road\n",
        "Otto wrote:\n> <anna@c.example>: host mx said: 550 5.1.1 User unknown\n> could not be delivered\n",
    ],
    ids=["parcel", "quoted report"],
)
def test_people_and_parcel_services_are_not_mail_systems(subject: str, body: str) -> None:
    header = f"From: Hans <hans@b.example>\nTo: news@sluice.example\nSubject: {subject}\nContent-Type: text/plain; charset=utf-8\n\n"
    assert read((header + body).encode()).kind in ("reply", "other")


CODECS = [b"zlib_codec", b"idna", b"punycode", b"utf-7", b"hex", b"undefined", b"../../etc/passwd", b"a" * 900, b"unicode_escape"]
HOSTILE = {
    "50,000 headers": b"X-A: b\n" * 50_000 + b"\nbody",
    "900 KB header": b"Subject: " + b"a" * 900_000 + b"\n\nbody",
    "20,000 encoded words": b"Subject: " + b"=?utf-8?b?YQ==?= " * 20_000 + b"\n\n",
    "20,000 parameter pieces": b"Content-Type: multipart/mixed" + b"".join(b"; b*%d=x" % n for n in range(20_000)) + b"\n\n",
    "2,000 deep": b"".join(b'Content-Type: multipart/mixed; boundary="b%d"\n\n--b%d\n' % (n, n) for n in range(2000)),
    "3,000 messages deep": b"Content-Type: message/rfc822\n\n" * 3000,
    "100,000 parts": b'Content-Type: multipart/mixed; boundary="b"\n\n' + b"--b\n\nx\n" * 100_000,
    "long boundary": b'Content-Type: multipart/mixed; boundary="' + b"a" * 2000 + b'"\n\n--' + b"a" * 2000 + b"\n\n",
    "boundary with signs": b'Content-Type: multipart/mixed; boundary="(.*)+[a"\n\n--(.*)+[a\n\nx\n--(.*)+[a',
    "base64 4 MB": b"Content-Transfer-Encoding: base64\n\n" + b"!@#$" * 1_000_000,
    "open tags": b"From: MAILER-DAEMON@x\nContent-Type: text/html\n\n" + b"<style" * 15_000 + b"<a " * 10_000,
    "only NUL": b"\0" * 100_000,
    "empty": b"",
    "60 KB of one letter": b"From: MAILER-DAEMON@x\nReturn-Path: <>\nSubject: Undelivered\n\n" + b"a" * 60_000,
    "10,000 recipients": report(b"".join(b"Final-Recipient: rfc822;a%d@b.example\nAction: failed\n\n" % n for n in range(10_000))),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_no_message_costs_more_than_a_second(name: str) -> None:
    started = time.process_time()
    read(HOSTILE[name])
    assert time.process_time() - started < 1.0  # S17


def test_the_limit_that_cut_a_message_short_is_named() -> None:
    assert read(HOSTILE["50,000 headers"]).exceeded == "header"
    assert len(list(Reader(HOSTILE["100,000 parts"]).walk())) <= MAX_PARTS


@pytest.mark.parametrize("charset", CODECS)
def test_only_text_charsets_are_decoded(charset: bytes) -> None:
    assert decode(b"x\\u0041+AEE-", charset) == "x\\u0041+AEE-"


def test_an_address_in_brackets_survives_the_loss_of_tags() -> None:
    page = '<p>To <a href="mailto:a@b.example">&lt;a@b.example&gt;</a> or <c@d.example></p>'
    assert without_tags(page).split() == [
        "To",
        "<a@b.example>",
        "or",
        "<c@d.example>",
    ]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_mutation_of_a_report_is_an_error(data: st.DataObject) -> None:
    whole = bytearray(report())
    for _ in range(data.draw(st.integers(1, 12))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=6))
        if not whole:
            break
    read(bytes(whole))


def test_the_corpus_is_understood() -> None:
    if not (CORPUS / "bounces" / "expected.jsonl").exists():
        pytest.skip("the labelled messages lie beside the checkout (../shared/corpus/bounces) and are not here")
    wrong: list[str] = []
    count = score_bounces.score_messages(CORPUS, wrong)["count"]
    assert count["recipients found"] >= 0.99 * count["recipients"]
    assert count["exact"] >= 0.985 * count["failed"]
    assert count["hardness right"] >= 0.98 * count["hardness"]
    assert count["false hard"] <= 0.003 * count["soft"]
    assert count["category right"] >= 0.96 * count["category"]
    assert count["autoreply right"] >= 0.97 * count["autoreply"]
    assert (count["false positives"], count["arf right"], count["depends on line ends"]) == (0, count["arf"], 0)
