"""Takes from a process all but its memory, its threads and its open pipes: for hostile files.

Linux's seccomp refuses system calls from then on. The list is of those allowed, about forty: one
that a later kernel brings is refused too. A refused call fails as in an old kernel that lacks it
(ENOSYS), and a C library then does without: glibc starts threads by ``clone``, not ``clone3``.
No file can be opened, not even for reading: all that decoding needs is loaded before. FFmpeg and
faulthandler start threads, so RLIMIT_NPROC cannot be 0; the filter refuses new processes.
"""

import ctypes
import errno
import os
import struct
import sys

from mico_chat import system

# Name, number on x86_64, number on aarch64. Nothing here names another file or process.
_ALLOWED = """
read 0 63, write 1 64, close 3 57, fstat 5 80, poll 7 -, lseek 8 62, mmap 9 222, mprotect 10 226,
munmap 11 215, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139,
pread64 17 67, readv 19 65, writev 20 66, sched_yield 24 124, mremap 25 216, madvise 28 233,
dup 32 23, dup2 33 -, nanosleep 35 101, setitimer 38 103, getpid 39 172, recvmsg 47 212, exit 60 93,
gettimeofday 96 169, getrusage 98 165, sysinfo 99 179, sigaltstack 131 132, gettid 186 178,
time 201 -, futex 202 98, sched_getaffinity 204 123, restart_syscall 219 128, clock_gettime 228 113,
clock_getres 229 114, clock_nanosleep 230 115, exit_group 231 94, ppoll 271 73,
set_robust_list 273 99, dup3 292 24, getcpu 309 168, getrandom 318 278, membarrier 324 283,
rseq 334 293
"""
_REFUSED = {"open 2 -": errno.EACCES, "openat 257 56": errno.EACCES, "ioctl 16 29": errno.ENOTTY}
"""Refused as callers of these know it: Python looks whether a file is a terminal."""

_THREAD, _NEW_NAMESPACES = 0x10000, 0x7E020000  # flags of clone
_ANY = 0xFFFFFFFF
_COPIES_AND_FLAGS = (0, 1, 2, 3, 1030)
"""The sandbox allows these commands of fcntl: DUPFD, GETFD, SETFD, GETFL, DUPFD_CLOEXEC. SETOWN
would send signals."""

_EMPTY_PATH = 0x1000
_MACHINES = {"x86_64": (1, 0xC000003E, 317), "aarch64": (2, 0xC00000B7, 277)}
"""The column above, the kernel's name for the architecture, and the number of ``seccomp``."""

# <linux/filter.h> and <linux/seccomp.h>
_LOAD, _AND, _EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_SET_DUMPABLE, _SET_NO_NEW_PRIVS = 4, 38
_SET_FILTER, _ALL_THREADS = 1, 1


def isolate() -> str | None:
    """Isolate this process for the rest of its life. If that cannot be, the reason."""
    limited = "its time and what it writes" if system.limit("RLIMIT_FSIZE", 0) else "its time"
    if sys.platform != "linux":
        return f"{sys.platform} lacks seccomp: {limited} is limited, not memory, files and sockets"
    libc = system.LIBC
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    libc.syscall.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_long, ctypes.c_char_p]
    refused = libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0) or libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    machine = os.uname().machine
    if machine not in _MACHINES or sys.maxsize < 2**32:
        return f"the filter is for 64-bit {' and '.join(_MACHINES)}, not for this {machine}"
    column, architecture, seccomp = _MACHINES[machine]
    steps = _filter(column, architecture)
    held = ctypes.create_string_buffer(steps)
    program = struct.pack("@HP", len(steps) // 8, ctypes.addressof(held))
    if refused or libc.syscall(seccomp, _SET_FILTER, _ALL_THREADS, program):
        reason = os.strerror(ctypes.get_errno())
        return f"this kernel or container refuses a seccomp filter ({reason})"
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except PermissionError:
        return None
    return "this kernel takes a seccomp filter but does not apply it"


def _filter(column: int, architecture: int) -> bytes:
    """The program that the kernel runs at each system call. x32's numbers are on no list."""
    steps = _step(_LOAD, _ARCHITECTURE) + _step(_EQUAL, architecture, 1) + _step(_RETURN, _KILL)
    steps += _step(_LOAD, _NUMBER)
    for call in _ALLOWED.split(","):
        steps += _on(call, column, _step(_RETURN, _ALLOW))
    for call, error in _REFUSED.items():
        steps += _on(call, column, _step(_RETURN, _ERRNO | error))
    steps += _on("clone 56 220", column, _checked(0, _THREAD | _NEW_NAMESPACES, _THREAD))
    steps += _on("tgkill 234 131", column, _checked(0, _ANY, os.getpid()))  # abort() uses it
    steps += _on("fcntl 72 25", column, _checked(1, _ANY, *_COPIES_AND_FLAGS))
    if _fstat_takes_a_path():
        steps += _on("newfstatat 262 79", column, _checked(3, _ANY, _EMPTY_PATH))
    return steps + _step(_RETURN, _ERRNO | errno.ENOSYS)


def _fstat_takes_a_path() -> bool:
    """glibc 2.33 to 2.38 calls ``newfstatat`` with an empty path.

    A filter cannot see the path: hostile code there can learn whether a file exists, and its size.
    """
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or " ").split(" ")
    except ValueError:  # another C library
        return False
    return name == "glibc" and (2, 33) <= tuple(map(int, version.split("."))) < (2, 39)


def _step(code: int, value: int, skip_if: int = 0, skip_else: int = 0) -> bytes:
    return struct.pack("=HBBI", code, skip_if, skip_else, value)


def _on(call: str, column: int, then: bytes) -> bytes:
    """``then``, which ends in a return, for one call; nothing where the machine lacks the call."""
    number = call.split()[column]
    return b"" if number == "-" else _step(_EQUAL, int(number), 0, len(then) // 8) + then


def _checked(argument: int, mask: int, *values: int) -> bytes:
    """Allow a call if the low half of an argument, masked, is one of the values."""
    steps = _step(_LOAD, _ARGUMENTS + 8 * argument) + _step(_AND, mask)
    for value in values:
        steps += _step(_EQUAL, value, 0, 1) + _step(_RETURN, _ALLOW)
    return steps + _step(_RETURN, _ERRNO | errno.EPERM)
