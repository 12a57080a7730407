"""trio and pyfuse3 are imported in part where that can be done, and as a whole where there is any doubt."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from tests.support.scripts import run_python

REPOSITORY = Path(__file__).parents[2]
IMPORT = "from qcowfuse.cli.trimmed_trio import import_pyfuse3; import sys; import_pyfuse3()\n"


def run(script: str, *search: Path) -> list[str]:
    """The words that a script prints in a process of its own, which looks for modules in ``search`` first."""
    path = "".join(f"sys.path.insert(0, {str(folder)!r})\n" for folder in search)
    return run_python("-c", f"import sys\n{path}{IMPORT}{textwrap.dedent(script)}").split()


def test_trio_runs_without_what_is_left_out() -> None:
    """Tasks, timeouts, locks, signals and threads import nothing more; the threads have names."""
    words = run(
        """
        import signal, trio
        before = set(sys.modules)

        async def main():
            lock = trio.Lock()
            async with trio.open_nursery() as nursery, lock:
                nursery.start_soon(trio.sleep, 0.001)
                with trio.move_on_after(0.001):
                    await trio.Event().wait()
                name = await trio.to_thread.run_sync(lambda: open("/proc/thread-self/comm").read())
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(trio.lowlevel.checkpoint)
                    raise OSError("seen")
            except* OSError as group:
                assert "seen" in repr(group.exceptions)
            with trio.open_signal_receiver(signal.SIGUSR1) as signals:
                signal.raise_signal(signal.SIGUSR1)
                async for number in signals:
                    break
            return name

        print(trio.run(main).replace(" ", "-"))
        print(*sorted(set(sys.modules) - before), end="")
        """
    )
    assert len(words) == 1
    assert words[0] not in {"python", Path(sys.executable).name}


def test_what_is_left_out_is_there_for_those_that_ask() -> None:
    """The very things that trio has: in every module that passes them on, and where they are from."""
    assert run(
        """
        import trio
        assert "trio._channel" not in sys.modules and "ssl" not in sys.modules and "attr" not in sys.modules
        send, receive = trio.open_memory_channel(1)
        import trio._channel, trio._path, trio._subprocess
        assert trio.open_memory_channel is trio._channel.open_memory_channel
        assert trio.Path is trio._path.Path and trio.lowlevel.open_process is trio._subprocess.open_process
        assert trio.socket is sys.modules["trio.socket"] and trio.socket.AF_UNIX
        assert not hasattr(trio, "missing")
        for module in (trio, trio.lowlevel, trio.socket):
            for name in module.__all__ if hasattr(module, "__all__") else dir(module):
                getattr(module, name)
        async def main():
            await send.send(5)
            return await receive.receive(), await trio.Path("/").is_dir()
        print(*trio.run(main), issubclass(trio.SSLStream, trio.abc.Stream))
        """
    ) == ["5", "True", "True"]


def test_the_version_of_pyfuse3_is_known() -> None:
    """Without what reads the metadata of packages, and the same."""
    assert run(
        """
        import pyfuse3
        assert "email" not in sys.modules
        import importlib.metadata
        print(pyfuse3.__version__ == importlib.metadata.version("pyfuse3"))
        """
    ) == ["True"]


@pytest.fixture
def other_trio(tmp_path: Path) -> Path:
    """Another trio, which is not in need of what is left out. With a pyfuse3 that has no metadata."""
    folder = tmp_path / "trio"
    folder.mkdir()
    (folder / "__init__.py").write_text("from ._channel import Channel\nfrom . import lowlevel, _core\n")
    (folder / "_channel.py").write_text("class Channel:\n    pass\n")
    (folder / "lowlevel.py").write_text("from ._core import Task\n")
    (folder / "_core.py").write_text("import attrs\n@attrs.define\nclass Task:\n    name: str\n")
    (tmp_path / "pyfuse3.py").write_text(
        "from importlib.metadata import PackageNotFoundError, version\n"
        "try:\n    found = version('nowhere')\nexcept PackageNotFoundError:\n    found = False\n"
    )
    return tmp_path


IMPORTED = """
    import trio, pyfuse3
    assert pyfuse3.found is False
    print("trio._channel" in sys.modules, "attr" in sys.modules)
    print(trio._core.Task("a").name, trio.Channel().__class__.__name__)
    """


@pytest.mark.parametrize("folder", ["nowhere-1.2.dist-info", "nowhere-1.2.egg-info", "nowhere-1.2-py3.11.egg-info"])
def test_a_version_is_read_from_the_name_of_a_folder(folder: str, other_trio: Path) -> None:
    """As pip and Debian name them."""
    (other_trio / folder).mkdir()
    assert run("import pyfuse3; print(pyfuse3.found, 'email' in sys.modules)", other_trio) == ["1.2", "False"]


def test_another_trio_is_trimmed_as_well(other_trio: Path) -> None:
    """It lacks most of what is left out, which is no doubt."""
    assert run(IMPORTED, other_trio) == ["False", "False", "a", "Channel"]


@pytest.mark.parametrize(
    ("module", "line"),
    [
        pytest.param("_core", "import trio._channel\nclass Other(trio._channel.Channel): pass", id="a base class"),
        pytest.param(
            "_core", "from ._channel import Channel\ndef later(): return Channel()", id="used in a function"
        ),
        pytest.param("_core", "from ._channel import Channel\nmade = Channel()", id="used at once"),
        pytest.param("_core", "attrs.asdict", id="more of attrs"),
        pytest.param("_core", "@attrs.define(order=True)\nclass Other:\n    a: int", id="a keyword"),
        pytest.param(
            "lowlevel", "from ._channel import Channel\ndef later(): return Channel()", id="in a function of lowlevel"
        ),
        pytest.param("lowlevel", "from ._channel import Channel\nmade = Channel.made = 5", id="an attribute"),
    ],
)
def test_a_trio_that_needs_more_is_imported_as_a_whole(other_trio: Path, module: str, line: str) -> None:
    """Whatever it does with what would be left out."""
    with (other_trio / "trio" / f"{module}.py").open("a") as file:
        file.write(line + "\n")
    words = run(IMPORTED, other_trio)
    assert words == ["True", "True", "a", "Channel"]


def test_an_import_that_fails_says_why(other_trio: Path) -> None:
    """As the import does that leaves out nothing."""
    (other_trio / "trio" / "lowlevel.py").write_text("raise ImportError('broken')\n")
    with pytest.raises(AssertionError, match="ImportError: broken"):
        run("", other_trio)
