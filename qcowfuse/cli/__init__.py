"""The command line: arguments to an open image and a mount; exit codes; the only reader of the environment.

Modules: ``entry`` (where both programs begin), ``main`` (the program), ``serving`` (the process that serves, when
it is one), ``arguments`` (what the user can say) with ``parser``, ``mount_options`` (the list after ``-o``, as
mount(8) passes it), ``image_names`` (which files images may name), ``passphrase`` (of encrypted images),
``exit_codes``, ``failures`` (in words) with ``other_formats`` and ``near_misses`` (what was meant), ``logs``
(standard error, syslog or a file).

The second program, qcowfuse-img: ``img`` (its sub-commands), ``create_options`` (the text of what to make),
``img_output`` (JSON and text), ``json_text``, ``img_progress``, ``stopping`` (by signals).
"""
