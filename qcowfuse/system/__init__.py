"""What Linux offers and the standard library lacks, for the layers above, and nothing about images or FUSE.

1. Each module stands for itself and imports nothing of the package but ``errors``.
2. What a kernel or a C library does not have is an exception that says so; the caller decides what to do without it.

Modules: ``mountinfo`` (the table of mounts), ``import_slot`` (divert a function that a shared object imports),
``landlock``, ``seccomp`` with ``syscall_numbers``, ``privileges`` (capabilities, core dumps), ``every_thread`` (run
something in each thread), ``short_wait`` (a wait that is shorter than a turn of the event loop), ``alone``
(coroutines without an event loop), ``late_logging`` (loggers that cost nothing until they are used).
"""
