"""What both programs answer to what people get wrong: one line that says what to do instead, and the right code."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from qcowfuse.cli.exit_codes import EXPLANATIONS
from qcowfuse.cli.img.commands.check import MAX_LEAKS
from qcowfuse.cli.mount.options import OPTIONS
from qcowfuse.cli.near_misses import IMG_COMMANDS, OF_OTHERS, QEMU_IMG_COMMANDS
from tests.support.mounting import REPOSITORY, environment, run_qcowfuse

QEMU_FORMATS = {
    "vmdk": "a VMDK image",
    "vdi": "a VDI image",
    "vhdx": "a VHDX image",
    "vpc": "a VHD image",
    "qed": "a QED image",
    "parallels": "a Parallels image",
}


IMG = "import sys; from qcowfuse.cli.img.main import main; sys.exit(main())"


def run_img(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", IMG, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False, env=environment())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With an image and a mount point."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "a.qcow2", "1M"], check=True)
    (tmp_path / "mnt").mkdir()
    return tmp_path


def refusal(folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and the one line."""
    done = run_qcowfuse(*arguments, cwd=folder)
    assert done.stderr.startswith("qcowfuse: ")
    assert done.stderr.count("\n") == 1
    return done.returncode, done.stderr


@pytest.mark.parametrize("name", QEMU_FORMATS)
def test_images_of_other_kinds_are_named(folder: Path, name: str) -> None:
    """Whatever QEMU can make besides: what it is, and the command that helps."""
    subprocess.run(["qemu-img", "create", "-q", "-f", name, folder / "x", "1M"], check=True)
    code, line = refusal(folder, "x", "mnt")
    assert code == 3
    assert f"x: is {QEMU_FORMATS[name]}, no QCOW image: qemu-img convert" in line
    assert QEMU_FORMATS[name] in run_img("info", folder / "x").stderr


def test_a_fixed_vhd_has_its_name_at_the_end(folder: Path) -> None:
    """Its content comes first."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "vpc", "-o", "subformat=fixed", folder / "x", "1M"], check=True)
    assert "a VHD image" in refusal(folder, "x", "mnt")[1]


@pytest.mark.parametrize(
    ("offset", "data", "said"),
    [
        (0x1FE, b"\x55\xaa", "a raw disk image with an MBR"),
        (0x200, b"EFI PART", "a raw disk image with a GPT"),
        (0x438, b"\x53\xef", "a raw disk image with an ext file system"),
        (0x8001, b"CD001", "an ISO image"),
        (0, b"", "a raw disk image, as it seems"),
    ],
)
def test_a_raw_disk_needs_no_qcowfuse(folder: Path, offset: int, data: bytes, said: str) -> None:
    """By its partition table or file system; one of zeroes as well."""
    (folder / "x").write_bytes(bytes(offset) + data + bytes((1 << 16) - offset - len(data)))
    code, line = refusal(folder, "x", "mnt")
    assert code == 3
    assert f"x: is {said}, no QCOW image: it needs no qcowfuse" in line


def test_what_is_none_of_all(folder: Path) -> None:
    """What can't be told is said to be no QCOW image; a damaged QCOW image is not called raw."""
    (folder / "x").write_bytes(b"some\x00text")
    assert "no QCOW image: starts with 73 6f 6d 65" in refusal(folder, "x", "mnt")[1]
    assert "no QCOW image: starts with 73 6f 6d 65" in run_img("info", folder / "x").stderr
    (folder / "x").write_bytes(b"QFI\xfb\0\0\0\x63" + bytes(600))
    assert "raw" not in refusal(folder, "x", "mnt")[1]


