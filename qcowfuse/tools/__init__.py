"""Images at rest: what ``qcowfuse-img`` does, without a command line around it, and overlays over an image.

1. A tool opens what it was given and nothing that the image names, unless the caller's options allow it.
2. What changes an image does so by one write of its header, or makes a new file beside it (``new_file``).

Modules: ``peek`` (before there is an event loop), ``info`` (what an image says about itself), ``extent_map`` with
``layer_runs`` (what lies where), ``check``, ``create`` with ``new_file`` and ``create_encryption`` (new images),
``snapshot_edit`` with ``shadow_refcounts`` (internal snapshots), ``overlay`` (where the writes to a served image go
that is only read).
"""
