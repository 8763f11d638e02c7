"""The sink speaks SMTP correctly: capabilities, pipelining, chunking, TLS, AUTH, limits and counts."""

import base64
import json
import os
import random
import smtplib
import ssl
import subprocess
import sys
import time
from pathlib import Path

import aiosmtplib
import pytest

from tests.bench.sink_process import PATIENCE_SECONDS, ROOT, SinkProcess, Wire

MESSAGE = "Message-ID: <one@x>\r\nSubject: One\r\n\r\n..dot\r\nHello\r\n"
GROUP = "MAIL FROM:<s@x.example>\r\nRCPT TO:<r@y.example>\r\nDATA\r\n"


def test_every_capability_is_offered_and_can_be_switched_off():
    words = ("PIPELINING", "CHUNKING", "8BITMIME", "SMTPUTF8", "SIZE", "STARTTLS", "AUTH", "ENHANCEDSTATUSCODES")
    with SinkProcess() as sink, Wire(sink) as wire:
        offered = {line[4:].split()[0] for line in wire.ehlo.splitlines()[1:]}
        assert offered == set(words)
    with SinkProcess(*(f"--no-{word.lower()}" for word in words)) as sink, Wire(sink) as wire:
        assert wire.ehlo == "250 sink.example at your service\r\n"


def test_smtplib_and_aiosmtplib_deliver(sink):
    with smtplib.SMTP("127.0.0.1", sink.port) as client:
        client.sendmail("s@x.example", ["a@y.example", "b@y.example"], MESSAGE.replace("..", "."))
    assert sink.sources() == [MESSAGE.replace("..", ".")]
    assert sink.counters()["recipients"] == 2


async def test_aiosmtplib_delivers_over_starttls_with_a_login(sink):
    async with aiosmtplib.SMTP(
        hostname="127.0.0.1", port=sink.port, start_tls=True, validate_certs=False, username="u", password="p"
    ) as client:
        await client.sendmail("s@x.example", ["a@y.example"], b"Subject: x\r\n\r\nhi\r\n")
    session = sink.get("/api/v1/messages/1")["session"]
    assert session["tls"].startswith("TLSv1.")
    assert session["user"] == "u"


def test_content_and_next_envelope_may_share_a_segment(sink):
    with Wire(sink) as wire:
        wire.send(GROUP)
        assert wire.codes(3) == ["250", "250", "354"]
        for _ in range(3):
            wire.send(MESSAGE + ".\r\n" + GROUP)
            assert wire.codes(4) == ["250", "250", "250", "354"]
        wire.send(".\r\nQUIT\r\n")
        assert wire.codes(2) == ["250", "221"]
        assert wire.closed()
    assert sink.sources()[:3] == [MESSAGE.replace("..", ".")] * 3


def test_replies_to_one_segment_leave_in_one_segment(sink):
    with Wire(sink) as wire:
        wire.send("NOOP\r\n" * 50)
        wire.line()
        assert wire.buffer.count(b"\n") == 49


SESSION = (
    "EHLO c.example\r\n" + GROUP + MESSAGE + ".\r\nMAIL FROM:<>\r\nRCPT TO:<bounce@y.example>\r\nRCPT TO:<q@y.example>\r\n"
    "BDAT 7\r\nA: b\r\n\rBDAT 4 LAST\r\n\nx\r\nNOOP\r\n"
    "MAIL FROM:<s@x>\r\nRCPT TO:<t@y>\r\nDATA\r\n.\r\nRSET\r\nnonsense\r\nBDAT 0 LAST\r\nQUIT\r\n"
).encode()


def test_replies_do_not_depend_on_where_the_input_is_cut(sink):
    def run(pieces):
        sink.reset()
        with Wire(sink, greet=False) as wire:
            for piece in pieces:
                wire.send(piece)
                # A turn of the loop in between, or the kernel joins the pieces again.
                time.sleep(0.0005)
            text = b""
            while line := wire.line():
                text += line
        return text, sink.sources()

    whole = run([SESSION])
    assert whole[0].count(b"queued") == 3
    assert whole[1] == [MESSAGE.replace("..", "."), "A: b\r\n\r\nx\r\n", ""]
    for cut in range(1, len(SESSION)):
        assert run([SESSION[:cut], SESSION[cut:]]) == whole, f"cut at {cut}"
    assert run([SESSION[i : i + 1] for i in range(len(SESSION))]) == whole


