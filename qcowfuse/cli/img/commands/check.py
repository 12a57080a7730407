"""``qcowfuse-img check``."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from ....consistency.compare import LEAK
from ....consistency.result import CheckResult, Fix
from ....printable import print_error, printable
from ....tools.check import check_image
from ....tools.info import is_version_1
from ...stopping import run_alone_until_stopped, run_until_stopped
from ..arguments import Given
from ..exit_codes import ImgExit
from ..progress import ProgressLine

MAX_LEAKS = 20
MAX_FINDINGS = 1000
"""Leaks, and other findings, of a check that are printed; all are counted."""
_REPAIRS = {"leaks": Fix.LEAKS, "all": Fix.ALL}


def run(given: Given) -> int:
    """Check the image and print the findings; with ``-r``, mend them."""
    fix = _REPAIRS.get(given.repair, Fix.NOTHING)
    if fix and given.force_share:
        print_error(f"qcowfuse-img: {given.image}: -r needs the image for itself: not with -U")
        return ImgExit.FAILED

    async def work() -> int:
        if await is_version_1(given.image, force_share=given.force_share or given.ignore_locks):
            print_error("qcowfuse-img: This image format does not support checks")
            return ImgExit.NOT_SUPPORTED
        n_left_out = 0
        n_printable = {True: MAX_LEAKS, False: MAX_FINDINGS}
        with ProgressLine(sys.stderr, is_wanted=not given.quiet) as progress:

            def report(finding: str) -> None:
                nonlocal n_left_out
                is_leak = finding.startswith(LEAK)
                n_printable[is_leak] -= 1
                if n_printable[is_leak] < 0:
                    n_left_out += 1
                elif not given.quiet:
                    progress.print_above(printable(finding))

            result = await check_image(
                given.image,
                report=report,
                progress=progress.show,
                force_share=given.force_share,
                ignore_locks=given.ignore_locks,
                fix=fix,
            )
        if n_left_out and not given.quiet:
            print_error(f"... and {n_left_out} more")
        if given.output == "json":
            from ...json_text import to_text

            print(to_text(_as_json(given.image, result)))
        elif not given.quiet:
            for line in _lines(result):
                print(line)
        if result.check_errors:
            return ImgExit.FAILED
        if result.corruptions:
            return ImgExit.CORRUPTIONS
        return ImgExit.LEAKS if result.leaks else ImgExit.OK

    return run_until_stopped(work) if fix else run_alone_until_stopped(work)


def _as_json(path: str, result: CheckResult) -> dict[str, Any]:
    """The object that ``qemu-img check --output=json`` prints: counts of 0 are left out, but for errors."""
    found: dict[str, Any] = {"filename": path, "format": "qcow2", "check-errors": result.check_errors}
    counts = {
        "image-end-offset": result.image_end_offset,
        "corruptions": result.corruptions,
        "leaks": result.leaks,
        "leaks-fixed": result.leaks_fixed,
        "corruptions-fixed": result.corruptions_fixed,
        "total-clusters": result.total_clusters,
        "allocated-clusters": result.allocated_clusters,
        "fragmented-clusters": result.fragmented_clusters,
        "compressed-clusters": result.compressed_clusters,
    }
    return found | {name: count for name, count in counts.items() if count}


def _lines(result: CheckResult) -> Iterable[str]:
    """The text of ``check``, after the findings."""
    if result.leaks_fixed or result.corruptions_fixed:
        yield f"Repaired: {result.leaks_fixed} leaked clusters, {result.corruptions_fixed} errors. Checked again:"
    if not (result.corruptions or result.leaks or result.check_errors):
        yield "No errors were found on the image."
    if result.corruptions:
        yield f"{result.corruptions} errors were found on the image: data may be lost."
    if result.leaks:
        yield f"{result.leaks} leaked clusters were found: space is wasted, but no data is harmed."
    if result.check_errors:
        yield f"{result.check_errors} internal errors have occurred during the check."
    if result.total_clusters and result.allocated_clusters:
        yield (
            f"{result.allocated_clusters}/{result.total_clusters} = "
            f"{100 * result.allocated_clusters / result.total_clusters:.2f}% allocated, "
            f"{100 * result.fragmented_clusters / result.allocated_clusters:.2f}% fragmented, "
            f"{100 * result.compressed_clusters / result.allocated_clusters:.2f}% compressed clusters"
        )
    yield f"Image end offset: {result.image_end_offset}"
