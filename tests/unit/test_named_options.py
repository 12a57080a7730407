"""Every message that names an option names one that the command in question has.

1. An option behind the name of a program (``qcowfuse -r``, ``qcowfuse-img check -r all``) is that program's.
2. Any other option is one of the command that prints the message: all commands that can print it must have it.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import qcowfuse
from qcowfuse.cli.img.parser import build_parser as build_img_parser
from qcowfuse.cli.mount.mount_options import sort_options
from qcowfuse.cli.mount.options import OPTIONS
from qcowfuse.cli.mount.parser import build_parser
from qcowfuse.cli.verb_names import VERBS
from qcowfuse.cli.verbs.main import build_parser as build_verb_parser
from qcowfuse.cli.verbs.options import VERB_OPTIONS

PACKAGE = Path(qcowfuse.__file__).parent
OTHER_PROGRAMS = {
    "fusermount3",
    "qemu-img",
    "ulimit",
    "apt",
    "systemctl",
    "losetup",
    "mkfs.ext4",
    "mount",
    "umount",
    "fuser",
    "truncate",
}
OPTION = re.compile(r"--?[a-zA-Z][a-z0-9-]*")


def _options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {word for action in parser._actions for word in action.option_strings}


def commands() -> dict[str, set[str]]:
    """The options of each command: ``qcowfuse`` and ``qcowfuse-img info`` and so on."""
    found = {"qcowfuse": _options_of(build_parser())}
    for action in build_img_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {f"qcowfuse-img {name}": _options_of(parser) for name, parser in action.choices.items()}
    return (
        found
        | {f"qcowfuse {verb}": _options_of(build_verb_parser(verb)) for verb in VERBS}
        | {"qcowfuse run": found["qcowfuse"]}
    )


COMMANDS = commands()
OPENS_A_CHAIN = {"qcowfuse", "qcowfuse-img map", "qcowfuse-img resize"}
PRINTED_BY = {
    "cli/img/create_options.py": {"qcowfuse-img create"},
    "cli/img": {name for name in COMMANDS if name.startswith("qcowfuse-img")},
    "tools/overlay.py": {"qcowfuse"},
    "cli/image_names.py": OPENS_A_CHAIN,
    "cli/passphrase.py": {"qcowfuse", "qcowfuse-img create", "qcowfuse-img resize"},
    "cli/verbs/unmounting.py": {"qcowfuse umount"},
    "cli": {"qcowfuse"},
    "driver/chain.py": OPENS_A_CHAIN,
    "driver/layers/data_file.py": OPENS_A_CHAIN,
    "driver/files.py": OPENS_A_CHAIN,
    "tools/create.py": {"qcowfuse-img create"},
    "tools/new_file.py": {"qcowfuse-img create"},
    "tools/snapshot_edit.py": {"qcowfuse-img snapshot"},
    "fuse": {"qcowfuse"},
    "daemon": {"qcowfuse"},
    "system": {"qcowfuse"},
}
"""By module, else by package: the commands that print its messages; all of them where nothing is said."""


def printed_by(module: str) -> set[str]:
    """The commands that print a message of ``module``."""
    own = f"qcowfuse-img {Path(module).stem}"
    if module.startswith("cli/img/commands/") and own in COMMANDS:
        return {own}
    places = (module, *map(str, Path(module).parents))
    return next((PRINTED_BY[place] for place in places if place in PRINTED_BY), set(COMMANDS))


def messages(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of all literal text, with ``{}`` for what is put in; no docstrings."""

    def walk(node: ast.AST) -> Iterator[tuple[int, str]]:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return
        if isinstance(node, ast.JoinedStr):
            parts = (str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
            yield node.lineno, "".join(parts)
            return
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    yield from walk(ast.parse(source))


def wrong_options(text: str, printers: set[str]) -> list[str]:
    """The options named in ``text`` that the command in question has not."""
    wrong = []
    for clause in re.split(r"[;:,()]", text):
        words = clause.split()
        named: str | None = None
        for number, word in enumerate(words):
            if word in ("qcowfuse", "qcowfuse-img") or word in OTHER_PROGRAMS:
                named = word
                if " ".join(words[number : number + 2]) in COMMANDS:
                    named = " ".join(words[number : number + 2])
            elif OPTION.fullmatch(word):
                if named in OTHER_PROGRAMS:
                    continue
                lacking = {name for name in ({named} if named else printers) if word not in COMMANDS.get(name, ())}
                if lacking and word not in ("--help", "-h"):
                    wrong.append(f"{word}: {', '.join(sorted(lacking))} has no such option")
                if word == "-o" and number + 1 < len(words) and "qcowfuse" in ({named} if named else printers):
                    sort_options([words[number + 1]])  # raises for what qcowfuse does not know
    return wrong


MODULES = [str(path.relative_to(PACKAGE)) for path in sorted(PACKAGE.rglob("*.py"))]


@pytest.mark.parametrize("module", MODULES)
def test_messages_name_options_that_there_are(module: str) -> None:
    """All literal text of the module, help included."""
    wrong = []
    for line, text in messages((PACKAGE / module).read_text()):
        if " " in text:
            wrong += [f"{module}:{line}: {each}" for each in wrong_options(text, printed_by(module))]
    assert not wrong, "\n".join(wrong)


def test_sees_what_is_wrong() -> None:
    """An option of another command, an unknown one, and one of mount(8)'s list."""
    assert wrong_options("say so with --backing-format qcow2", OPENS_A_CHAIN) == []
    assert wrong_options("say so with --backing-format qcow2", {"qcowfuse-img info"})
    assert wrong_options("in use; stop it, or open with --read-only", set(COMMANDS))
    assert wrong_options("serve it (qcowfuse -r), or qcowfuse-img check -r all {}", set(COMMANDS)) == []
    assert wrong_options("try qcowfuse-img info -r", {"qcowfuse"})
    assert wrong_options("fusermount3 -u removes it", {"qcowfuse"}) == []
    assert list(messages('def f():\n    """--doc string"""\n    g(f"{x}: use --y")')) == [(3, "{}: use --y")]


def test_every_command_is_known_here() -> None:
    """The table above speaks of commands and modules that exist."""
    assert {name for names in PRINTED_BY.values() for name in names} <= set(COMMANDS)
    assert all((PACKAGE / name).exists() for name in PRINTED_BY)


def test_the_page_of_options_has_a_row_for_each() -> None:
    """The table names each option with its short form and its value, and none that there is not."""
    text = (PACKAGE.parent / "docs/options.md").read_text()
    table = text.partition("\n## ")[0]
    first_cells = " ".join(line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `"))
    for option in OPTIONS:
        if not option.on_command_line:
            assert f"`{option.name}{'=' + option.metavar if option.metavar else ''}`" in table
        elif len(option.name) > 1:
            value = f" {option.metavar}".replace("|", "\\|") if option.metavar else ""
            value = f"[={option.metavar}]" if option.is_optional else value
            assert f"--{option.name}{value}`" in first_cells
            assert not option.short or f"`-{option.short}`, `--{option.name}" in first_cells
    assert set(OPTION.findall(first_cells)) <= commands()["qcowfuse"]


def test_the_page_of_options_has_those_of_the_verbs() -> None:
    """A row for each verb, with its arguments and its options, and none that there is not."""
    rows = (PACKAGE.parent / "docs/options.md").read_text().partition("\n## Verbs\n")[2].partition("\n## ")[0]
    table = {row.split("`")[1].split()[0]: row for row in rows.splitlines() if row.startswith("| `")}
    assert table.keys() == VERB_OPTIONS.keys()
    for name, verb in VERB_OPTIONS.items():
        assert f"| `{name} {verb.arguments}".rstrip().replace("MOUNTPOINT|", "MOUNTPOINT\\|") in table[name]
        assert set(OPTION.findall(table[name])) == {f"--{option.name}" for option in verb.options}
