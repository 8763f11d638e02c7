"""Header fields read back, slow and obvious: the twin of `ext.header`, by the standard library's decoder."""

from email.header import decode_header


def unfolded(field: bytes) -> tuple[str, bytes]:
    """Name and value of one field, its folds undone (RFC 5322 §2.2.3)."""
    name, colon, value = field.partition(b":")
    assert colon
    assert value.endswith(b"\r\n")
    return name.decode("ascii"), value[:-2].replace(b"\r\n ", b" ").removeprefix(b" ")


def text(value: bytes) -> str:
    """What a reader sees of an unstructured value (RFC 2047)."""
    parts = []
    for piece, charset in decode_header(value.decode("ascii")):
        parts.append(piece if isinstance(piece, str) else piece.decode(charset or "ascii"))
    return "".join(parts)


def lines_are_sound(field: bytes, limit: int = 76) -> bool:
    """No bare CR or LF, no control, no line that is empty, blank or longer than `limit`; continuations begin with one blank."""
    *lines, end = field.split(b"\r\n")
    if end:
        return False
    for number, line in enumerate(lines):
        if len(line) > limit or not line.strip() or any(octet < 32 or octet == 127 for octet in line):
            return False
        if (number > 0) != line.startswith(b" "):
            return False
    return True
