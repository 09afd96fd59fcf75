"""The child process of `convert`: limits itself, reads one untrusted file, writes safetensors and JSON.

Run by path, so that limits come before anything is imported. The two files that it writes are opened first of all. From
then on the kernel (Landlock, on Linux) refuses it every change of a file, every program and every TCP connection, and a
network namespace of its own has no network at all; an audit hook says the same to Python code. What it may still do is
read files that its user may read. Prints one line of JSON: what was written, or why not.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
from typing import Any, BinaryIO

GIB = 1 << 30
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PR_SET_NO_NEW_PRIVS = 38
LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446  # the same numbers on every architecture
READING = 0b1100  # Landlock's READ_FILE and READ_DIR: all that is left to it
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # version of Landlock to how many rights on files it knows
ALLOWED_EVENTS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")  # imports look into folders
FORBIDDEN_EVENTS = (
    "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "fcntl.", "signal.", "syslog.", "sqlite3.",
    "urllib.", "webbrowser.", "tempfile.",
)  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def limit(size: int) -> tuple[bool, bool]:
    """Limits memory, time and, where the system allows, network and files.

    Args:
        size: Bytes of the file that will be read.

    Returns:
        Whether the network is out of reach; whether files are.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (4 * size + 12 * GIB, 4 * size + 12 * GIB))
    resource.setrlimit(resource.RLIMIT_CPU, (600, 600))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * size + (1 << 20), 2 * size + (1 << 20)))
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    try:
        libc = ctypes.CDLL(None)
        return libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0, _landlock(libc)
    except (OSError, AttributeError):  # not a Linux
        return False, False


def _landlock(libc: Any) -> bool:
    """Has the kernel refuse this thread, and those it starts, every access to files but reading; for good."""
    version = libc.syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if not sys.platform.startswith("linux") or version < 1:
        return False
    files = (1 << RIGHTS.get(version, 16)) - 1 & ~READING
    rules = (ctypes.c_uint64 * 3)(files, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0)  # TCP; signals
    fd = libc.syscall(LANDLOCK_CREATE_RULESET, rules, ctypes.c_size_t(ctypes.sizeof(rules)), ctypes.c_uint32(0))
    if fd < 0 or libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return False
    done = libc.syscall(LANDLOCK_RESTRICT_SELF, fd, ctypes.c_uint32(0)) == 0
    os.close(fd)
    return done


def forbid() -> None:
    """Turns processes, sockets, native functions and changes of files into errors for Python code."""
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))

    def hook(event: str, args: Any) -> None:
        writes = event == "open" and len(args) > 2 and isinstance(args[2], int) and args[2] & WRITING
        if writes or (event.startswith(FORBIDDEN_EVENTS) and event not in ALLOWED_EVENTS):
            raise PermissionError(f"{event} is forbidden while an untrusted file is read")

    sys.addaudithook(hook)


def convert(path: str, weights: BinaryIO, configuration: BinaryIO, key: str) -> dict[str, Any]:
    """Reads the file and writes the result.

    Args:
        path: The untrusted file.
        weights: Where the tensors go, open.
        configuration: Where the configuration goes, open.
        key: Which network of the file; empty for the usual one.

    Returns:
        What was written.
    """
    from safetensors.torch import save

    from balanced_rep.models._convert_read import read

    forbid()
    tensors, config = read(path, key)
    weights.write(save(tensors))
    configuration.write(json.dumps(config, indent=2).encode())
    return {"n_tensors": len(tensors), "n_parameters": sum(t.numel() for t in tensors.values())}


def main() -> None:
    """Entry point: path, folder and key are the arguments."""
    path, out, key = sys.argv[1:4]
    try:
        with (
            open(os.path.join(out, "model.safetensors"), "wb") as weights,
            open(os.path.join(out, "config.json"), "wb") as configuration,
        ):
            network, files = limit(os.path.getsize(path))
            answer = {**convert(path, weights, configuration, key), "network_isolated": network}
            answer["files_isolated"] = files
    except MemoryError:
        answer = {"error": "it needs more memory than a file of its size may take."}
    except Exception as error:  # the parent tells the person; nothing of the file is trusted to print
        answer = {"error": str(error) or type(error).__name__}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
