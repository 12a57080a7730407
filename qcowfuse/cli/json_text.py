"""Names from images and file systems as the Unicode text that JSON must be, in the way of QEMU, and JSON bit by bit.

Source: QEMU's mod_utf8_codepoint() and json_writer: what is no UTF-8 becomes U+FFFD, one for a lead byte with all
continuation bytes that it wants and has, and one for any other byte.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

_SMALLEST = (0x80, 0x800, 0x10000, 0x200000, 0x4000000)
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def as_unicode(value: Any) -> Any:
    """``value`` with all text in it, in lists and dictionaries too, made Unicode; bytes that were no UTF-8 stand in
    it as surrogates (as ``os.fsdecode`` gives them)."""
    if isinstance(value, str):
        return value if value.isascii() else _text_of(value.encode("utf-8", "surrogateescape"))
    if isinstance(value, dict):
        return {name: as_unicode(item) for name, item in value.items()}
    if isinstance(value, list):
        return [as_unicode(item) for item in value]
    return value


def to_text(value: Any) -> str:
    """JSON as qemu-img lays it out."""
    return json.dumps(as_unicode(value), indent=4)


async def write_json(value: Any, write: Callable[[str], object], indent: str = "") -> None:
    """Write ``value`` as qemu-img lays JSON out. Where it, or an item of a dictionary in it, is an asynchronous
    generator, that is a list of which one entry is in memory at a time."""
    if isinstance(value, dict):
        begin = "{\n"
        for name, item in value.items():
            write(f"{begin}{indent}    {json.dumps(name)}: ")
            await write_json(item, write, indent + "    ")
            begin = ",\n"
        write("{}" if begin == "{\n" else f"\n{indent}}}")
    elif isinstance(value, AsyncGenerator):
        begin = "[\n"
        async with aclosing(value) as items:
            async for item in items:
                write(f"{begin}{indent}    ")
                await write_json(item, write, indent + "    ")
                begin = ",\n"
        write("[]" if begin == "[\n" else f"\n{indent}]")
    else:
        write(json.dumps(as_unicode(value), indent=4).replace("\n", f"\n{indent}"))


def _text_of(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        pass
    characters: list[str] = []
    position = 0
    while position < len(raw):
        code, n_bytes = _code_point(raw, position)
        characters.append(_REPLACEMENT if code < 0 else chr(code))
        position += n_bytes
    return "".join(characters)


def _code_point(raw: bytes, position: int) -> tuple[int, int]:
    """The code point at ``position``, -1 for none, and how many bytes it takes."""
    lead = raw[position]
    if lead < 0x80:
        return lead, 1
    if lead < 0xC0 or lead >= 0xFE:
        return -1, 1
    length = 8 - (~lead & 0xFF).bit_length()
    code = lead & (0x7F >> length)
    for number in range(1, length):
        following = raw[position + number] if position + number < len(raw) else 0
        if following & 0xC0 != 0x80:
            return -1, number
        code = code << 6 | following & 0x3F
    is_overlong = code < _SMALLEST[length - 2] and not (code == 0 and length == 2)
    is_valid = code <= 0x10FFFF and not is_overlong and not 0xD800 <= code <= 0xDFFF
    return (code if is_valid else -1), length
