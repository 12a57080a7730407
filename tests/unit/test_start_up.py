"""What a start imports, and when: the time of a start is the time of its imports."""

from __future__ import annotations

import json
import os
import struct
import sys
import textwrap
from pathlib import Path

import pytest

from qcowfuse.tools.peek import may_need_passphrase
from tests.support.scripts import run_python

REPOSITORY = Path(__file__).parents[2]
NEEDLESS_FOR_A_PLAIN_IMAGE = {
    "argparse",
    "cryptography",
    "getpass",
    *("_hashlib", "_ssl", "hmac", "idna", "ssl"),
    *("attr", "attrs", "ctypes.util", "dataclasses", "email", "importlib.metadata", "inspect", "pathlib"),
    *("pickle", "platform", "urllib", "zipfile", *(("shutil", "subprocess") if os.geteuid() == 0 else ())),
    *(f"trio.{name}" for name in ("_channel", "_dtls", "_highlevel_socket", "_ssl", "_subprocess", "socket")),
    "zstandard",
    *(f"qcowfuse.cli.{name}" for name in ("img.main", "mount.parser", "verbs.main")),
    *(f"qcowfuse.tools.{name}" for name in ("check", "create", "info", "overlay")),
    "qcowfuse.consistency.repair",
    *(f"qcowfuse.daemon.{name}" for name in ("idle", "metrics", "metrics_process")),
    "qcowfuse.driver.layers.encryption",
    "qcowfuse.driver.overlay",
    "qcowfuse.driver.partition_window",
    "qcowfuse.fuse.several_files",
    "qcowfuse.driver.writing.bitmap_storing",
    "qcowfuse.driver.writing.dirty_bitmaps",
    *(f"qcowfuse.partitions.{name}" for name in ("table", "values")),
    *(f"qcowfuse.format.{name}" for name in ("bitmaps", "crypto", "libgcrypt", "luks", "snapshots")),
    *(f"qcowfuse.storage.measuring.{name}" for name in ("latency", "memory")),
}
NO_IMPORTS = """
class NoImports:
    def find_spec(self, name, path=None, target=None):
        raise AssertionError(f"{name} is imported while the disk is in use")
"""


def run(script: str, *arguments: str) -> str:
    """The output of a script in a process of its own, in which nothing is imported yet: neither of ours, nor by the
    ``.pth`` files of an installation."""
    path = f"import sys\nsys.path[1:] = {sys.path!r}\n"
    return run_python("-S", "-c", path + textwrap.dedent(script), *arguments)


def test_the_starter_imports_nothing_that_serves() -> None:
    """The process that parses a plain command line and forks has neither trio, nor pyfuse3, nor the driver."""
    imported = run(
        """
        import json, sys
        from qcowfuse.cli.mount.main import parse_arguments
        parse_arguments(["image", "mount"])
        print(json.dumps(sorted(sys.modules)))
        """
    )
    modules = set(json.loads(imported))
    assert "qcowfuse.cli.mount.main" in modules
    assert not modules & {"trio", "pyfuse3", "ssl", "qcowfuse.driver.chain", *NEEDLESS_FOR_A_PLAIN_IMAGE}


def test_the_process_outside_of_the_mount_is_started_before_what_serves_is_imported(tmp_path: Path) -> None:
    """It stays as long as the mount, so its memory counts as the daemon's does."""
    modules = run(
        """
        import sys
        from qcowfuse.cli.mount import main
        import qcowfuse.daemon.mountpoint as mountpoint
        import qcowfuse.daemon.outside_process as outside_process

        class Process:
            def __init__(self, client):
                print(*sys.modules)
                sys.stdout.flush()
                os._exit(0)

        import os
        outside_process.OutsideProcess = Process
        mountpoint.check_fuse = lambda: None
        main.main(["-f", "image", sys.argv[1]])
        """,
        str(tmp_path),
    )
    assert "qcowfuse.daemon.mount_client" in modules.split()
    assert not set(modules.split()) & {"trio", "pyfuse3", "ssl", "qcowfuse.driver.chain"}


def test_a_plain_image_imports_only_what_it_needs(tmp_path: Path) -> None:
    """All that serves a plain image is imported when it is open: nothing for other kinds of images, and nothing
    more while the disk is read, written, discarded, grown, flushed and closed."""
    image = tmp_path / "plain.qcow2"
    run("from qcowfuse.cli.img.main import main; import sys; sys.exit(main())", "create", "-q", str(image), "64M")
    imported = run(
        NO_IMPORTS
        + textwrap.dedent(
            """
            import json, sys
            from qcowfuse.cli.mount.arguments import parse_arguments
            from qcowfuse.cli.trimmed_trio import import_pyfuse3
            import_pyfuse3()
            import trio
            import qcowfuse.cli.mount.serving as serving

            given = parse_arguments([sys.argv[1], "mount"])
            given.mount_settings()

            async def use():
                image = await serving.open_image(given.image, given.open_options)
                print(json.dumps(sorted(sys.modules)))
                sys.meta_path.insert(0, NoImports())
                await image.write(5 << 20, b"x" * 70000)
                await image.write(1000, b"y")
                assert bytes(await image.read((5 << 20) - 1, 3)) == b"\\0xx"
                await image.write_zeroes(5 << 20, 65536, unmap=False)
                await image.write_zeroes(0, 1 << 20, unmap=True)
                await image.flush()
                await image.grow(65 << 20)
                await image.count_allocated()
                image.statistics()
                await image.aclose()

            trio.run(use)
            """
        ),
        str(image),
    )
    modules = set(json.loads(imported))
    assert {"pyfuse3", "qcowfuse.daemon.service", "qcowfuse.driver.qcow_image"} <= modules
    assert modules & NEEDLESS_FOR_A_PLAIN_IMAGE == set()


