"""The filter of system calls, run by an interpreter of its own instructions."""

from __future__ import annotations

import errno
import mmap
import os
import struct

import pytest

from qcowfuse.system.seccomp import build_program
from qcowfuse.system.syscall_numbers import MACHINES, Machine

ALLOWED = "allowed"
X86_64_REFUSED = {
    "open": 2,
    "ptrace": 101,
    "socket": 41,
    "connect": 42,
    "socketpair": 53,
    "fork": 57,
    "vfork": 58,
    "execve": 59,
    "kill": 62,
    "rename": 82,
    "unlink": 87,
    "mount": 165,
    "umount2": 166,
    "init_module": 175,
    "tkill": 200,
    "unshare": 272,
    "process_vm_writev": 311,
    "memfd_create": 319,
    "bpf": 321,
    "execveat": 322,
    "io_uring_setup": 425,
    "io_uring_register": 427,
    "open_tree": 428,
    "openat2": 437,
    "pidfd_getfd": 438,
}


def verdict(machine: Machine, number: int, *arguments: int, architecture: int | None = None) -> str | int:
    """ALLOWED, or the errno, for a system call."""
    data = struct.pack("=iIQ", number, machine.audit_arch if architecture is None else architecture, 0)
    data += struct.pack("=6Q", *arguments, *[0] * (6 - len(arguments)))
    code = list(struct.iter_unpack("=HBBI", build_program(machine)))
    position, accumulator = 0, 0
    while True:
        operation, if_true, if_false, value = code[position]
        position += 1
        if operation == 0x20:
            accumulator = struct.unpack_from("=I", data, value)[0]
        elif operation == 0x06:
            if value == 0x7FFF0000:
                return ALLOWED
            assert value >> 16 == 5
            return int(value & 0xFFFF)
        else:
            is_true = {
                0x15: accumulator == value,
                0x35: accumulator >= value,
                0x45: bool(accumulator & value),
            }[operation]
            position += if_true if is_true else if_false


@pytest.fixture(params=sorted(MACHINES))
def machine(request: pytest.FixtureRequest) -> Machine:
    """Every machine that has a table."""
    return MACHINES[request.param]


@pytest.mark.parametrize("name", ["read", "preadv2", "pwritev", "fdatasync", "fallocate", "io_uring_enter", "futex"])
def test_what_serving_takes_is_allowed(machine: Machine, name: str) -> None:
    """Plain calls are allowed whatever their arguments."""
    assert verdict(machine, machine.numbers[name], 3, 1 << 40, 7, 1 << 63) == ALLOWED


@pytest.mark.parametrize("name", sorted(X86_64_REFUSED))
def test_what_serving_does_not_take_is_refused(name: str) -> None:
    """Sockets, programs, processes, mounts, names of files, other rings."""
    assert verdict(MACHINES["x86_64"], X86_64_REFUSED[name]) == errno.EPERM


@pytest.mark.parametrize(
    "flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_CREAT, os.O_RDONLY | os.O_TRUNC, os.O_PATH | os.O_RDWR]
)
def test_files_are_not_opened_for_writing(machine: Machine, flags: int) -> None:
    """openat reads, and does nothing else."""
    assert verdict(machine, machine.numbers["openat"], 3, 0, flags) == errno.EPERM
    assert verdict(machine, machine.numbers["openat"], 3, 0, os.O_RDONLY | os.O_CLOEXEC) == ALLOWED


def test_threads_are_made_and_processes_are_not(machine: Machine) -> None:
    """clone with the flags of pthread_create passes, fork and new namespaces do not, clone3 is said to be missing."""
    clone = machine.numbers["clone"]
    assert verdict(machine, clone, 0x3D0F00) == ALLOWED
    assert verdict(machine, clone, 17) == errno.EPERM  # SIGCHLD: fork
    assert verdict(machine, clone, 0x10000 | 0x10000000) == errno.EPERM  # a user namespace
    assert verdict(machine, machine.numbers["clone3"]) == errno.ENOSYS


@pytest.mark.parametrize("name", ["mmap", "mprotect"])
def test_memory_does_not_become_executable(machine: Machine, name: str) -> None:
    """Neither new memory nor what is there."""
    number = machine.numbers[name]
    assert verdict(machine, number, 0, 4096, mmap.PROT_READ | mmap.PROT_WRITE) == ALLOWED
    assert verdict(machine, number, 0, 4096, mmap.PROT_READ | mmap.PROT_EXEC) == errno.EPERM


def test_ioctl_prctl_and_limits_do_little(machine: Machine) -> None:
    """A block device is discarded, a thread is named, the process's own limits are asked for."""
    assert verdict(machine, machine.numbers["ioctl"], 3, 0x1277) == ALLOWED
    assert verdict(machine, machine.numbers["ioctl"], 3, 0x5412) == errno.ENOTTY  # TIOCSTI
    assert verdict(machine, machine.numbers["prctl"], 15) == ALLOWED
    assert verdict(machine, machine.numbers["prctl"], 4, 1) == errno.EPERM  # to be dumpable again
    assert verdict(machine, machine.numbers["prlimit64"], 0) == ALLOWED
    assert verdict(machine, machine.numbers["prlimit64"], 4711) == errno.EPERM


def test_other_abis_and_newer_calls(machine: Machine) -> None:
    """Another architecture's numbers are refused; newer numbers, and those of x32, are said to be missing."""
    assert verdict(machine, machine.numbers["read"], architecture=0x40000003) == errno.EPERM
    assert verdict(machine, machine.newest + 1) == errno.ENOSYS
    assert verdict(machine, 0x40000000) == errno.ENOSYS
