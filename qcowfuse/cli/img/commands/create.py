"""``qcowfuse-img create``."""

from __future__ import annotations

import sys

from ....printable import printable
from ....tools.create import create_image
from ...size_text import size_text
from ...stopping import run_alone_until_stopped
from ..arguments import Given
from ..create_options import parse_create_options
from ..exit_codes import ImgExit
from ..progress import ProgressLine


def run(given: Given) -> int:
    """Make an image."""
    options = parse_create_options(
        given.format, given.options, size=given.size, backing_file=given.backing, backing_format=given.backing_format
    )
    passphrase: bytearray | None = None
    if options.encryption is not None:
        from ...passphrase import ask_for_new, read_key_file

        passphrase = ask_for_new(given.image) if given.key_file is None else read_key_file(given.key_file)
    try:
        with ProgressLine(sys.stderr, is_wanted=not given.quiet) as progress:
            created = run_alone_until_stopped(
                lambda: create_image(
                    given.image,
                    options,
                    overwrite=given.force,
                    progress=progress.show,
                    passphrase=passphrase,
                )
            )
    finally:
        if passphrase is not None:
            passphrase[:] = bytes(len(passphrase))
    if not given.quiet:
        print(printable(f"{given.image}: {given.format} image of {size_text(created)}"))
    return ImgExit.OK
