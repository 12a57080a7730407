"""The program qcowfuse: ``main`` (the starter), ``serving`` (the process that serves), ``arguments`` (a command line
that makes sense) from ``options`` (the table of all options) with ``values`` (their texts), ``parser`` (argparse) and
``mount_options`` (the list after ``-o``, as mount(8) passes it), ``listening`` (the
socket of metrics), ``failures`` (in one line).
"""