def test_random_cuts_of_large_messages_change_nothing(sink):
    chance = random.Random(7)
    body = "".join(f"{'.' if chance.random() < 0.2 else ''}{'x' * chance.randrange(0, 120)}\r\n" for _ in range(4000))
    stuffed = "".join(f".{line}" if line.startswith(".") else line for line in body.splitlines(keepends=True))
    wanted = "Subject: big\r\n\r\n" + body
    data = (GROUP + "Subject: big\r\n\r\n" + stuffed + ".\r\n").encode()
    with Wire(sink) as wire:
        for _ in range(5):
            at = 0
            while at < len(data):
                size = chance.choice((1, 3, 100, 5000, 70_000))
                wire.send(data[at : at + size])
                at += size
            assert wire.codes(4) == ["250", "250", "354", "250"]
    assert sink.sources() == [wanted] * 5


def test_only_crlf_dot_crlf_ends_the_content(sink):
    for end in ("\n.\n", "\r.\r", "\n.\r\n", "\r\n.\n", "\r.\r\n", "\r\n.\r"):
        with Wire(sink) as wire:
            wire.send(GROUP + f"A: b\r\n\r\nx{end}MAIL FROM:<evil@x.example>\r\n")
            assert wire.codes(3) == ["250", "250", "354"]
            assert wire.silent(0.03)
            wire.send("\r\n.\r\n")
            # A bare CR or LF inside the content is refused as well.
            assert wire.codes(1) == ["554"]
    assert sink.counters()["messages"] == 0
    assert sink.counters()["violations"]["bare_newlines"] == 6


def test_bare_newlines_can_be_allowed_and_are_still_counted():
    with SinkProcess("--allow-bare-newlines") as sink, Wire(sink) as wire:
        assert wire.mail("r@y.example", "A: b\r\n\r\nx\ny\r\n")[-1] == "250"
        assert sink.counters()["violations"]["bare_newlines"] == 1


@pytest.mark.parametrize(
    "line", ["NOOP\n", "NO\rOP\r\n", "NOOP\0\r\n", "\r\n", "\n", "XYZZY\r\n", "MAIL\r\n", "RCPT TO\r\n", "BDATA 1\r\n"]
)
def test_malformed_commands_get_a_500_and_the_session_goes_on(sink, line):
    with Wire(sink) as wire:
        wire.send(line)
        assert wire.reply()[:2] == "50"
        assert wire.ask("NOOP")[:3] == "250"


def test_an_endless_command_line_is_not_kept(sink):
    with Wire(sink) as wire:
        for _ in range(64):
            wire.send(b"A" * 65536)
        assert wire.ask("")[:3] == "500"
        assert wire.ask("NOOP")[:3] == "250"


def test_too_many_errors_end_the_connection(sink):
    with Wire(sink) as wire:
        wire.send("FOO\r\n" * 30)
        assert wire.codes(22) == ["500"] * 21 + ["421"]
        assert wire.closed()


def test_a_browser_is_sent_away(sink):
    with Wire(sink, greet=False) as wire:
        wire.reply()
        wire.send("POST / HTTP/1.1\r\nHost: x\r\n\r\nEHLO a\r\nMAIL FROM:<a@b>\r\n")
        assert wire.reply()[:3] == "554"
        assert wire.closed()


def test_other_commands_answer_as_they_should(sink):
    with Wire(sink) as wire:
        assert wire.ask("VRFY ann")[:3] == "252"
        assert wire.ask("EXPN list")[:3] == "502"
        assert wire.ask("HELP")[:3] == "214"
        assert wire.ask("noop anything")[:3] == "250"
        assert wire.ask("HELO c.example") == "250 sink.example at your service\r\n"
        assert wire.ask("MAIL FROM:<s@x.example> BODY=8BITMIME")[:3] == "555"
        assert wire.ask("EHLO")[:3] == "501"


