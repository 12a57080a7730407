"""The process in which atheris runs one target: ``guided_worker TARGET SECONDS SEED DESCRIPTOR``.

What is to be covered has to be imported under atheris's eyes, so nothing of it is imported before.
"""

from __future__ import annotations

import json
import logging
import os
import sys

_COUNTED_AT_ONCE = 100
_MAX_LENGTH = 128


def main() -> None:
    """Findings and numbers of cases go to the descriptor, one a line."""
    import atheris  # type: ignore[import-untyped,import-not-found,unused-ignore]

    with atheris.instrument_imports(include=["qcowfuse"]):
        from .guided import case_from
        from .judging import judge_limited, kind_of

    target, seconds, seed, pipe = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    logging.disable(logging.CRITICAL)
    seen: set[str] = set()
    n_cases = 0

    def one(data: bytes) -> None:
        nonlocal n_cases
        n_cases += 1
        if n_cases % _COUNTED_AT_ONCE == 0:
            os.write(pipe, f"{_COUNTED_AT_ONCE}\n".encode())
        text = judge_limited(case_from(target, data))
        if text is not None and kind_of(text) not in seen:
            seen.add(kind_of(text))
            os.write(pipe, json.dumps([data.hex(), text[:2000]]).encode() + b"\n")

    words = [f"-max_total_time={seconds}", f"-seed={seed % (1 << 31) or 1}", f"-max_len={_MAX_LENGTH}"]
    atheris.Setup([sys.argv[0], *words, "-len_control=0", "-rss_limit_mb=4096"], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
