"""A case: which subject, which of its fields are changed to what, and what is then done with it.

1. A case is plain values. It prints as the line of Python that makes it, which can be kept among the reproducers.
2. Changes are ``(place, value)``, done one after the other. A place is the name of a field, ``@N`` (the byte at N),
   ``insert@N`` (the value's bytes are put in there) or ``cut`` (the length, at most what it is).
3. The same random generator gives the same case, in every process.
"""

from __future__ import annotations

import ast
import random
import re
from functools import cache
from typing import Any, NamedTuple

from .subjects import Subject, subject

Change = tuple[str, int]
Step = tuple[Any, ...]
MAX_CHANGES = 5
_INTERESTING = (0, 1, 2, 7, 8, 9, 13, 16, 21, 22, 31, 63, 64, 72, 104, 112, 511, 512, 1023, 1024, 4096, 65535, 65536,
                1 << 21, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 56) - 512, 1 << 63, (1 << 64) - 1)  # fmt: skip


class Case(NamedTuple):
    """One try. ``target``: a parser's name, ``whole`` or ``qemu``; ``steps``: what is done with a whole image."""

    target: str
    subject: str
    changes: tuple[Change, ...] = ()
    steps: tuple[Step, ...] = ()
    suspend: bool = False

    def __repr__(self) -> str:
        values = [self.target, self.subject, self.changes, self.steps, self.suspend]
        while len(values) > 2 and not values[-1]:
            values.pop()
        return f"Case({', '.join(map(repr, values))})"


def parse_case(text: str) -> Case:
    """The case in a line as ``repr`` gives it. Raises ValueError, SyntaxError."""
    text = text.strip().rstrip(",")
    if not text.startswith("Case(") or not text.endswith(")"):
        raise ValueError("expected a line Case(...)")
    return Case(*ast.literal_eval(f"({text[5:-1]},)"))


def changed(case: Case) -> Subject:
    """The subject of a case with its changes done."""
    start = subject(case.subject)
    data = bytearray(start.data)
    for place, value in case.changes:
        if place == "cut":
            del data[value:]
        elif place.startswith("insert@"):
            at = int(place[7:])
            data[at:at] = value.to_bytes(max(1, (value.bit_length() + 7) // 8), "big")
        elif place.startswith("@"):
            data[int(place[1:]) : int(place[1:]) + 1] = bytes([value & 0xFF])
        else:
            offset, n_bytes = start.fields[place]
            data[offset : offset + n_bytes] = (value & (1 << 8 * n_bytes) - 1).to_bytes(n_bytes, "big")
    return Subject(data, start.fields, start.files, start.cluster_size)


@cache
def groups(name: str) -> tuple[tuple[str, ...], ...]:
    """The fields of a subject, those that differ only in their numbers together."""
    found: dict[str, list[str]] = {}
    for field in subject(name).fields:
        found.setdefault(re.sub(r"\d+", "#", field), []).append(field)
    return tuple(tuple(fields) for fields in found.values())


def random_changes(chooser: random.Random, name: str, *, raw: float = 0.1) -> tuple[Change, ...]:
    """One to five changes; ``raw``: the share of those of a single byte wherever it is."""
    start = subject(name)
    changes: list[Change] = []
    for _ in range(min(1 + int(chooser.expovariate(0.8)), MAX_CHANGES)):
        kind = chooser.random()
        if kind < 0.03:
            changes.append(("cut", chooser.randrange(len(start.data) + 1)))
        elif kind < 0.03 + raw or not start.fields:
            changes.append((f"@{chooser.randrange(len(start.data))}", chooser.randrange(256)))
        else:
            field = chooser.choice(chooser.choice(groups(name)))
            changes.append((field, random_value(chooser, start, field)))
    return tuple(changes)


def random_value(chooser: random.Random, start: Subject, field: str) -> int:
    """A value that a field could be feared to have: extremes, neighbours, one bit off, those of other fields."""
    offset, n_bytes = start.fields[field]
    old = int.from_bytes(start.data[offset : offset + n_bytes], "big")
    kind = chooser.randrange(7)
    if kind == 0:
        value = chooser.choice(_INTERESTING)
    elif kind == 1:
        value = old ^ 1 << chooser.randrange(8 * n_bytes)
    elif kind == 2:
        value = old + chooser.choice((-1, 1, -8, 8, -512, 512, start.cluster_size, -start.cluster_size))
    elif kind == 3:
        at, n_other = start.fields[chooser.choice(list(start.fields))]
        value = int.from_bytes(start.data[at : at + n_other], "big")
    elif kind == 4:
        flags = chooser.choice((0, 0, 1, 1 << 63, 1 << 63 | 1, 1 << 62))
        value = chooser.randrange(len(start.data) // start.cluster_size + 4) * start.cluster_size | flags
    elif kind == 5:
        value = chooser.choice((0, (1 << 8 * n_bytes) - 1, 1 << 8 * n_bytes - 1))
    else:
        value = chooser.getrandbits(8 * n_bytes)
    return value & (1 << 8 * n_bytes) - 1


OFFLINE = ("create", "apply", "delete", "check", "repair-leaks", "repair-all", "info", "map")


def random_steps(chooser: random.Random, size: int) -> tuple[Step, ...]:
    """What a user could do with an image of ``size`` bytes, in any order; ``rw`` and ``ro`` open it."""
    steps: list[Step] = [(chooser.choice(("rw", "rw", "ro")),)]
    for _ in range(chooser.randint(1, 14)):
        kind = chooser.random()
        n_bytes = chooser.choice((1, 512, 4096, 5000, 40_000))
        offset = chooser.randrange(max(1, size - n_bytes // 2))
        if chooser.random() < 0.3:
            offset = offset // 4096 * 4096
        if kind < 0.25:
            steps.append(("read", offset, n_bytes))
        elif kind < 0.55:
            steps.append(("write", offset, n_bytes, chooser.randrange(256)))
        elif kind < 0.68:
            steps.append((chooser.choice(("zero", "discard")), offset, chooser.choice((n_bytes, 65536, size))))
        elif kind < 0.74:
            steps.append(("flush",))
        elif kind < 0.79:
            steps.append(("extent", offset, n_bytes))
        elif kind < 0.83:
            steps.append(("grow", chooser.choice((size + 512, 2 * size, size + 777 * 512, 1 << 30, 1 << 62))))
        elif kind < 0.97:
            steps.append((chooser.choice(OFFLINE),))
        else:
            steps.append((chooser.choice(("rw", "ro")),))
    return tuple(steps)
