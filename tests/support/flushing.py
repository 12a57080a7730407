"""A flush as the mount asks for it."""

from __future__ import annotations

from qcowfuse.driver.image import Image


async def flush_image(image: Image) -> None:
    """At once if that can be, else awaited. Raises what the image raises."""
    if not image.try_flush():
        await image.flush()
