"""The folder that a command writes to."""

from __future__ import annotations

import tempfile
from pathlib import Path

__all__ = ["check_output_folder"]


def check_output_folder(folder: Path) -> None:
    """Makes the folder, and a file in it for a moment: what cannot be written is known before the work is done.

    Args:
        folder: The folder.

    Raises:
        OSError: If it cannot be made or written to; the message says what to do.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"Cannot write to the folder {folder}: {error.strerror}. Give another with --out DIR.") from error
