"""--idle-timeout and --metrics on real mounts."""

from __future__ import annotations

import os
import re
import socket
import time
import urllib.request
from pathlib import Path

import pytest

from tests.support.loops import loop_device
from tests.support.mounting import Mounted, check_image_file, create_image, is_mounted, run_qcowfuse, wait_until

pytestmark = pytest.mark.mount


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return create_image(tmp_path / "disk.qcow2", "4M")


@pytest.fixture
def point(tmp_path: Path) -> Path:
    folder = tmp_path / "m"
    folder.mkdir()
    return folder


def test_an_idle_mount_ends(image: Path, point: Path) -> None:
    """Not while the file is open; afterwards cleanly, with everything in the image."""
    with Mounted(image, point, "--idle-timeout", "0.3") as mount:
        with mount.file.open("r+b", buffering=0) as file:
            file.write(b"kept")
            time.sleep(0.8)
            assert is_mounted(point)
        log = mount.wait_for_end()
    assert "idle for 0.3 seconds, unmounting" in log
    assert "closed" in log
    check_image_file(image)
    assert b"kept" in image.read_bytes()


@pytest.mark.root
def test_neither_a_loop_device_nor_a_shell_in_it_lets_it_end(image: Path, point: Path) -> None:
    """A folder that somebody stands in can't be unmounted: the daemon waits for another time."""
    with Mounted(image, point, "--idle-timeout", "0.2") as mount:
        with loop_device(mount.file):
            time.sleep(0.5)
        here = os.open(point, os.O_PATH)
        time.sleep(0.6)
        assert is_mounted(point)
        os.close(here)
        mount.wait_for_end()


def test_wrong_times_and_addresses(image: Path, point: Path) -> None:
    """One line that says what is expected."""
    for option, value, expected in (
        ("--idle-timeout", "0", "0 would unmount at once"),
        (
            "--metrics",
            "localhost:9100",
            "bad address 'localhost:9100': expected a port, 127.0.0.1:9100 or [::1]:9100",
        ),
        ("--metrics", "127.0.0.1:99999", "bad address"),
    ):
        done = run_qcowfuse(option, value, image, point)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert expected in done.stderr
    done = run_qcowfuse("--metrics", "systemd", image, point)
    assert (done.returncode, done.stderr.count("\n")) == (5, 1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run_qcowfuse("--metrics", str(taken.getsockname()[1]), image, point)
    assert (done.returncode, done.stderr.count("\n")) == (6, 1)
    assert "Address already in use" in done.stderr
    assert run_qcowfuse("run", "--idle-timeout", "1", image, "--", "true").returncode == 2


def test_metrics_without_the_package(image: Path, point: Path) -> None:
    """It is named, and how to get it."""
    with pytest.raises(AssertionError) as refused:
        Mounted(image, point, "--metrics", "0", patch=HIDE)
    assert (
        "--metrics needs the Python package prometheus_client: apt install python3-prometheus-client,"
        " or pip install prometheus_client" in str(refused.value)
    )
    assert "Traceback" not in str(refused.value)


HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == "prometheus_client":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
"""


def test_metrics(image: Path, point: Path) -> None:
    """In the format of Prometheus, with labels, for any number of scrapes; the process ends with the daemon."""
    pytest.importorskip("prometheus_client")
    with Mounted(image, point, "--metrics", "0") as mount:
        wait_until(lambda: "metrics: http" in mount.log, "the log to be read")
        url = re.findall(r"metrics: (http://127\.0\.0\.1:\d+/metrics)\n", mount.log)[0]
        host, port = "127.0.0.1", int(url.split(":")[2].split("/")[0])
        # Someone who says nothing keeps nobody away for long.
        with socket.create_connection((host, port)):
            mount.file.open("r+b").write(b"x" * 4096)
            first = urllib.request.urlopen(url, timeout=30).read().decode()
        labels = f'{{file="{mount.file}",image="{image}"}}'
        assert f"qcowfuse_open_files{labels} 0.0" in first
        assert re.search(r"# TYPE qcowfuse_backend_written_bytes_total counter", first)
        assert "qcowfuse_mounted_time_seconds" in first
        assert "qcowfuse_pid" not in first
        with socket.create_connection((host, port)) as connection:
            connection.sendall(b"GARBAGE\r\n\r\n")
            connection.recv(1 << 16)
        with mount.file.open("rb"):
            wait_until(lambda: f"qcowfuse_open_files{labels} 1.0" in urllib.request.urlopen(url).read().decode(), "1")
    with socket.socket() as probe:
        wait_until(lambda: probe.connect_ex((host, port)) != 0, "the end of the process")
