"""What touches libfuse or pyfuse3 beyond their public interface, and nothing else does.

Modules: ``session_hook`` and ``init_reply`` (the parameters of the FUSE connection that pyfuse3 leaves alone),
``extra_operations`` (fallocate and lseek), ``request_wait`` (a cheaper wait for requests), ``direct_requests`` (a
shorter way for what need not wait).
"""
