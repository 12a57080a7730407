"""Ends in the middle of work: unmounting under write load, and the next start right behind it."""

from __future__ import annotations

import os
import random
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.support.mounting import Mounted, check_image_file, create_image, is_mounted

pytestmark = pytest.mark.mount

MIB = 1 << 20
BLOCK = 64 << 10


class Client(threading.Thread):
    """Opens, writes one block, closes, again and again until the file is gone; ``written`` is what close promised."""

    def __init__(self, file: Path, number: int, size: int) -> None:
        super().__init__(daemon=True)
        self.file = file
        self.chooser = random.Random(number)
        self.places = range(number * BLOCK, size, 4 * BLOCK)
        self.written: dict[int, bytes] = {}
        self.unknown: int | None = None
        self.stopped = False

    def run(self) -> None:
        while not self.stopped:
            self.unknown = self.chooser.choice(self.places)
            data = self.chooser.randbytes(BLOCK)
            try:
                fd = os.open(self.file, os.O_WRONLY)
            except FileNotFoundError:  # unmounted
                return
            try:
                os.pwrite(fd, data, self.unknown)
            finally:
                os.close(fd)
            self.written[self.unknown] = data
            self.unknown = None
            time.sleep(self.chooser.uniform(0, 0.03))


def test_unmount_under_write_load(tmp_path: Path) -> None:
    """fusermount3 -u succeeds between two users of the file; what they had closed is all there, and nothing leaks."""
    image = create_image(tmp_path / "disk.qcow2", "64M")
    mount_point = tmp_path / "mnt"
    mount_point.mkdir()
    for number in range(2):
        with Mounted(image, mount_point) as mount:
            clients = [Client(mount.file, client, 64 * MIB) for client in range(3)]
            for client in clients:
                client.start()
            time.sleep(0.1 + 0.2 * number)
            end = time.monotonic() + 20
            while subprocess.run(
                ["fusermount3", "-u", mount_point], stderr=subprocess.DEVNULL, check=False
            ).returncode:
                assert time.monotonic() < end, "there was never a moment without a user"
            for client in clients:
                client.stopped = True
            # The next daemon starts while this one may still be closing the image, and waits for it.
            with Mounted(image, mount_point, foreground=False) as again:
                assert not mount.is_alive
                with again.file.open("rb") as stream:
                    for client in clients:
                        client.join(20)
                        for place, data in client.written.items():
                            stream.seek(place)
                            assert place == client.unknown or stream.read(BLOCK) == data
            assert "ERROR" not in mount.wait_for_end(0)
        assert sum(len(client.written) for client in clients) > 5
        assert not is_mounted(mount_point)
        check_image_file(image)