def test_commands_out_of_order_are_refused(sink):
    with Wire(sink, greet=False) as wire:
        wire.reply()
        assert wire.ask("MAIL FROM:<s@x.example>")[:3] == "503"
        wire.ask("EHLO c")
        assert wire.ask("RCPT TO:<r@y.example>")[:3] == "503"
        assert wire.ask("DATA")[:3] == "503"
        wire.ask("MAIL FROM:<s@x.example>")
        assert wire.ask("MAIL FROM:<s@x.example>")[:3] == "503"
        assert wire.ask("DATA")[:3] == "554"
        wire.ask("RCPT TO:<r@y.example>")
        wire.send("BDAT 3\r\nabc")
        assert wire.reply()[:3] == "250"
        assert wire.ask("DATA")[:3] == "503"
        assert wire.ask("RSET")[:3] == "250"
        assert wire.ask("RCPT TO:<r@y.example>")[:3] == "503"


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("<r@y.example>", "250"),
        (" <r@y.example>", "250"),
        ("<Postmaster>", "250"),
        ('<"a > b"@y.example>', "250"),
        ('<"a@b"@y.example>', "250"),
        ("<@relay.example:r@y.example>", "250"),
        ("r@y.example", "501"),
        ("<r@y.example", "501"),
        ("<r@@y.example>", "501"),
        ("<r>", "501"),
        ("<>", "501"),
        ("<@y.example>", "501"),
        ("<r@>", "501"),
        ("<r @y.example>", "501"),
        ("<r@y.example>x", "501"),
        ("<r@y.example> NOTIFY=NEVER", "555"),
        ("<zoë@y.example>", "553"),
    ],
)
def test_recipient_syntax(sink, path, code):
    with Wire(sink) as wire:
        wire.ask("MAIL FROM:<s@x.example>")
        assert wire.ask(f"RCPT TO:{path}")[:3] == code


@pytest.mark.parametrize(
    ("parameters", "code"),
    [
        ("", "250"),
        (" SIZE=1000 BODY=8BITMIME", "250"),
        (" size=0 body=7bit AUTH=<>", "250"),
        (" SMTPUTF8", "250"),
        (" SIZE=-1", "501"),
        (" SIZE=abc", "501"),
        (" SIZE=99999999999999999999", "552"),
        (" SIZE=100000000000000000000", "501"),
        (" BODY=BINARYMIME", "555"),
        (" RET=FULL", "555"),
    ],
)
def test_mail_parameters(sink, parameters, code):
    with Wire(sink) as wire:
        assert wire.ask(f"MAIL FROM:<s@x.example>{parameters}")[:3] == code


def test_smtputf8_takes_addresses_outside_ascii(sink):
    with Wire(sink) as wire:
        assert wire.ask("MAIL FROM:<søren@x.example> SMTPUTF8")[:3] == "250"
        assert wire.ask("RCPT TO:<zoë@bücher.example>")[:3] == "250"
        wire.ask("DATA")
        assert wire.ask("Subject: grüße\r\n\r\nx\r\n.")[:3] == "250"
    assert sink.get("/api/v1/messages/1")["recipients"] == ["zoë@bücher.example"]
    assert sink.counters()["violations"]["undeclared_8bit"] == 0


def test_faults_of_the_content_are_counted(sink):
    with Wire(sink) as wire:
        assert wire.mail("r@y.example", "A: b\r\n\r\n" + "x" * 998 + "\r\n")[-1] == "250"
        assert sink.counters()["violations"]["long_lines"] == 0
        assert wire.mail("r@y.example", "A: b\r\n\r\n" + "x" * 999 + "\r\n")[-1] == "250"
        assert wire.mail("r@y.example", "A: b\r\n\r\ngrüße\r\n")[-1] == "250"
        assert wire.mail("r@y.example", "A: b\r\n\r\nnul\0octet and more text\r\n")[-1] == "554"
    found = sink.counters()["violations"]
    assert (found["long_lines"], found["undeclared_8bit"], found["nul_octets"]) == (1, 1, 1)


def test_bdat_in_windows(sink):
    body = MESSAGE.replace("..", ".")
    one = f"MAIL FROM:<s@x.example>\r\nRCPT TO:<r@y.example>\r\nBDAT {len(body)} LAST\r\n{body}"
    with Wire(sink) as wire:
        wire.send(one * 8)
        assert wire.codes(24) == ["250"] * 24
        # Dots are content here, stuffed or not.
        wire.send("MAIL FROM:<>\r\nRCPT TO:<r@y.example>\r\nBDAT 5\r\n.\r\n..BDAT 0\r\nBDAT 3 LAST\r\n\r\n.")
        assert wire.codes(5) == ["250"] * 5
    assert sink.sources() == [body] * 8 + [".\r\n..\r\n."]


def test_a_refused_chunk_is_swallowed_and_the_window_stays_in_step(sink):
    one = "MAIL FROM:<s@x.example>\r\nRCPT TO:<{}>\r\nBDAT 6 LAST\r\nQUIT\r\n"
    with Wire(sink) as wire:
        wire.send(one.format("bounce@y.example") + one.format("r@y.example"))
        assert wire.codes(6) == ["250", "550", "554", "250", "250", "250"]
        wire.send("BDAT 6 LAST\r\nQUIT\r\n")
        assert wire.codes(1) == ["503"]
        assert wire.ask("BDAT x LAST")[:3] == "501"
        assert wire.closed()
    assert sink.counters()["messages"] == 1


