"""argparse's parser, which takes no option for one that was given without its value.

Python before 3.13 strikes ``--`` out of the values of an option, be it the only one (``--name=--``), and hands over a
list of none.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


class _Store(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if values == []:
            raise argparse.ArgumentError(self, "expected one argument, not --")
        self.store(namespace, values)

    def store(self, namespace: argparse.Namespace, value: Any) -> None:
        setattr(namespace, self.dest, value)


class _Append(_Store):
    def store(self, namespace: argparse.Namespace, value: Any) -> None:
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or ()), value])


class ArgumentParser(argparse.ArgumentParser):
    """See the module docstring."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("action", None, _Store)
        self.register("action", "store", _Store)
        self.register("action", "append", _Append)
