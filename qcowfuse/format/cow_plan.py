"""What a guest write has to do, as a pure function of the request and the L2 entries it meets.

1. A plan covers clusters of one L2 slice that are treated alike: all in place, all filled anew.
2. In place: the host bytes are contiguous and owned alone; nothing but the data is written.
3. Allocate: head and tail are what the clusters at both ends held around the data; head + data + tail is whole
   clusters. Zero clusters that own a host cluster are filled where they are.
"""

from __future__ import annotations

from array import array
from enum import Enum
from typing import NamedTuple

from .entries import EntryFormat

MAX_CLUSTERS_PER_ALLOCATION = 4096


class Action(Enum):
    """How the first clusters of a write are served."""

    IN_PLACE = 1
    ALLOCATE = 2
    REUSE = 3


class CowPlan(NamedTuple):
    """``n_clusters`` clusters from the entry asked about; ``host_offset`` of the first one for IN_PLACE and REUSE.

    ``head`` and ``tail`` are the bytes before and after the data that complete whole clusters (subclusters with
    extended L2 entries); ``n_bytes`` of the request are served by this plan.
    """

    action: Action
    n_clusters: int
    host_offset: int
    head: int
    n_bytes: int
    tail: int


def plan_write(entries: array[int], entry_format: EntryFormat, index: int, in_cluster: int, n_bytes: int) -> CowPlan:
    """Plan the start of a write of ``n_bytes`` at byte ``in_cluster`` of the cluster of ``entries[index]``.

    Raises CorruptImageError for an impossible entry.
    """
    cluster_bits = entry_format.cluster_bits
    cluster_size = 1 << cluster_bits
    mask, value = entry_format.in_place_mask, entry_format.in_place_value
    offset_mask, cluster_mask = entry_format.offset_mask, entry_format.cluster_mask
    wanted = min((in_cluster + n_bytes + cluster_size - 1) >> cluster_bits, len(entries) - index)
    entry = entries[index]
    if entry & mask == value and entry & cluster_mask:
        action = Action.IN_PLACE
        entry_format.classify(entry)
    elif entry_format.is_reusable_zero(entry):
        action = Action.REUSE
    else:
        action = Action.ALLOCATE
        wanted = min(wanted, MAX_CLUSTERS_PER_ALLOCATION)
        entry_format.classify(entry)
    host_offset = entry & offset_mask if action is not Action.ALLOCATE else 0
    n_clusters = 1
    while n_clusters < wanted:
        entry = entries[index + n_clusters]
        if action is Action.ALLOCATE:
            if (entry & mask == value and entry & cluster_mask) or entry_format.is_reusable_zero(entry):
                break
            entry_format.classify(entry)
        elif entry & offset_mask != host_offset + (n_clusters << cluster_bits) or not (
            entry & mask == value if action is Action.IN_PLACE else entry_format.is_reusable_zero(entry)
        ):
            break
        n_clusters += 1
    served = min(n_bytes, (n_clusters << cluster_bits) - in_cluster)
    tail = (n_clusters << cluster_bits) - in_cluster - served
    return CowPlan(action, n_clusters, host_offset, in_cluster, served, tail)


def shortened(plan: CowPlan, n_clusters: int, in_cluster: int, cluster_bits: int) -> CowPlan:
    """The same plan for fewer clusters; ``in_cluster`` is where the data begins in the first one."""
    if n_clusters >= plan.n_clusters:
        return plan
    return plan._replace(n_clusters=n_clusters, n_bytes=(n_clusters << cluster_bits) - in_cluster, tail=0)