def test_starttls_forgets_what_came_before_and_never_runs_what_was_injected(sink):
    with Wire(sink) as wire:
        wire.ask("MAIL FROM:<before@x.example>")
        assert wire.start_tls(behind=b"NOOP\r\nMAIL FROM:<injected@x.example>\r\n")[:3] == "220"
        assert wire.ask("MAIL FROM:<s@x.example>")[:3] == "503"
        again = wire.ask("EHLO c.example")
        assert "STARTTLS" not in again
        assert wire.ask("STARTTLS")[:3] == "503"
        assert wire.mail("r@y.example")[-1] == "250"
        wire.send(GROUP)
        assert wire.codes(3) == ["250", "250", "354"]
        wire.send("x" * 100 + "\r\n" + ("y" * 900 + "\r\n") * 200 + ".\r\n")
        assert wire.codes(1) == ["250"]
    assert [one["tls"] for one in sink.get("/api/v1/messages")["messages"]] == [True, True]
    assert sink.get("/api/v1/messages/1")["mail_from"] == "s@x.example"


def test_garbage_instead_of_a_handshake_costs_only_that_connection(sink):
    before = sink.counters()["connections"]["now"]
    with Wire(sink) as wire:
        assert wire.ask("STARTTLS")[:3] == "220"
        wire.send("EHLO plain\r\n" * 4)
        while wire.line():
            pass
    with Wire(sink) as wire:
        assert wire.mail("r@y.example")[-1] == "250"
    deadline = time.monotonic() + PATIENCE_SECONDS
    while sink.counters()["connections"]["now"] > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sink.counters()["connections"]["now"] <= before


def test_tls_from_the_first_octet_with_a_certificate_clients_can_trust(tmp_path: Path):
    file = tmp_path / "sink.pem"
    with SinkProcess("--tls-port", "0", "--write-certificate", str(file), "--require-tls") as sink:
        port = int(sink.ready["smtps"].rsplit(":", 1)[1])
        with smtplib.SMTP_SSL("localhost", port, context=ssl.create_default_context(cafile=str(file))) as client:
            client.sendmail("s@x.example", ["r@y.example"], "Subject: x\n\nx\n")
        with Wire(sink) as wire:
            assert wire.ask("MAIL FROM:<s@x.example>")[:3] == "530"
        assert sink.counters()["messages"] == 1


@pytest.mark.parametrize("options", [("--certificate-days", "-1"), ("--certificate-name", "other.example")])
def test_faulty_certificates_can_be_had(tmp_path: Path, options):
    file = tmp_path / "sink.pem"
    with SinkProcess("--write-certificate", str(file), *options) as sink:
        with smtplib.SMTP("localhost", sink.port) as client, pytest.raises(ssl.SSLCertVerificationError):
            client.starttls(context=ssl.create_default_context(cafile=str(file)))


def test_a_login_can_be_required():
    def plain(user, password):
        return base64.b64encode(f"\0{user}\0{password}".encode()).decode()

    def word(text):
        return base64.b64encode(text.encode()).decode()

    with SinkProcess("--user", "ann:secret") as sink, Wire(sink) as wire:
        assert wire.ask("MAIL FROM:<s@x.example>")[:3] == "530"
        assert wire.ask(f"AUTH PLAIN {plain('ann', 'wrong')}")[:3] == "535"
        assert wire.ask(f"AUTH PLAIN {plain('bob', 'secret')}")[:3] == "535"
        assert wire.ask("AUTH PLAIN !!!")[:3] == "501"
        assert wire.ask("AUTH CRAM-MD5")[:3] == "504"
        assert wire.ask("AUTH LOGIN") == "334 VXNlcm5hbWU6\r\n"
        assert wire.ask("*")[:3] == "501"
        assert wire.ask("AUTH LOGIN")[:3] == "334"
        assert wire.ask(word("ann")) == "334 UGFzc3dvcmQ6\r\n"
        assert wire.ask(word("secret"))[:3] == "235"
        assert wire.ask(f"AUTH PLAIN {plain('ann', 'secret')}")[:3] == "503"
        assert "AUTH" not in wire.ask("EHLO c")
        assert wire.mail("r@y.example")[-1] == "250"
        assert sink.get("/api/v1/messages/1")["session"]["user"] == "ann"
        with Wire(sink) as other:
            assert other.ask("AUTH PLAIN")[:3] == "334"
            assert other.ask(plain("ann", "secret"))[:3] == "235"


