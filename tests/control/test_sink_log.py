"""control.sink_log: what receivers logged, whole lines only, with the place of what cannot be read."""

import json
from pathlib import Path

import pytest

from control import sink_log
from control.sink_log import SinkLogs
from domain.errors import Invalid


def line(number: int, **more: object) -> bytes:
    return json.dumps({"message_id": f"<{number}@x>", "recipient": f"p{number}@one.example", **more}).encode() + b"\n"


def number(message_id: str) -> int:
    found = int(message_id[1:].partition("@")[0])
    return found if found < 1000 else 0


def everything(logs: SinkLogs) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    while (part := logs.next())[0]:
        found += zip(*part, strict=True)
    return found


def test_several_logs_are_one_stream_wherever_they_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a").write_bytes(b"".join(line(n, at="2026-11-21T18:09:34Z") for n in range(1, 40)) + line(1000))
    (tmp_path / "b").write_bytes(b"\n".join([line(40), line(2000), line(41)]))
    (tmp_path / "c").write_bytes(b"")
    for size in (1, 7, 100, 1 << 20):
        monkeypatch.setattr(sink_log, "BYTES_AT_ONCE", size)
        logs = SinkLogs([tmp_path / name for name in "abc"], number)
        assert everything(logs) == [(n, f"p{n}@one.example") for n in range(1, 42)]
        assert logs.other_mail == 2
        assert logs.next() == ([], [])


def test_half_a_line_at_the_end_is_left_out_and_a_whole_one_is_not(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(line(1) + line(2)[:-1])
    assert [n for n, _ in everything(SinkLogs([path], number))] == [1, 2]
    path.write_bytes(line(1) + line(2)[:-9])
    assert [n for n, _ in everything(SinkLogs([path], number))] == [1]


def test_a_line_that_cannot_be_read_is_named(tmp_path: Path):
    path = tmp_path / "a"
    for bad in (b"nonsense\n", b'{"message_id":"<1@x>"}\n', b'{"message_id":1,"recipient":"a"}\n', b"\xff\xfe\n", b"[]\n"):
        path.write_bytes(line(1) + line(2) + bad + line(3))
        with pytest.raises(Invalid, match=r"a: line 3 is no JSON object with message_id and recipient"):
            everything(SinkLogs([path], number))


def test_an_address_with_nul_does_not_stop_the_comparison(tmp_path: Path):
    (tmp_path / "a").write_bytes(line(1, recipient="a\0b@one.example"))
    assert everything(SinkLogs([tmp_path / "a"], number)) == [(1, "a b@one.example")]
