"""The verbs of qcowfuse: ``main`` (which one, with what), ``options`` (their tables), ``listing`` (list), ``status``,
``unmounting`` (umount), ``running`` (run), ``mounts`` (what is mounted and who serves it), ``look`` (what a mount
says of itself), ``layout`` (text and JSON).
"""
