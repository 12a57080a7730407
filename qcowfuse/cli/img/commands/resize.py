"""``qcowfuse-img resize``."""

from __future__ import annotations

import os

from ....driver.chain import open_image
from ....errors import ImageUsageError
from ....printable import printable
from ...image_names import options_of_names
from ...passphrase import KeySource
from ...size_text import size_text
from ...stopping import run_until_stopped
from ..arguments import Given
from ..create_options import parse_size
from ..exit_codes import ImgExit


def run(given: Given) -> int:
    """Make the disk larger."""
    options = options_of_names(given)._replace(ignore_locks=given.ignore_locks)
    key = KeySource(given.key_file, os.environ)
    key.prepare(given.image, options)

    async def work() -> int:
        if given.size.startswith(("-", "+-")):
            raise ImageUsageError(f"{given.image}: a disk cannot be made smaller (qemu-img resize --shrink can)")
        wanted = parse_size(given.size.removeprefix("+"))
        with key.explained():
            image = await open_image(given.image, options._replace(passphrase=key))
        try:
            before = image.size
            await image.grow(before + wanted if given.size.startswith("+") else wanted)
        finally:
            await image.aclose()
        if not given.quiet:
            change = "had that size already" if image.size == before else f"had {before}"
            print(printable(f"{given.image}: {size_text(image.size)} ({image.size} bytes), {change}"))
        return ImgExit.OK

    return run_until_stopped(work)
