"""The command line: arguments to an open image and a mount; exit codes; the only reader of the environment.

The two programs are the packages ``mount`` (qcowfuse) and ``img`` (qcowfuse-img). What both use: ``entry`` (where
both begin), ``option_table`` (a row of it), ``image_names`` (which files images may name), ``passphrase`` (of
encrypted images), ``exit_codes``, ``failures`` (in words) with ``other_formats`` and ``near_misses`` (what was
meant), ``logs`` (standard error, syslog or a file), ``stopping`` (by signals).
"""
