"""Partition tables, sans I/O: bytes of a disk to partitions.

Modules: ``values`` (what is found, and how it is asked for), ``table`` (which table a disk has, and which of its
partitions can be used), ``gpt``, ``mbr``, ``overlaps``, ``type_names``, ``file_systems`` (what a partition holds).

1. Nothing here reads. A function that needs bytes is a generator: it yields a place and gets the bytes (see
   :data:`~qcowfuse.partitions.values.Look`).
2. Every number in a table is distrusted. What a table cannot mean (a partition that lies over another one, over the
   table, or beyond the disk) is named in :attr:`~qcowfuse.partitions.values.Partition.problem`, and such a partition
   is listed, but never used.
3. Which table counts, and the numbers of partitions, are the kernel's (``block/partitions/efi.c``, ``msdos.c``): a
   GPT needs a protective MBR; logical partitions count from 5.
4. What is read is bounded: an array of GPT entries by :data:`~qcowfuse.partitions.gpt.MAX_ENTRY_BYTES`, logical
   partitions by :data:`~qcowfuse.partitions.mbr.MAX_LINKS`.
"""