def test_texts_and_beginnings_of_images(folder: Path) -> None:
    """What a download or a copy that failed leaves behind."""
    whole = (folder / "a.qcow2").read_bytes()
    for data, said in (
        (b"404: not found\n", "is a text file, no QCOW image"),
        ("\u00fc".encode() * 40000, "is a text file, no QCOW image"),
        (b"\n<!DOCTYPE html><title>", "is a web page, no QCOW image: a download gave that in place of the image"),
        (whole[:103], "is cut off after 103 bytes, in the header of a QCOW image"),
        (b"QFI\xfb\0\0\0\1" + bytes(39), "is cut off after 47 bytes, in the header of a QCOW image"),
    ):
        (folder / "x").write_bytes(data)
        assert refusal(folder, "x", "mnt") == (3, f"qcowfuse: x: {said}\n")
        assert run_img("check", folder / "x").stderr == f"qcowfuse-img: {folder}/x: {said}\n"
    (folder / "x").write_bytes(b"QFI\xfb\0\0\0\1" + bytes(40))
    assert "cut off" not in refusal(folder, "x", "mnt")[1]
    for url in ("http://host/a.qcow2", "json:{}"):
        expected = f"qcowfuse: {url}: No such file or directory (a local path is expected, no URL)\n"
        assert refusal(folder, url, "mnt") == (6, expected)


def test_a_backing_file_of_another_kind_is_named(folder: Path) -> None:
    """It is called QCOW2, and is none."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "vmdk", folder / "x", "1M"], check=True)
    new = ["create", "-q", "-u", "-f", "qcow2", "-b", "x", "-F", "qcow2", str(folder / "over.qcow2"), "1M"]
    subprocess.run(["qemu-img", *new], check=True)
    code, line = refusal(folder, "over.qcow2", "mnt")
    assert (code, line) == (
        3,
        "qcowfuse: x: backing file of over.qcow2: is a VMDK image, no QCOW image: "
        "qemu-img convert -O qcow2 makes a QCOW2 image of it\n",
    )


@pytest.mark.parametrize("over", ["folder", "file"])
def test_arguments_the_wrong_way_round(folder: Path, over: str) -> None:
    """IMAGE comes first."""
    if over == "file":
        (folder / "disk.raw").touch()
    _, line = refusal(folder, "mnt" if over == "folder" else "disk.raw", "a.qcow2")
    assert line.endswith("(IMAGE comes first: qcowfuse IMAGE MOUNTPOINT)\n")
    assert "comes first" not in refusal(folder, "missing.qcow2", "mnt")[1]


def test_empty_arguments(folder: Path) -> None:
    """As the unit has them when its file sets nothing: nothing is mounted anywhere."""
    for arguments in (("", ""), ("a.qcow2", ""), ("", "mnt")):
        code, line = refusal(folder, "-f", "--", *arguments)
        assert code == 2
        assert "/etc/qcowfuse/NAME.conf" in line


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["--readonly"], "--read-only"),
        (["--cachesize=1M"], "--l2-cache-size"),
        (["-o", "readonly"], "read-only"),
        (["-o", "ro,allow-others"], "allow_other"),
        (["-o", "l2_cachesize=1M"], "l2-cache-size"),
    ],
)
def test_near_misses(folder: Path, arguments: list[str], meant: str) -> None:
    """The option that was meant."""
    code, line = refusal(folder, *arguments, "a.qcow2", "mnt")
    assert code == 2
    assert f"did you mean {meant}?" in line
    assert "did you mean" not in refusal(folder, "--zzz", "a.qcow2", "mnt")[1]


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["unmount", "mnt"], "did you mean umount?"),
        (["stauts", "mnt"], "did you mean status?"),
        (["info", "a.qcow2"], "did you mean qcowfuse-img info?"),
        (["mount", "mnt"], "qcowfuse IMAGE MOUNTPOINT"),
    ],
)
def test_a_word_that_is_no_verb(folder: Path, words: list[str], meant: str) -> None:
    """It is taken for an image, and there is none: what was meant is said. A name of a file is only a name."""
    code, line = refusal(folder, *words)
    assert code == 6
    assert meant in line
    assert refusal(folder, "./unmount", "mnt")[1] == "qcowfuse: ./unmount: No such file or directory\n"
    assert refusal(folder, "disk", "mnt")[1] == "qcowfuse: disk: No such file or directory\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.qcow2", "mnt", "b"], "b"),
        (["mount", "a.qcow2", "mnt"], "mnt (a mount has no verb: qcowfuse IMAGE MOUNTPOINT)"),
        (["resize", "a.qcow2", "2M"], "2M (did you mean qcowfuse-img resize?)"),
        (["./mount", "a.qcow2", "mnt"], "mnt"),
    ],
)
def test_a_word_too_many(folder: Path, words: list[str], said: str) -> None:
    """What was meant is said where the first is neither a verb nor a file."""
    assert refusal(folder, *words) == (2, f"qcowfuse: too many arguments: {said} (qcowfuse --help says more)\n")


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["convert", "-O", "raw", "a", "b"], "has no command convert: use qemu-img convert, while"),
        (["commit", "a"], "has no command commit: use qemu-img commit, while"),
        (["chekc", "a"], "unknown command chekc (did you mean check?)"),
        (["zzz", "a"], "unknown command zzz (there are info, map, check, create, resize, snapshot, partitions)"),
        (["snap-shot", "a"], "unknown command snap-shot (did you mean snapshot?)"),
    ],
)
def test_commands_that_there_are_not(words: list[str], answer: str) -> None:
    done = run_img(*words)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(f"qcowfuse-img: {answer}")


def test_the_commands_that_may_be_meant() -> None:
    """Those that the help lists; and of qemu-img's, those that are missing there."""
    commands = re.search(r"\n  COMMAND\n(.*?)\n\n", run_img("--help").stdout, re.DOTALL)
    assert commands is not None
    assert tuple(line.split()[0] for line in commands[1].splitlines()) == IMG_COMMANDS
    assert not set(QEMU_IMG_COMMANDS) & set(IMG_COMMANDS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ro", "a.qcow2", "mnt"], "unknown option --ro (here: -r, --read-only)"),
        (["--offset=512", "a.qcow2", "mnt"], "or --partition NUMBER)"),
        (["-u", "mnt"], "required: MOUNTPOINT (-u here: qcowfuse umount MOUNTPOINT)"),
        (["lst"], "required: MOUNTPOINT (did you mean list?)"),
        (["help"], "required: MOUNTPOINT (did you mean --help?)"),
        (["a.qcow2"], "required: MOUNTPOINT (qcowfuse"),
        (["-x=/tmp", "a.qcow2", "mnt"], "option -x takes no value: --ephemeral=/tmp does"),
    ],
)
def test_habits_from_other_programs(folder: Path, words: list[str], said: str) -> None:
    """What there is in place of an option of qemu-nbd, guestmount, losetup and others."""
    code, line = refusal(folder, *words)
    assert code == 2
    assert said in line


