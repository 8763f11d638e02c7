"""The mailbox page and its API: nothing in a mail becomes script, and every answer is what docs/sink.md says."""

import json
import urllib.request

import pytest

from tests.bench.sink_process import Wire
from tests.browser import open_page

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
NEWSLETTER = (
    "From: =?utf-8?q?Z=C3=B6e?= <news@brand.example>\r\nTo: Ann <ann@gmail.example>\r\nSubject: =?utf-8?b?R3LDvMOfZQ==?=\r\n"
    'Message-ID: <1@brand.example>\r\nMIME-Version: 1.0\r\nContent-Type: multipart/alternative; boundary="b"\r\n\r\n'
    "--b\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\nGr=C3=BC=C3=9Fe as text\r\n"
    "--b\r\nContent-Type: text/html; charset=utf-8\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n"
    '<html><head><title>x</title></head><body><p id=3D"p">Gr=C3=BC=C3=9Fe as HTML</p><img src=3D"http://192.0.2.1/pixel.gif">'
    "<a href=3D\"http://brand.example/\">link</a><script>parent.document.title=3D'owned'</script></body></html>\r\n--b--\r\n"
)


def deliver(sink, content, recipient="ann@gmail.example"):
    with Wire(sink) as wire:
        assert wire.mail(recipient, content)[-1] == "250"


def test_an_empty_mailbox_lists_nothing(sink):
    assert sink.get("/api/v1/messages") == {"messages": [], "kept": 0, "accepted": 0}


def test_a_message_is_listed_and_shown_whole(sink):
    deliver(sink, NEWSLETTER)
    listed = sink.get("/api/v1/messages")["messages"]
    assert len(listed) == 1
    assert listed[0]["subject"] == "Grüße"
    assert listed[0]["from"] == "Zöe <news@brand.example>"
    assert listed[0]["recipients"] == ["ann@gmail.example"]
    whole = sink.get(f"/api/v1/messages/{listed[0]['id']}")
    assert whole["text"].rstrip() == "Grüße as text"
    assert "Grüße as HTML" in whole["html"]
    assert ["Subject", "=?utf-8?b?R3LDvMOfZQ==?="] in whole["headers"]
    assert whole["envelope"] == {"mail_from": "s@x.example", "recipients": ["ann@gmail.example"]}
    assert whole["sizes"]["source"] == len(NEWSLETTER)
    assert whole["session"]["helo"] == "client.example"


def test_the_source_is_the_message_octet_by_octet_as_plain_text(sink):
    deliver(sink, NEWSLETTER)
    status, body, headers = sink.fetch("/api/v1/messages/1/source")
    assert (status, body) == (200, NEWSLETTER.encode())
    assert headers["content-type"] == "text/plain; charset=utf-8"
    assert headers["x-content-type-options"] == "nosniff"


def test_html_is_served_without_script_and_without_images_unless_asked(sink):
    deliver(sink, NEWSLETTER)
    status, body, headers = sink.fetch("/api/v1/messages/1/html")
    assert status == 200
    assert b'<head><base target="_blank">' in body
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "img-src data:;" in policy
    assert "sandbox" in policy
    assert "allow-scripts" not in policy
    assert "img-src http: https: data:;" in sink.fetch("/api/v1/messages/1/html?images=1")[2]["content-security-policy"]


def test_search_looks_at_addresses_subject_and_message_id(sink):
    for number, name in enumerate(("ann", "bob", "carl")):
        deliver(sink, f"Subject: About {name}\r\nMessage-ID: <{number}@x>\r\n\r\nx\r\n", f"{name}@y.example")
    assert [one["id"] for one in sink.get("/api/v1/messages?limit=2")["messages"]] == [3, 2]
    assert [one["id"] for one in sink.get("/api/v1/messages?query=BOB")["messages"]] == [2]
    assert [one["id"] for one in sink.get("/api/v1/messages?query=about+%3C2@x")["messages"]] == [3]
    assert sink.get("/api/v1/messages?query=nobody")["messages"] == []


@pytest.mark.parametrize("limit", ["0", "-1", "501", "x", "1e3", "9" * 400, "%00", "٣"])
def test_a_wrong_limit_is_refused_by_name(sink, limit):
    from urllib.parse import quote

    status, body, headers = sink.fetch(f"/api/v1/messages?limit={quote(limit, safe='%')}")
    assert status == 400
    assert headers["content-type"] == "application/problem+json"
    assert json.loads(body)["field"] == "limit"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/static/../sink.py", 404),
        ("GET", "/static/%2e%2e/sink.py", 404),
        ("GET", "/api/v1/messages/999", 404),
        ("GET", "/api/v1/messages/-1", 404),
        ("GET", "/api/v1/messages/99999999999999999999999", 404),
        ("POST", "/api/v1/messages", 405),
        ("GET", "/api/v1/reset", 405),
        ("DELETE", "/", 405),
    ],
)
def test_wrong_requests_get_a_problem(sink, method, path, status):
    got, body, _ = sink.fetch(path, method)
    assert got == status
    assert json.loads(body)["status"] == status


def test_a_message_without_html_says_so(sink):
    deliver(sink, "Subject: x\r\n\r\nplain\r\n")
    assert sink.fetch("/api/v1/messages/1/html")[0] == 404
    assert sink.get("/api/v1/messages/1")["html"] is None


def test_delete_empties_the_mailbox_and_reset_the_counters_too(sink):
    deliver(sink, NEWSLETTER)
    assert sink.fetch("/api/v1/messages", "DELETE")[0] == 204
    assert sink.get("/api/v1/messages") == {"messages": [], "kept": 0, "accepted": 1}
    assert sink.counters()["messages"] == 1
    assert sink.fetch("/api/v1/reset", "POST")[0] == 200
    assert sink.counters()["messages"] == 0
    assert sink.counters()["duplicates_tracked"] == 0


