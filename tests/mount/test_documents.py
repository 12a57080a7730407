"""Commands in README.md and docs do what the pages say: each of them is run, or says why it is not."""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support import qemu
from tests.support.container import need_loop_devices
from tests.support.documents import SYSTEM, Block, blocks, script_of
from tests.support.mounting import REPOSITORY, wait_until

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
BLOCKS = [block for page in PAGES for block in blocks(page)]
DISKS = ("disk.qcow2", "cloud.qcow2", "evidence.qcow2", f"{SYSTEM}/var/lib/images/disk.qcow2")
"""Copies of one disk: two partitions, the second with ext4, and a snapshot "before"."""
PRELUDE = r"""
set -eu
finish() {
    cd /
    for point in $(awk -v t="$T/" 'index($5, t) == 1 && $8 !~ /qcowfuse/ {print $5}' /proc/self/mountinfo | tac); do
        umount "$point" || umount -l "$point"
    done
    for loop in $(command losetup -nl -O NAME,BACK-FILE | awk -v t="$T/" 'index($2, t) == 1 {print $1}'); do
        command losetup -d "$loop"
    done
    for point in $(awk -v t="$T/" 'index($5, t) == 1 {print $5}' /proc/self/mountinfo | tac); do
        qcowfuse umount --force --timeout 1 "$point" || umount -l "$point"
    done
}
trap finish EXIT
# Where the kernel or the container does not look for partitions by itself.
losetup() {
    local name part
    name=$(command losetup "$@") || return
    case $1 in
    -fP)
        partx -u "$name" 2>/dev/null || true
        for part in /sys/class/block/${name#/dev/}/${name#/dev/}p*; do
            # In a container, a node of an earlier device may be left; the kernel numbers partitions anew.
            [ "$(stat -c %Hr:%Lr "/dev/${part##*/}" 2>/dev/null)" != "$(cat "$part/dev")" ] || continue
            rm -f "/dev/${part##*/}"
            mknod "/dev/${part##*/}" b $(tr : ' ' <"$part/dev")
        done
        ;;
    esac
    [ -z "$name" ] || echo "$name"
}
# "once it has ended: again if it is busy"
fusermount3() {
    local n
    for n in $(seq 50); do
        command fusermount3 "$@" 2>/dev/null && return
        sleep 0.1
    done
    command fusermount3 "$@"
}
less() { cat "$@"; }
mount --bind "$BIN" /usr/local/bin  # where mount(8) looks
cd "$T"
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that a block may name, to be copied, and the programs in ``bin``."""
    folder = tmp_path_factory.mktemp("documents")
    raw = folder / "disk"
    with raw.open("wb") as file:
        file.truncate(64 << 20)
    table = "label: gpt\nstart=2048, size=65536, name=boot\nstart=67584, size=61440, name=root\n"
    subprocess.run(["sfdisk", "-q", raw], input=table, text=True, check=True)
    for offset, n_kib in ((2048, 32768), (67584, 30720)):
        qemu.must_run("mkfs.ext4", "-q", "-E", f"offset={offset * 512}", raw, f"{n_kib}k")
    made = folder / "made"
    (made / SYSTEM / "var/lib/images").mkdir(parents=True)
    for name in ("mnt", "srv/disk", "etc/qcowfuse", "data", "srv/bases"):
        (made / SYSTEM / name).mkdir(parents=True)
    qemu.must_run("qemu-img", "convert", "-O", "qcow2", raw, made / "disk.qcow2")
    qemu.must_run("qemu-img", "snapshot", "-c", "before", made / "disk.qcow2")
    for name in DISKS[1:]:
        shutil.copy(made / "disk.qcow2", made / name)
    shutil.move(raw, made / "backup.raw")
    (made / "key").write_text("secret")
    secret = ("--object", f"secret,id=k,file={made}/key")
    options = "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10"
    qemu.must_run("qemu-img", "create", "-q", *secret, "-f", "qcow2", "-o", options, made / "luks.qcow2", "1M")
    qemu.must_run("qemu-img", "create", "-q", "-f", "qcow2", made / SYSTEM / "srv/bases/debian.qcow2", "64M")
    qemu.must_run("qemu-img", "create", "-q", "-f", "qcow2", made / "vm.qcow2", "64M")
    base = ("-b", f"{SYSTEM}/srv/bases/debian.qcow2", "-F", "qcow2")
    qemu.must_run("qemu-img", "rebase", "-u", *base, made / "vm.qcow2")
    programs = folder / "bin"
    programs.mkdir()
    for name in ("qcowfuse", "qcowfuse-img"):
        function = name.replace("-", "_")
        program = programs / name
        program.write_text(
            f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
            f"from qcowfuse.cli.entry import {function}\nsys.exit({function}())\n"
        )
        program.chmod(0o755)
    return folder


def test_what_is_not_run_says_why() -> None:
    """A reason is more than a word, and most of what is on the pages is run."""
    assert all(len(block.why_not.split()) > 1 for block in BLOCKS if block.why_not)
    n_run = sum(not block.why_not for block in BLOCKS)
    assert n_run > len(BLOCKS) / 2
    assert {"README.md", "mounting.md", "recipes.md", "snapshots.md"} <= {b.page for b in BLOCKS if not b.why_not}


@pytest.mark.mount
@pytest.mark.root
@pytest.mark.parametrize("block", [block for block in BLOCKS if not block.why_not], ids=lambda block: block.name)
def test_commands_of_the_pages(block: Block, images: Path, tmp_path: Path) -> None:
    """They end without an error, and nothing that they printed tells of one."""
    if "loop" in block.text:
        need_loop_devices()
    folder = tmp_path / "t"
    script = script_of(block, folder)
    shutil.copytree(images / "made" / SYSTEM, folder / SYSTEM)
    for file in (images / "made").iterdir():
        if file.is_file() and file.name in script:
            shutil.copy(file, folder)
    done = subprocess.run(
        ["unshare", "-m", "--propagation", "private", "bash", "-c", PRELUDE + script],
        env=os.environ
        | {
            "PATH": f"/usr/local/bin:{os.environ['PATH']}:/usr/sbin:/sbin",
            "T": str(folder),
            "BIN": str(images / "bin"),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, f"{block.text}\n{done.stdout}{done.stderr}"
    assert not re.search(r"^(qcowfuse|bash|mount): ", done.stderr, re.MULTILINE), done.stderr
    wait_until(lambda: not users_of(folder), f"the end of processes that have files in {folder} open")


def users_of(folder: Path) -> set[str]:
    """The processes that have a file in the folder open: a loop device that is left keeps a daemon."""
    users = set()
    for link in glob.iglob("/proc/[0-9]*/fd/*"):
        with suppress(OSError):
            if os.readlink(link).startswith(f"{folder}/"):
                users.add(link.split("/")[2])
    return users


def test_links_lead_somewhere() -> None:
    """Each link to a file or a heading of the project has its goal."""
    wrong = []
    for page in (*PAGES, REPOSITORY / "SECURITY.md", REPOSITORY / "CONTRIBUTING.md"):
        for goal in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if goal.startswith("https:"):
                continue
            path, _, anchor = goal.partition("#")
            file = (page.parent / path) if path else page
            if not file.exists() or (anchor and anchor not in anchors(file)):
                wrong.append(f"{page.name}: {goal}")
    assert not wrong, "\n".join(wrong)


def anchors(page: Path) -> set[str]:
    """The anchors that a forge makes of the headings of a page."""
    return {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    }


def test_the_readme_is_short() -> None:
    """A page that a stranger reads to its end."""
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 150
