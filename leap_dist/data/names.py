"""Names of files as text that any file, log and terminal takes: whatever bytes a file system had."""

from __future__ import annotations


def printable(name: str) -> str:
    r"""`name` on one line: bytes that are no UTF-8 and what does not print become \xe9, \n, \u202e, ...; emoji stay."""
    return "".join(c if c.isprintable() else _escaped(c) for c in name)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that Python could not decode (PEP 383)
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
