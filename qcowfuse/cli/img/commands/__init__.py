"""The commands of qcowfuse-img, a module for each, which has ``run``: ``info``, ``map``, ``check``, ``create``,
``resize``, ``snapshot``, ``partitions``. The program imports the one that it was asked for.
"""
