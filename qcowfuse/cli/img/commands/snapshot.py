"""``qcowfuse-img snapshot``."""

from __future__ import annotations

import sys

from ....errors import ImageUsageError
from ....tools.info import listing_snapshots
from ...stopping import run_alone_until_stopped, run_until_stopped
from ..arguments import Given
from ..exit_codes import ImgExit
from ..progress import ProgressLine


def run(given: Given) -> int:
    """List the snapshots, or change one."""
    if given.create is None and given.apply is None and given.delete is None:
        return run_alone_until_stopped(lambda: _list(given))
    if given.force_share:
        raise ImageUsageError(
            f"{given.image}: -U goes with -l alone: nobody else may have an image open that changes"
        )
    return run_until_stopped(lambda: _change(given))


async def _list(given: Given) -> int:
    shares = given.force_share or given.ignore_locks
    async with listing_snapshots(given.image, force_share=shares) as (n_snapshots, snapshots):
        if given.output == "json":
            from ...json_text import write_json
            from ..snapshot_text import snapshots_json

            await write_json(snapshots_json(snapshots), sys.stdout.write)
            print()
        elif n_snapshots:
            from ..snapshot_text import SNAPSHOT_HEADING, snapshot_line

            print("Snapshot list:")
            print(SNAPSHOT_HEADING)
            async for snapshot in snapshots:
                print(snapshot_line(snapshot))
    return ImgExit.OK


async def _change(given: Given) -> int:
    from ....driver.files import open_ignoring_locks, open_storage
    from ....tools.snapshot_edit import apply_snapshot, create_snapshot, delete_snapshot

    image: str = given.image
    opener = open_ignoring_locks if given.ignore_locks else open_storage
    with ProgressLine(sys.stderr, is_wanted=not given.quiet) as progress:
        if given.create is not None:
            await create_snapshot(image, given.create, progress=progress.show, opener=opener)
        elif given.apply is not None:
            await apply_snapshot(image, given.apply, progress=progress.show, opener=opener)
        else:
            await delete_snapshot(image, given.delete, progress=progress.show, opener=opener)
    return ImgExit.OK
