"""The program qcowfuse: ``main`` (the starter), ``serving`` (the process that serves), ``arguments`` (what the user
can say) with ``parser``, ``failures`` (in one line) and ``mount_options`` (the list after ``-o``, as mount(8) passes
it).
"""