def test_a_flag_with_a_value(folder: Path) -> None:
    """Newer versions of argparse (Python 3.13) see two flags in it."""
    code, line = refusal(folder, "-d0", "a.qcow2", "mnt")
    assert code == 2
    assert "option -d takes no value (qcowfuse" in line or "unknown option -0 (qcowfuse" in line


def test_what_takes_the_place_of_other_options_exists() -> None:
    """None of them is an option here by now, and what stands in its place is one."""
    options = [option for option in OPTIONS if option.on_command_line]
    own = {name for option in options for name in (f"-{option.short}", f"--{option.name}")}
    assert not own & set(OF_OTHERS)
    for instead in OF_OTHERS.values():
        named = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", instead)) - {"-o", "-fP", "--show", "--output"}
        assert named - {"--offset"} <= own, instead


def test_a_disk_is_never_made_smaller(folder: Path) -> None:
    """A size that takes something away is no option, and changes nothing."""
    before = (folder / "a.qcow2").read_bytes()
    for words in (["-512k"], ["-q", "-512k"], ["--", "-512k"], ["--ignore-locks", "-5"]):
        done = run_img("resize", folder / "a.qcow2", *words)
        assert done.returncode == 1
        assert done.stderr == (
            f"qcowfuse-img: {folder}/a.qcow2: a disk cannot be made smaller (qemu-img resize --shrink can)\n"
        )
    assert "--shrink (here: a disk is never" in run_img("resize", "--shrink", folder / "a.qcow2", "1M").stderr
    assert "-f (here: the format is found" in run_img("info", "-f", "qcow2", folder / "a.qcow2").stderr
    assert (folder / "a.qcow2").read_bytes() == before


