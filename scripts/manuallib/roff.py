"""The sources of the man pages, in a small part of Markdown, as roff for man(7).

1. What is understood: ``# Heading``, ``## Heading``, paragraphs, blocks indented by four columns, ``- `` items,
   ``term`` over ``: definition``, and within text **bold**, *italic* and `code`, which is bold.
2. ``{{name}}`` on a line of its own is replaced by a part that comes from the parsers, already roff.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from .commands import Command, Flag

_FONTS = (("**", r"\fB"), ("`", r"\fB"), ("*", r"\fI"))
_TOKEN = re.compile(r"`([^`]+)`|\*\*([^*]+)\*\*|\*([^*\s][^*]*)\*")
_SPECIAL = {"\\": r"\e", "-": r"\-", "'": r"\(aq", "`": r"\(ga", "^": r"\(ha", "~": r"\(ti", '"': r"\(dq"}


def page(source: str, name: str, section: int, parts: Mapping[str, str]) -> str:
    """The man page for one source."""
    title = f'.TH {name.upper()} {section} "" "qcowfuse" "{"User Commands" if section == 1 else "System Manager"}"'
    lines = [rf".\" Made by scripts/manual from docs/man/{name}.{section}.md and the parsers. Do not edit.", title]
    for block in re.split(r"\n{2,}", source.strip("\n")):
        lines += _block(block.split("\n"), parts)
    lines = [line for line in lines if line]
    needless = {at + 1 for at, line in enumerate(lines) if line.startswith(".SH") and lines[at + 1] == ".PP"}
    return "\n".join(line for at, line in enumerate(lines) if at not in needless) + "\n"


def _block(lines: list[str], parts: Mapping[str, str]) -> list[str]:
    first = lines[0]
    if match := re.fullmatch(r"\{\{(.*)\}\}", first):
        return [parts[match[1]].rstrip("\n")]
    if first.startswith("## "):
        return [f".SS {text(first[3:])}", *_following(lines[1:], parts)]
    if first.startswith("# "):
        return [f".SH {first[2:].upper()}", *_following(lines[1:], parts)]
    if first.startswith("    "):
        return [".PP", ".RS 4", ".EX", *(_plain(line[4:], is_code=True) for line in lines), ".EE", ".RE"]
    if first.startswith("- "):
        items = re.split(r"^- ", "\n".join(lines), flags=re.MULTILINE)[1:]
        return [line for item in items for line in (r".IP \(bu 2", text(" ".join(item.split())))]
    if len(lines) > 1 and lines[1].startswith(": "):
        return [".TP", text(first), text(" ".join(" ".join(lines)[len(first) + 3 :].split()))]
    return [".PP", text(" ".join(lines))]


def _following(lines: list[str], parts: Mapping[str, str]) -> list[str]:
    return _block(lines, parts) if lines else []


def text(words: str) -> str:
    """A line of text with its fonts."""
    found, place = "", 0
    for match in _TOKEN.finditer(words):
        found += _plain(words[place : match.start()])
        code, bold, italic = match.groups()
        found += rf"\fI{_plain(italic)}\fR" if italic else rf"\fB{_plain(code or bold, is_code=True)}\fR"
        place = match.end()
    return _guarded(found + _plain(words[place:]))


def _plain(words: str, *, is_code: bool = False) -> str:
    # A hyphen within a word of prose stays one; a dash of an option is a minus, so that it can be copied.
    special = _SPECIAL if is_code else {**_SPECIAL, "-": "-", "'": "'"}
    escaped = "".join(special.get(character, character) for character in words)
    if not is_code:
        escaped = re.sub(r"(?<![\w-])(--?)(?=\w)", lambda match: match[1].replace("-", r"\-"), escaped)
    return _guarded(escaped) if is_code else escaped


def _guarded(line: str) -> str:
    return rf"\&{line}" if line.startswith((".", "'")) else line


def flags(given: Iterable[Flag], *, groups: bool = True) -> str:
    """Options as a list, under the headings of their groups."""
    lines: list[str] = []
    group = "options"
    for flag in given:
        if groups and flag.group not in (group, ""):
            group = flag.group
            lines.append(f".SS {text(group[:1].upper() + group[1:])}")
        names = ", ".join(rf"\fB{_plain(name, is_code=True)}\fR" for name in flag.names)
        separator = "=" if not flag.names[0].startswith("-") else " "
        value = rf"{separator}\fI{_plain(flag.metavar, is_code=True)}\fR" if flag.metavar else ""
        lines += [".TP", names + value, text(sentence(flag.help))]
    return "\n".join(lines)


def commands(program: Command) -> str:
    """Each command of a program with its synopsis, what it does and its options, but for those of the program."""
    shown = {flag.names for flag in program.flags}
    lines: list[str] = []
    for command in program.commands:
        lines += [
            f".SS {_plain(command.name)}",
            rf"\fB{_plain(program.name, is_code=True)} {_plain(command.name, is_code=True)}\fR "
            + _plain(command.synopsis, is_code=True),
            ".PP",
            text(sentence(" ".join(command.description.split()))),
            flags(
                (flag for flag in command.flags if flag.names not in shown and "--help" not in flag.names),
                groups=False,
            ),
        ]
    return "\n".join(line for line in lines if line)


def codes(explanations: Mapping[int, str]) -> str:
    """Exit codes."""
    return "\n".join(f".TP\n\\fB{int(code)}\\fR\n{text(sentence(words))}" for code, words in explanations.items())


def sentence(words: str) -> str:
    """A help text as a sentence."""
    if not words:
        return ""
    # A name (io_uring) or a command (truncate -s) keeps its first letter.
    start = words if re.match(r"\w*([_A-Z=]| -)", words) else words[:1].upper() + words[1:]
    return start if start.endswith((".", "!", "?")) else start + "."