def test_limits_on_connections_size_recipients_and_messages():
    options = ("--max-connections", "2", "--max-message-bytes", "5000", "--max-recipients", "2", "--max-messages-per-connection", "2")
    with SinkProcess(*options) as sink, Wire(sink) as wire, Wire(sink) as other:
        with Wire(sink, greet=False) as third:
            assert third.reply()[:3] == "421"
            assert third.closed()
        assert wire.ask("MAIL FROM:<s@x.example> SIZE=5001")[:3] == "552"
        wire.ask("MAIL FROM:<s@x.example>")
        assert [wire.ask(f"RCPT TO:<r{i}@y.example>")[:3] for i in range(3)] == ["250", "250", "452"]
        assert wire.ask("DATA")[:3] == "354"
        for _ in range(100):
            wire.send("x" * 998 + "\r\n")
        assert wire.ask(".")[:3] == "552"
        wire.send("MAIL FROM:<s@x.example>\r\nRCPT TO:<r@y.example>\r\nBDAT 6000 LAST\r\n" + "x" * 6000)
        assert wire.codes(3) == ["250", "250", "552"]
        wire.send("MAIL FROM:<s@x.example>\r\nRCPT TO:<r@y.example>\r\nBDAT 4000\r\n" + "x" * 4000 + "BDAT 2000 LAST\r\n" + "x" * 2000)
        assert wire.codes(4) == ["250", "250", "250", "552"]
        assert [other.mail("r@y.example")[-1] for _ in range(3)] == ["250", "250", "421"]
        assert other.closed()
        counters = sink.counters()
        assert counters["messages"] == 2
        assert counters["connections"]["max"] == 3
        assert counters["connections"]["refused"] == 1


def test_without_pipelining_commands_sent_ahead_are_refused():
    with SinkProcess("--no-pipelining") as sink:
        with Wire(sink) as wire:
            assert wire.mail("r@y.example")[-1] == "250"
            wire.send("MAIL FROM:<s@x.example>\r\nBDAT")
            assert wire.codes(2) == ["250", "503"]
            assert wire.closed()


def test_a_reply_delay_lets_answers_of_many_connections_travel_together():
    with SinkProcess("--reply-delay", "60") as sink:
        start = time.monotonic()
        with Wire(sink, greet=False) as one, Wire(sink, greet=False) as two:
            for wire in (one, two):
                wire.send("EHLO a\r\n" + GROUP + MESSAGE + ".\r\nQUIT\r\n")
            for wire in (one, two):
                assert wire.codes(7) == ["220", "250", "250", "250", "354", "250", "221"]
                assert wire.closed()
        assert time.monotonic() - start >= 0.06
        assert sink.counters()["messages"] == 2


def test_second_copies_are_counted_by_message_id_and_recipient(sink):
    with Wire(sink) as wire:
        for name in ("a", "b", "a", "a"):
            wire.mail(f"{name}@y.example", "From: x\r\nMESSAGE-id:\t <m@x> \r\n\r\nx\r\n")
        wire.mail("a@y.example", "Message-ID:\r\n <m@x>\r\n\r\nx\r\n")
        wire.mail("a@y.example", "Message-ID: <n@x>\r\n\r\nx\r\n")
        wire.mail("a@y.example", "Subject: no id\r\n\r\nMessage-ID: <m@x>\r\n")
    counters = sink.counters()
    assert counters["duplicates"] == 3
    assert counters["duplicates_tracked"] == 3
    assert counters["without_message_id"] == 1


def test_tracking_stops_at_its_bound_and_says_so():
    with SinkProcess("--max-tracked", "10") as sink, Wire(sink) as wire:
        for number in range(15):
            wire.mail(f"r{number}@y.example")
        wire.mail("r0@y.example")
        counters = sink.counters()
        assert counters["duplicates_tracked"] == 10
        assert counters["duplicates_untracked"] == 5
        assert counters["duplicates"] == 1
    with SinkProcess("--no-track-duplicates") as sink, Wire(sink) as wire:
        wire.mail("r@y.example")
        wire.mail("r@y.example")
        assert sink.counters()["duplicates"] == 0