def test_the_program_for_images_collects_garbage_when_it_works(tmp_path: Path) -> None:
    """Not while it imports what it needs."""
    words = run(
        """
        import gc, sys
        from qcowfuse.cli.entry import qcowfuse_img
        sys.argv[1:] = ["create", "-q", sys.argv[1], "1.5M"]
        assert qcowfuse_img() == 0
        print(gc.isenabled(), gc.get_freeze_count() > 1000, end="")
        """,
        str(tmp_path / "image.qcow2"),
    ).split()
    assert words == ["True", "True"]


def test_a_command_with_an_event_loop_imports_no_more_of_trio_than_it_needs(tmp_path: Path) -> None:
    """One that writes an image that exists."""
    image = str(tmp_path / "image.qcow2")
    create = "import sys; from qcowfuse.cli.img.main import main; sys.exit(main())"
    run(create, "create", "-q", image, "1M")
    for words in (
        ["resize", "-q", image, "2M"],
        ["snapshot", "-q", "-c", "one", image],
        ["check", "-r", "all", image],
    ):
        found = run(
            """
            import sys
            from qcowfuse.cli.entry import qcowfuse_img
            assert qcowfuse_img() == 0
            needless = {"attr", "ssl", "fractions", "trio._channel", "trio._subprocess", "pyfuse3", "cryptography"}
            print("trio" in sys.modules, *needless & sys.modules.keys())
            """,
            *words,
        )
        assert found.splitlines()[-1] == "True"


def test_garbage_is_collected_by_what_stays(tmp_path: Path) -> None:
    """Not while modules are imported; by the process outside of the mount and by the daemon from then on."""
    words = run(
        """
        import gc, os, socket, sys
        from qcowfuse.cli import entry
        import qcowfuse.daemon.mountpoint as mountpoint
        import qcowfuse.daemon.mount_client as mount_client
        from qcowfuse.cli.mount import main as program

        def tell(what):
            with open(f"{mount_point}.told", "a") as file:
                print(what, gc.isenabled(), gc.get_freeze_count() > 1000, file=file)

        class Client(mount_client.MountClient):
            def finish(self):
                tell("outside")

        def serve_image(*args, process, **named):
            process.socket.close()
            os.waitpid(-1, 0)
            tell("daemon")

        mount_point = sys.argv[1]
        import qcowfuse.cli.mount.serving as serving
        serving.serve_image = serve_image
        program.import_pyfuse3 = lambda: tell("imports")
        mountpoint.check_fuse = lambda: None
        mount_client.MountClient = Client
        sys.argv[1:] = ["-f", "image", mount_point]
        entry.qcowfuse()
        print(open(f"{mount_point}.told").read())
        """,
        str(tmp_path),
    ).split()
    assert words == ["imports", "False", "False", "outside", "True", "True", "daemon", "True", "True"]


def test_decoders_are_imported_when_the_image_is_opened() -> None:
    """Compressed clusters of either kind need no import any more once an image that may have them is open."""
    run(
        NO_IMPORTS
        + textwrap.dedent(
            """
            import sys, zlib
            from qcowfuse.driver.reading.decoding import CompressedSource
            from qcowfuse.format.compression import decompress_cluster, decompress_start
            from qcowfuse.format.entries import entry_format

            packed = zlib.compressobj(9, zlib.DEFLATED, -12)
            packed = packed.compress(bytes(65536)) + packed.flush()
            for kind in (0, 1):
                CompressedSource(None, entry_format(3, 16), kind)
            sys.meta_path.insert(0, NoImports())
            assert decompress_cluster(packed, 0, 65536) == bytes(65536)
            assert decompress_start(packed, 4096) == bytes(4096)
            try:
                decompress_cluster(b"no zstd", 1, 65536)
            except Exception as error:
                assert "broken zstd stream" in str(error), error
            """
        )
    )


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        pytest.param(struct.pack(">4sIQIIQI4x", b"QFI\xfb", 3, 0, 0, 16, 1 << 30, 0), False, id="plain"),
        pytest.param(struct.pack(">4sIQIIQI4x", b"QFI\xfb", 2, 0, 0, 16, 1 << 30, 1), True, id="AES"),
        pytest.param(struct.pack(">4sIQIIQI4x", b"QFI\xfb", 3, 0, 0, 16, 1 << 30, 2), True, id="LUKS"),
        pytest.param(struct.pack(">4sIQIIQI4x", b"QFI\xfb", 3, 512, 4, 16, 1 << 30, 0), True, id="backing file"),
        pytest.param(struct.pack(">4sIQIIQBBHI", b"QFI\xfb", 1, 0, 0, 0, 1 << 30, 12, 9, 0, 0), False, id="v1"),
        pytest.param(struct.pack(">4sIQIIQBBHI", b"QFI\xfb", 1, 0, 0, 0, 1 << 30, 12, 9, 0, 1), True, id="v1 AES"),
        pytest.param(struct.pack(">4sIQIIQBBHI", b"QFI\xfb", 1, 48, 4, 0, 1 << 30, 12, 9, 0, 0), True, id="v1 base"),
        pytest.param(bytes(512), False, id="raw"),
        pytest.param(b"QFI\xfb", False, id="cut short"),
    ],
)
def test_a_look_tells_whether_a_passphrase_may_be_needed(start: bytes, expected: bool, tmp_path: Path) -> None:
    """Yes for encrypted images and for those with a backing file, whatever it is; no for others and for no images."""
    image = tmp_path / "image"
    image.write_bytes(start)
    assert may_need_passphrase(str(image)) is expected
    assert not may_need_passphrase(str(tmp_path / "missing"))
