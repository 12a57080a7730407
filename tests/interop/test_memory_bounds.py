"""Images that name tables far larger than what they hold: no command takes more than 64 MiB for them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from qcowfuse.format.header import MAX_L1_SIZE
from tests.support.peak_memory import LIMIT_KIB, header, run_img, write_sparse

LUKS_POINTER = 0x0537BE77
CLUSTER_BITS = 16
L1_OFFSET = 1 << 20
N_ENTRIES = MAX_L1_SIZE // 8
DISK_SIZE = N_ENTRIES << 2 * CLUSTER_BITS - 3


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> int:
    """The peak, in KiB, of a command on an image with nothing in it."""
    folder = tmp_path_factory.mktemp("idle")
    image = write_sparse(folder / "small.qcow2", {0: header()}, L1_OFFSET + 8)
    done = run_img(folder, "map", image)
    assert done.code == 0, done.stderr
    return done.peak


def with_l1_tables(path: Path, n_layers: int) -> Path:
    """A chain of images with the largest L1 tables there can be, of which the files hold nothing."""
    for number in range(n_layers):
        is_last = number == n_layers - 1
        start = header(
            l1_size=N_ENTRIES,
            size=DISK_SIZE,
            backing=b"" if is_last else b"%d" % (number + 1),
            extensions=() if is_last else ((0xE2792ACA, b"qcow2"),),
        )
        write_sparse(path / f"{number}", {0: start}, L1_OFFSET + MAX_L1_SIZE)
    return path / "0"


def test_l1_tables_of_a_long_chain_take_what_their_files_hold(tmp_path: Path, idle: int) -> None:
    """Ten tables of 32 MiB, all holes."""
    done = run_img(tmp_path, "map", with_l1_tables(tmp_path, 10))
    assert done.code == 0, done.stderr
    assert done.peak - idle < LIMIT_KIB


def test_a_luks_header_of_128_gib_is_not_counted(tmp_path: Path, idle: int) -> None:
    """It is a corruption, as no image with it can be opened."""
    pointer = struct.pack(">QQ", 0, 1 << 37)
    start = header(
        cluster_bits=9, size=1 << 15, refcount_order=6, crypt_method=2, extensions=((LUKS_POINTER, pointer),)
    )
    image = write_sparse(tmp_path / "luks.qcow2", {0: start}, 1 << 37)
    done = run_img(tmp_path, "check", image)
    assert done.code == 2
    assert "LUKS header at 0x0 has 0x2000000000 bytes, more than 0x1000000" in done.stderr
    assert done.peak - idle < LIMIT_KIB
