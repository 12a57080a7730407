"""docs/troubleshooting.md explains every message that a user can cause, and none that there is not."""

from __future__ import annotations

import re
from collections import Counter

from tests.support.messages import Message, messages, plain, structures
from tests.support.mounting import REPOSITORY

PACKAGE = REPOSITORY / "qcowfuse"
PAGE = REPOSITORY / "docs" / "troubleshooting.md"
NO_MESSAGES = {
    "... and {} more",  # findings of a check
    "{} (qcowfuse {} --help says more)",  # behind a message
    "unrecognized arguments: {}{}",  # argparse's words, in place of which cli.near_misses puts others
}


def explained() -> list[str]:
    """The messages of the page: headings and items that are nothing but a message, with {} for what is put in."""
    found = re.findall(r"^(?:#+|-) `([^`]+)`$", PAGE.read_text(), re.MULTILINE)
    return [plain(re.sub(r"<[^<>]+>", "{}", text)) for text in found]


def key(text: str) -> str:
    """What a message is known by: parts that are put in one behind the other are one."""
    return re.sub(r"(\{\})+", "{}", plain(text).replace("%%", "%")).strip()


def test_each_message_is_explained_once() -> None:
    """A message of the program has its place, and a text that is explained is one of the program."""
    known = {key(message.text): message for message in messages(PACKAGE) if message.text not in NO_MESSAGES}
    told = Counter(map(key, explained()))
    without = [f"{known[text].module}: {text}" for text in known if text not in told]
    assert not without, "docs/troubleshooting.md says nothing of:\n" + "\n".join(without)
    stale = [text for text in told if text not in known]
    assert not stale, "docs/troubleshooting.md explains what is not said any more:\n" + "\n".join(stale)
    assert [text for text, n in told.items() if n > 1] == []


def test_each_structure_that_may_be_wrong_is_named() -> None:
    """The list of structures under "A damaged image" is that of the program."""
    section = PAGE.read_text().partition("\n## A damaged image\n")[2].partition("\n\nMake a copy")[0]
    listed = section.partition("one of these:")[2]
    assert set(re.findall(r"`([^`]+)`", listed)) == structures(PACKAGE)


def test_the_collection_sees_what_it_has_to() -> None:
    """Texts from a variable, a function, a condition and a log; of an image that is wrong, the structure alone."""
    texts = {message.text for message in messages(PACKAGE)}
    assert "mount point does not exist" in texts  # returned by a function
    assert "names {} {}, outside of its own folder: not opened" in texts  # from a variable
    assert "{} needs compat=1.1" in texts  # a condition
    assert "not a file of root's that only root may write to; ignored" in texts  # logged
    assert Message("cli/mount/arguments.py", "allow_other and allow_root exclude each other") in messages(PACKAGE)
    assert len(texts) > 150
    assert {"L2 entry", "refcount", "header"} <= structures(PACKAGE)
