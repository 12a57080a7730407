"""Sizes as people read them."""

from __future__ import annotations


def size_text(n_bytes: int) -> str:
    """``1.5 GiB``: three digits that mean something, as qemu-img shows sizes."""
    value, units = float(n_bytes), iter(("B", "KiB", "MiB", "GiB", "TiB", "PiB"))
    unit = next(units)
    while value >= 1000:
        value, unit = value / 1024, next(units, "EiB")
        if unit == "EiB":
            break
    return f"{value:.3g} {unit}"
