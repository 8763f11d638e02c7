"""Quoted-printable, slow and obvious: the twin of `ext.body`."""

LIMIT = 75  # one octet of the 76 is kept for the "=" of a soft break


def normalised(text: str) -> str:
    """Every line end as LF."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def encode(text: str) -> bytes:
    """The lines of `text` joined by CR LF."""
    return b"\r\n".join(_line(line) for line in normalised(text).split("\n"))


def _line(line: str) -> bytes:
    lines = [b""]
    octets = line.encode("utf-8")
    for position, octet in enumerate(octets):
        last = position == len(octets) - 1
        unit = b"=%02X" % octet
        if 33 <= octet <= 126 and octet not in b"=.":
            unit = bytes([octet])
        if octet == 32:
            full = len(lines[-1]) + 1 > LIMIT
            if not last and (full or not lines[-1].endswith(b" ")):
                unit = b" "
            # A blank that opens a line after one that closed the line before counts as standing beside it
            if full and lines[-1].endswith(b" "):
                unit = b"=20"
        if len(lines[-1]) + len(unit if octet != 46 else b".") > LIMIT:
            lines.append(b"")
        if octet == 46:
            unit = b"." if lines[-1] else b"=2E"
        lines[-1] += unit
    return b"=\r\n".join(lines)


def decode(wire: bytes) -> str:
    """The text of quoted-printable lines, by hand."""
    out = bytearray()
    lines = wire.split(b"\r\n")
    for number, line in enumerate(lines):
        soft = line.endswith(b"=")
        rest = line[:-1] if soft else line
        while rest:
            if rest[:1] == b"=":
                out.append(int(rest[1:3], 16))
                rest = rest[3:]
            else:
                out += rest[:1]
                rest = rest[1:]
        if not soft and number < len(lines) - 1:
            out += b"\n"
    return out.decode("utf-8")
