"""The command line: arguments to an open image and a mount; exit codes; the only reader of the environment.

The two programs are the packages ``mount`` and ``verbs`` (qcowfuse), and ``img`` (qcowfuse-img). What they share:
``entry`` (where both begin), ``late_imports``, ``trimmed_trio`` and ``plain_attrs`` (what a start does without),
``verb_names``, ``argument_parser``, ``option_table`` (a row of it), ``image_names`` (which files images may name),
``passphrase`` (of encrypted images), ``exit_codes``, ``failures`` (in words) with ``other_formats`` and
``near_misses`` (what was meant), ``logs`` (standard error, syslog or a file), ``stopping`` (by signals),
``json_text``, ``size_text`` and ``durations``.
"""