def test_options_of_create(folder: Path) -> None:
    """A near miss, and qemu-img's way to ask for all."""
    done = run_img("create", "-o", "clustersize=4k", folder / "new", "1M")
    assert "unknown option clustersize for format qcow2 (did you mean cluster_size?)\n" in done.stderr
    done = run_img("create", "-o", "help", folder / "new")
    assert re.search(r": options for format qcow2: .*, cluster_size, .*, preallocation, ", done.stderr)
    assert not (folder / "new").exists()


def test_a_name_that_is_taken(folder: Path) -> None:
    """What overwrites it is said."""
    assert run_img("create", folder / "a.qcow2", "1M").stderr.endswith(
        "a.qcow2: File exists (qcowfuse-img create --force overwrites it)\n"
    )


def test_options_before_the_command(folder: Path) -> None:
    """qcowfuse-img says where they belong, and knows near misses too."""
    done = run_img("--output", "json", "info", folder / "a.qcow2")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "the command comes first: qcowfuse-img COMMAND [OPTION]" in done.stderr
    done = run_img("info", "--outptu=json", folder / "a.qcow2")
    assert "unknown option --outptu (did you mean --output?)" in done.stderr
    assert run_img("--version").returncode == 0


def test_keys(folder: Path) -> None:
    """A wrong or missing key is code 3, and the usual reasons are told; an image with an empty one is not made."""
    for name, text in (("key", "open sesame"), ("newline", "open sesame\n"), ("empty", ""), ("wrong", "x")):
        (folder / name).write_text(text)
    create = ("create", "-q", "-o", "encrypt.format=luks,encrypt.iter-time=1", "--key-file")
    assert run_img(*create, folder / "key", folder / "e.qcow2", "1M").returncode == 0
    for name, reason in {
        "newline": "(key file newline ends with a newline, which counts: printf %s writes none)",
        "empty": "(key file empty is empty)",
        "wrong": "it opens none of the LUKS key slots in use\n",
        "missing": "key file missing: No such file or directory",
        "mnt": "key file mnt: Is a directory",
    }.items():
        code, line = refusal(folder, "--key-file", name, "e.qcow2", "mnt")
        assert code == 3
        assert reason in line
    assert (
        "ends with a newline" in run_img("resize", "--key-file", folder / "newline", folder / "e.qcow2", "2M").stderr
    )
    resize = [sys.executable, "-c", IMG, "resize", "--key-file", "-", "e.qcow2", "1M"]
    for key, said in (("open sesame", "1 MiB (1048576 bytes)"), ("wrong", "none of the LUKS key slots")):
        done = subprocess.run(
            resize, input=key, capture_output=True, text=True, cwd=folder, env=environment(), check=False
        )
        assert said in done.stdout + done.stderr
    done = run_img(*create, folder / "empty", folder / "n.qcow2", "1M")
    assert (done.returncode, (folder / "n.qcow2").exists()) == (1, False)
    assert "empty" in done.stderr


def test_many_leaks_are_counted_not_listed(folder: Path) -> None:
    """The first few lines and how many there are beside; the JSON has all that it had."""
    image = folder / "a.qcow2"
    with image.open("r+b") as file:
        file.seek(48)
        (table_offset,) = struct.unpack(">Q", file.read(8))
        file.seek(table_offset)
        (block_offset,) = struct.unpack(">Q", file.read(8))
        file.seek(block_offset + 2 * 100)
        file.write(struct.pack(">H", 1) * 625)
        file.truncate(725 << 16)
    done = run_img("check", image)
    assert done.returncode == 3
    assert done.stderr.count("Leaked cluster") == MAX_LEAKS
    assert f"... and {625 - MAX_LEAKS} more\n" in done.stderr
    assert "625 leaked clusters were found" in done.stdout
    assert json.loads(run_img("check", "--output=json", "-q", image).stdout)["leaks"] == 625


def test_the_page_of_options_lists_the_exit_codes() -> None:
    """Word for word as --help does."""
    rows = re.findall(r"^\| (\d) \| (.*) \|$", (REPOSITORY / "docs/options.md").read_text(), re.MULTILINE)
    assert {int(code): text.replace("`", "") for code, text in rows} == {
        int(code): text for code, text in EXPLANATIONS.items()
    }
