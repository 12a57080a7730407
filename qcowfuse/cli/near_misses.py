"""What somebody may have meant who wrote an option that there is not."""

from __future__ import annotations

from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` (did you mean X?)``, or nothing where nothing is near."""
    from difflib import get_close_matches

    plain = {_plain(name): name for name in known}
    near = get_close_matches(_plain(word), plain, n=1, cutoff=0.7)
    return f" (did you mean {plain[near[0]]}?)" if near else ""


def _plain(word: str) -> str:
    return word.lower().replace("-", "").replace("_", "")
