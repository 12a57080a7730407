"""The program qcowfuse-img: ``main`` with its sub-commands, ``create_options`` (the text of what to make), ``output``
(JSON and text), ``partitions`` (their listing), ``progress``.
"""
