"""Which option may have been meant by one that does not exist."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` (did you mean X?)``, or nothing where nothing is near."""
    from difflib import get_close_matches

    plain = {_plain(name): name for name in known}
    near = get_close_matches(_plain(word), plain, n=1, cutoff=0.7)
    return f" (did you mean {plain[near[0]]}?)" if near else ""


def _plain(word: str) -> str:
    return word.lower().replace("-", "").replace("_", "")


def with_near_misses(message: str, parser: argparse.ArgumentParser) -> str:
    """argparse's message about arguments that it does not know, with the options that may have been meant."""
    _, separator, words = message.partition("unrecognized arguments: ")
    unknown = [word.split("=")[0] for word in words.split() if word.startswith("-")]
    if not separator or not unknown:
        return message
    return f"unknown option {unknown[0]}{did_you_mean(unknown[0], _long_options(parser))}"


def _long_options(parser: argparse.ArgumentParser) -> Iterator[str]:
    import argparse

    for action in parser._actions:
        yield from (name for name in action.option_strings if name.startswith("--"))
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _long_options(command)
