"""Where both programs begin: Ctrl-C is settled before anything that takes time is imported.

1. From here until a program handles it, Ctrl-C ends the process as it ends any other, without a traceback.
2. No garbage is collected while modules are imported: nearly all that they make is there to stay. Each process that
   serves collects its own from then on (:func:`qcowfuse.daemon.process.collect_own_garbage`).
"""

from __future__ import annotations

import gc
import signal
import sys

from .verb_names import VERBS


def qcowfuse() -> int:
    """The program qcowfuse; returns its exit code."""
    _let_interrupts_end_it()
    if len(sys.argv) > 1 and sys.argv[1] in VERBS:
        from .verbs.main import main as verb

        return verb(sys.argv[1:])
    gc.disable()
    from .mount.main import main

    return main()


def qcowfuse_img() -> int:
    """The program qcowfuse-img; returns its exit code."""
    _let_interrupts_end_it()
    gc.disable()
    from .img.main import main

    return main()


def _let_interrupts_end_it() -> None:
    # One that is ignored (nohup, a job in the background of a script) stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
