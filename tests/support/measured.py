"""Which tests scripts/coverage measures; scripts/test runs all others without coverage, each test once.

1. Measured is what covers most for its time. Coverage makes tests of the driver take two to three times as long.
2. Of a sweep, a function that does the same with many images, only those cases are measured that take branches of the
   rooms in ``HELD`` (scripts/coverage) that no shorter test takes. All its other cases are run without coverage.
"""

from __future__ import annotations

from typing import Final

MEASURED: Final = (
    "tests/unit",
    "tests/driver",
    "tests/export",
    "tests/interop/test_bitmaps.py",
    "tests/crash/test_growing_cuts.py",
    "tests/crash/test_bitmaps.py",
)
SWEEPS: Final[dict[str, tuple[str, ...]]] = {
    "tests/crash/test_bitmaps.py::test_a_power_cut_leaves_no_bitmap_that_lies": (),
    "tests/crash/test_bitmaps.py::test_a_power_cut_while_bitmaps_grow": ("refcount-64",),
    "tests/crash/test_bitmaps.py::test_every_operation_may_fail": ("full-False-inline-for ever",),
    "tests/crash/test_growing_cuts.py::test_a_power_cut_while_the_disk_grows": (),
    "tests/crash/test_growing_cuts.py::test_a_power_cut_while_the_disk_grows_among_writers": (),
    "tests/crash/test_growing_cuts.py::test_growing_fails_at_any_operation": ("snapshot-5", "extended-28"),
    "tests/driver/test_cancellation.py::test_cancelled_at_every_step": (),
    "tests/driver/test_discard_of_zeroes.py::test_space_of_zeroed_clusters_is_given_back": (),
    "tests/driver/test_holes.py::test_extents_are_those_of_all_sectors": ("v2-True",),
    "tests/driver/test_metadata_space.py::test_what_is_allocated_can_be_written": ("1-steps1-False",),
    "tests/driver/test_partition_window.py::test_the_window_is_the_partition_and_nothing_else": (),
    "tests/driver/test_random_operations.py::test_any_operations_read_back_as_from_a_bytearray": (),
    "tests/driver/test_random_operations.py::test_qemu_agrees_after_many_writes": ("v2-compressed",),
    "tests/driver/test_reserving.py::test_a_full_disk_leaves_nothing_behind": ("extended",),
    "tests/interop/test_bitmaps.py::test_qemu_sees_exactly_what_was_changed": (),
    "tests/unit/test_presence.py::test_runs_are_of_one_kind_and_as_long_as_that": ("data file",),
}
"""The function of a sweep, and the cases of it that are measured."""


def is_measured(node_id: str) -> bool:
    """Whether scripts/coverage runs the test; ``node_id`` is pytest's."""
    function, _, case = node_id.partition("[")
    return _is_below(function.partition("::")[0]) and (
        function not in SWEEPS or case.removesuffix("]") in SWEEPS[function]
    )


def is_measured_whole(path: str) -> bool:
    """Whether ``path``, relative to the repository, is a file all of whose tests are measured."""
    return (
        path.endswith(".py") and _is_below(path) and not any(function.startswith(f"{path}::") for function in SWEEPS)
    )


def _is_below(path: str) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in MEASURED)
