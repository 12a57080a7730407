"""The process that serves counters, beside a daemon that a test plays: what is answered when that one does not."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from tests.support.mounting import REPOSITORY

PROGRAM = textwrap.dedent("""
    import json, os, socket, sys, threading, traceback, urllib.error, urllib.request
    from qcowfuse.daemon.metrics_process import MetricsProcess

    def refuse(*_, **__):
        os._exit(9)

    traceback.print_exception = traceback.TracebackException = refuse
    process = MetricsProcess(socket.create_server(("127.0.0.1", 0)), None)
    process.socket.setblocking(True)
    answer = sys.argv[1].encode()

    def play_daemon():
        while process.socket.recv(100):
            if answer:
                process.socket.send(answer)

    threading.Thread(target=play_daemon, daemon=True).start()
    for _ in range(2):
        try:
            reply = urllib.request.urlopen(process.url, timeout=20)
        except urllib.error.HTTPError as error:
            reply = error
        print(reply.status, reply.headers["Content-Type"], reply.read().decode())
    process.socket.shutdown(socket.SHUT_RDWR)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
""")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('[{"image": "x"}, {"reads": 5}]', 'qcowfuse_reads_total{image="x"} 5.0\n'),
        ("nonsense{", "503 text/plain qcowfuse: the process that serves the disk does not answer\n"),
        ("", "503 text/plain qcowfuse: the process that serves the disk does not answer\n"),
    ],
    ids=["counters", "nonsense", "silence"],
)
def test_an_answer_needs_no_traceback(answer: str, expected: str) -> None:
    """One that can't be made, for want of a module in the sandbox, would be no answer at all. The next request is
    served as well, and the process ends as it should."""
    pytest.importorskip("prometheus_client")
    command = [sys.executable, "-c", PROGRAM, answer]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=False, env=dict(os.environ), timeout=30
    )
    assert done.stdout.count(expected) == 2, done.stdout + done.stderr
    assert done.stdout.endswith("\n0\n")
