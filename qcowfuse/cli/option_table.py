"""A row of a program's table of options, from which its parser, its help and the list after ``-o`` come."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import argparse


class Option(NamedTuple):
    """An option by its long ``name`` (without dashes); a name of one letter has no long form.

    ``metavar`` is empty for a flag. ``convert`` makes a value of the text and raises ValueError. ``is_repeated``: all
    values count, not the last. ``is_optional``: the value may be left out, and the text is empty then; with dashes it
    stands behind an equals sign, which the program takes care of. ``group`` is the heading in the help. ``in_list``
    and ``on_command_line`` say where the option may stand: in the list after ``-o``, and by itself with dashes.
    """

    name: str
    help: str
    group: str = ""
    short: str = ""
    metavar: str = ""
    convert: Callable[[str], Any] = str
    is_repeated: bool = False
    is_optional: bool = False
    in_list: bool = True
    on_command_line: bool = True

    @property
    def key(self) -> str:
        """The name as argparse keeps it."""
        return self.name.replace("-", "_")


def add_options(parser: argparse._ActionsContainer, options: Iterable[Option]) -> None:
    """Add those of ``options`` that may stand on a command line, under the headings of their groups."""
    groups: dict[str, argparse._ActionsContainer] = {"": parser}
    for option in options:
        if not option.on_command_line:
            continue
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        names = [f"-{option.short}"] if option.short else []
        names.append(f"-{option.name}" if len(option.name) == 1 else f"--{option.name}")
        if not option.metavar:
            groups[option.group].add_argument(*names, action="store_true", help=option.help)
        elif option.is_optional:
            groups[option.group].add_argument(*names, action="store_const", const="", help=option.help)
        elif option.is_repeated:
            groups[option.group].add_argument(
                *names, metavar=option.metavar, action="append", default=[], help=option.help
            )
        else:
            groups[option.group].add_argument(*names, metavar=option.metavar, help=option.help)
