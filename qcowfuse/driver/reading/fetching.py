"""Fetching extents that are not compressed: at once where they are at hand, together where they are not."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from ...errors import QcowFuseError
from ...format.entries import ClusterKind
from ...format.extents import Extent
from ..layers.mapping import Layer


class Fetcher:
    """Reads extents of ``layers``, the top one first."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.data = tuple(layer.data for layer in layers)
        self._encrypted = tuple(layer.encrypted for layer in layers)

    def try_fetch(self, extent: Extent, part: memoryview) -> bool:
        """Fill ``part``, which is zeroes, with an extent, if that can be done at once."""
        if extent.kind == ClusterKind.DATA:
            return self.data[extent.layer].try_pread_into(extent.value, part)
        if extent.kind == ClusterKind.ENCRYPTED:
            encrypted = self._encrypted[extent.layer]
            assert encrypted is not None
            return encrypted.try_read_into(part, host_offset=extent.value, guest_offset=extent.guest_offset)
        return True

    async def fetch_all(self, waiting: Sequence[tuple[Extent, memoryview]]) -> None:
        """Fill the parts that :meth:`try_fetch` could not, together. Raises OSError, FormatError."""
        if len(waiting) == 1:
            await self._fetch(*waiting[0])
        elif waiting:
            errors: list[Exception] = []
            async with trio.open_nursery() as nursery:
                for extent, part in waiting:
                    nursery.start_soon(self._fetch_noting, extent, part, errors)
            if errors:
                raise errors[0]

    async def _fetch(self, extent: Extent, part: memoryview) -> None:
        if extent.kind == ClusterKind.DATA:
            await self.data[extent.layer].pread_into(extent.value, part)
            return
        encrypted = self._encrypted[extent.layer]
        assert encrypted is not None
        await encrypted.read_into(part, host_offset=extent.value, guest_offset=extent.guest_offset)

    async def _fetch_noting(self, extent: Extent, part: memoryview, errors: list[Exception]) -> None:
        try:
            await self._fetch(extent, part)
        except (OSError, QcowFuseError) as error:
            errors.append(error)