def test_other_sites_cannot_empty_the_mailbox(sink):
    deliver(sink, NEWSLETTER)
    assert sink.fetch("/api/v1/messages", "DELETE", Origin="http://evil.example")[0] == 403
    assert sink.fetch("/api/v1/messages", "DELETE", Origin="null")[0] == 403
    assert sink.get("/api/v1/messages")["kept"] == 1
    assert sink.fetch("/api/v1/messages", "DELETE", Origin=sink.http)[0] == 204


def test_a_body_beyond_the_limit_is_refused(sink):
    assert sink.fetch("/api/v1/script", "PUT", b" " * (2 << 20))[0] == 400


@pytest.mark.parametrize(
    "content",
    [
        "",
        "\r\n",
        "no header at all",
        "Subject: " + HOSTILE + "\r\n\r\nx\r\n",
        "Content-Type: text/html; charset=zlib_codec\r\n\r\n<b>x</b>\r\n",
        "Content-Type: text/plain; charset=nonsense\r\n\r\nx\r\n",
        "Content-Type: text/html\r\nContent-Transfer-Encoding: base64\r\n\r\n!!!!\r\n",
        'Content-Type: multipart/mixed; boundary=""\r\n\r\n--\r\n',
        "Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\nContent-Type: message/rfc822\r\n\r\nSubject: in\r\n\r\nx\r\n",
        "From: =?utf-8?q?=FF=FE?= <a@b>, ,,@\r\nTo: undisclosed:;\r\nSubject: =?x?y?z?=\r\n\r\nx\r\n",
        "Subject: \udcff\udcfe\r\n\r\nx\r\n",
        'Message-ID: <a@[b]>>>\r\nDate: never\r\nReply-To: [\r\nTo: "\r\nFrom: a b c <<\r\n\r\nx\r\n',
        f'Content-Disposition: attachment; filename="../../x"\r\nContent-Type: application/pdf; name="{HOSTILE}"\r\n\r\nx\r\n',
        "X: y\r\n" * 5000 + "\r\nx\r\n",
    ],
)
def test_no_mail_breaks_the_api(sink, content):
    with Wire(sink) as wire:
        wire.send(b"MAIL FROM:<>\r\nRCPT TO:<r@y.example>\r\nDATA\r\n")
        assert wire.codes(3) == ["250", "250", "354"]
        wire.send(content.encode("utf-8", "surrogateescape") + b"\r\n.\r\n")
        assert wire.codes(1) == ["250"]
    assert sink.fetch("/api/v1/messages")[0] == 200
    assert sink.fetch("/api/v1/messages/1")[0] == 200
    assert sink.fetch("/api/v1/messages/1/source")[0] == 200
    assert sink.fetch("/api/v1/messages/1/html")[0] in (200, 404)


def test_the_page_and_its_files_come_from_here_under_a_strict_policy(sink):
    for path in ("/", "/static/mailbox.css", "/static/mailbox.js", "/static/icon.svg"):
        status, body, headers = sink.fetch(path)
        assert status == 200
        assert headers["content-security-policy"].startswith("default-src 'self'")
        text = body.decode().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text
        assert "innerHTML" not in text
        assert "style=" not in text
    assert b"onclick" not in sink.fetch("/")[1]


def test_head_answers_like_get_without_a_body(sink):
    request = urllib.request.Request(sink.http + "/", method="HEAD")
    with urllib.request.urlopen(request) as answer:
        assert answer.read() == b""
        assert int(answer.headers["content-length"]) > 100


@pytest.mark.e2e
def test_the_page_in_a_browser(sink):
    with open_page(viewport={"width": 1200, "height": 700}) as watched:
        page = watched.page
        page.goto(sink.http)
        page.get_by_text("No mail yet").wait_for()
        deliver(sink, f"From: {HOSTILE} <a@b.example>\r\nTo: x\r\nSubject: {HOSTILE}\r\nContent-Type: text/plain\r\n\r\n{HOSTILE}\r\n")
        deliver(sink, NEWSLETTER)
        # It comes by itself.
        page.locator("#list li").nth(1).wait_for()
        page.keyboard.press("j")
        frame = page.frame_locator("#view iframe")
        assert frame.locator("#p").inner_text() == "Grüße as HTML"
        assert page.locator("#view iframe").get_attribute("sandbox") == "allow-popups allow-popups-to-escape-sandbox"
        page.keyboard.press("2")
        assert page.locator("#view pre").inner_text().strip() == "Grüße as text"
        page.keyboard.press("3")
        assert page.locator("#view th").first.inner_text() == "From"
        page.keyboard.press("4")
        page.get_by_text("multipart/alternative").wait_for()
        page.keyboard.press("j")
        page.locator("#subject", has_text="<script>").wait_for()
        for key in ("2", "3", "4"):
            page.keyboard.press(key)
            assert page.locator("#message script, #message img, #list script, #list img").count() == 0
        assert page.title() == "Mailbox · Sluice sink"
        page.keyboard.press("/")
        page.keyboard.type("nobody")
        page.get_by_text("Nothing found").wait_for()
        page.keyboard.press("Escape")
        page.locator("#list li").nth(1).wait_for()
        page.get_by_role("button", name="Empty mailbox").click()
        page.get_by_text("No mail yet").wait_for()
        # The mail's own script and picture are blocked, and the browser says so; nothing else may be wrong.
        assert [line for line in watched.errors if "192.0.2.1" not in line and "script" not in line.lower()] == []
        assert {url.split("/")[2] for url in watched.requests if not url.startswith("data:")} <= {sink.ready["http"], "192.0.2.1"}