def test_a_hundred_thousand_pairs_grow_the_table_without_losing_one():
    with SinkProcess() as sink, Wire(sink) as wire:
        for turn in range(2):
            for start in range(0, 100_000, 1000):
                wire.send(
                    "MAIL FROM:<>\r\n"
                    + "".join(f"RCPT TO:<r{start + i}@y.example>\r\n" for i in range(1000))
                    + "BDAT 19 LAST\r\nMessage-ID: <m@x>\r\n"
                )
                assert wire.codes(1002) == ["250"] * 1002
            counters = sink.counters()
            assert counters["duplicates_tracked"] == 100_000
            assert counters["duplicates"] == turn * 100_000


def test_accepted_messages_are_logged_one_line_per_recipient(tmp_path: Path):
    file = tmp_path / "accepted.jsonl"
    with SinkProcess("--accepted", str(file), "--accepted-before-reply") as sink, Wire(sink) as wire:
        wire.send('MAIL FROM:<>\r\nRCPT TO:<a@y.example>\r\nRCPT TO:<"q\\"b"@y.example>\r\nRCPT TO:<bounce@y.example>\r\nDATA\r\n')
        assert wire.codes(5) == ["250", "250", "250", "550", "354"]
        assert wire.ask("Message-ID: <m@x>\r\n\r\nx\r\n.")[:3] == "250"
        # The lines are there before the reply is.
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert [(line["message_id"], line["recipient"]) for line in lines] == [("<m@x>", "a@y.example"), ("<m@x>", '"q\\"b"@y.example')]
        assert all(set(line) == {"message_id", "recipient", "at"} and line["at"].endswith("Z") for line in lines)
    with SinkProcess("--accepted", str(file)) as sink, Wire(sink) as wire:
        wire.mail("later@y.example", "Subject: none\r\n\r\nx\r\n")
    assert json.loads(file.read_text().splitlines()[2])["message_id"] == ""


def test_the_ring_keeps_the_last_messages_and_a_bounded_size():
    with SinkProcess("--keep", "3", "--keep-bytes", "1000") as sink, Wire(sink) as wire:
        for number in range(5):
            wire.mail("r@y.example", f"Subject: {number}\r\n\r\nx\r\n")
        assert [one["subject"] for one in sink.get("/api/v1/messages")["messages"]] == ["4", "3", "2"]
        wire.mail("r@y.example", "Subject: big\r\n\r\n" + ("x" * 98 + "\r\n") * 9)
        assert [one["subject"] for one in sink.get("/api/v1/messages")["messages"]] == ["big", "4", "3"]
        wire.mail("r@y.example", "Subject: too big\r\n\r\n" + ("x" * 98 + "\r\n") * 10)
        assert sink.counters()["messages"] == 7
        assert sink.get("/api/v1/messages")["messages"][0]["subject"] == "big"


def test_sigterm_says_421_prints_counters_and_ends_within_a_second():
    sink = SinkProcess()
    with Wire(sink) as wire:
        wire.mail("r@y.example")
        took = sink.stop()
        assert wire.reply()[:3] == "421"
    assert took < 1.0
    assert sink.final["messages"] == 1
    assert sink.final["cpu_seconds"] > 0


def test_the_ready_line_names_both_ports():
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.sink", "--port", "0", "--http-port", "0"], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    process.terminate()
    assert process.wait(PATIENCE_SECONDS) == 0
    assert line.startswith("sink ready smtp=127.0.0.1:")
    assert " http=127.0.0.1:" in line


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--port", "99999"), 2, "99999 is no port"),
        (("--user", "nocolon"), 2, "USER:PASSWORD"),
        (("--user", "a:b", "--no-auth"), 2, "nobody could log in"),
        (("--require-tls", "--no-starttls"), 2, "nobody could send"),
        (("--script", "/does/not/exist"), 2, "cannot be read"),
        (("--certificate", "/does/not/exist"), 2, "cannot be used"),
        (("--host", "192.0.2.1"), 1, "cannot listen"),
    ],
)
def test_wrong_options_are_refused_with_a_sentence(options, code, words):
    done = subprocess.run(
        [sys.executable, "-m", "bench.sink", "--http-port", "0", *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_said():
    with SinkProcess() as sink:
        done = subprocess.run(
            [sys.executable, "-m", "bench.sink", "--port", str(sink.port), "--http-port", "0"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ,
            timeout=PATIENCE_SECONDS,
        )
    assert done.returncode == 1
    assert "cannot listen" in done.stderr
