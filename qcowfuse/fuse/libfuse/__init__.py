"""What touches libfuse or pyfuse3 beyond their public interface, and nothing else does.

``extended_session`` is the facade: one session with everything that can be had, and the state of each part, which
``features`` lists. Below it: ``session_hook`` (gets between pyfuse3 and libfuse), ``operations_table`` and
``extra_operations`` (fallocate, lseek and copies), ``connection`` and ``init_reply`` (what is negotiated with the
kernel), ``request_wait`` (a cheaper wait for requests), ``direct_requests`` (a shorter way for what need not wait;
``attribute_messages`` has two of its messages, ``request_memory`` what they are read into, ``replies`` the answers,
those of other threads too), ``callbacks`` (functions that libfuse calls).
"""
