"""The program qcowfuse-img: ``main``, ``arguments`` with their ``parser``, ``commands`` (a module for each).

What these share: ``exit_codes``, ``create_options`` (the text of what to make), ``snapshot_text`` (JSON and text),
``progress``.
"""
