"""The child process of `convert`: limits itself, reads one untrusted file, writes safetensors and JSON.

Run by path, so that limits and the loss of the network come before anything is imported. Prints one line of JSON: what
was written, or why not.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
from typing import Any

GIB = 1 << 30
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
FORBIDDEN_EVENTS = (
    "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.remove", "os.rmdir", "os.rename",
    "os.chmod", "os.symlink", "os.link", "subprocess.Popen", "socket.connect", "socket.bind", "socket.getaddrinfo",
    "ctypes.dlopen", "shutil.rmtree", "pty.spawn",
)  # fmt: skip


def limit(size: int) -> bool:
    """Limits memory, time, files and, where the system allows, the network.

    Args:
        size: Bytes of the file that will be read.

    Returns:
        Whether the network is out of reach.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (4 * size + 12 * GIB, 4 * size + 12 * GIB))
    resource.setrlimit(resource.RLIMIT_CPU, (600, 600))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * size + (1 << 20), 2 * size + (1 << 20)))
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    try:
        return ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0
    except (OSError, AttributeError):  # not a Linux, or not allowed
        return False


def forbid() -> None:
    """Turns processes, sockets and changes of other files into errors, whoever asks for them."""

    def hook(event: str, _args: Any) -> None:
        if event in FORBIDDEN_EVENTS:
            raise PermissionError(f"{event} is forbidden while an untrusted file is read")

    sys.addaudithook(hook)


def convert(path: str, out: str, key: str) -> dict[str, Any]:
    """Reads the file and writes the result.

    Args:
        path: The untrusted file.
        out: An existing folder.
        key: Which network of the file; empty for the usual one.

    Returns:
        What was written.
    """
    from safetensors.torch import save

    from balanced_rep.models._convert_read import read

    forbid()
    tensors, config = read(path, key)
    with open(os.path.join(out, "model.safetensors"), "wb") as file:
        file.write(save(tensors))
    with open(os.path.join(out, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2)
    return {"n_tensors": len(tensors), "n_parameters": sum(t.numel() for t in tensors.values())}


def main() -> None:
    """Entry point: path, folder and key are the arguments."""
    path, out, key = sys.argv[1:4]
    isolated = limit(os.path.getsize(path))
    try:
        answer = {**convert(path, out, key), "network_isolated": isolated}
    except MemoryError:
        answer = {"error": "it needs more memory than a file of its size may take."}
    except Exception as error:  # the parent tells the person; nothing of the file is trusted to print
        answer = {"error": str(error) or type(error).__name__}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
