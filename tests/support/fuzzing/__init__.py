"""What ``scripts/fuzz`` and its replay in the tests are made of.

1. Everything starts from a *subject*: bytes built here field by field, with the name and place of every field
   (``subjects``). A case is a list of changes to fields and a list of steps (``cases``), so that what it found can be
   read, shrunk and kept without a blob.
2. ``parsers`` and ``whole`` run a case; ``differential`` asks QEMU as well. Each gives what is wrong as one line,
   None for nothing.
3. ``workers`` runs many cases in processes with limits on memory and time.
"""
