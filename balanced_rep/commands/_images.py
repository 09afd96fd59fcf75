"""Images and prompts from disk."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["image_batches", "read_prompts"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")
MAX_PIXELS = 32_000_000  # a few kilobytes of PNG can claim gigabytes


def image_batches(folder: Path, shape: tuple[int, int, int], *, resize: bool, batch_size: int) -> Iterator[Tensor]:
    """The images of a folder, by name; 2.png comes before 10.png, so that a line of prompts belongs to each.

    Args:
        folder: With PNG, JPEG or WebP files.
        shape: Channels (1 or 3), height and width that the model takes.
        resize: Scale and crop images of another size; else they are an error.
        batch_size: Images at once.

    Yields:
        `(batch, *shape)` float32 in [-1, 1].

    Raises:
        ValueError: If there are no images, or one cannot be used; names it.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    paths = sorted((p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES), key=_natural)
    if not paths:
        raise ValueError(f"{folder}: no images in it ({', '.join(SUFFIXES)}).")
    for start in range(0, len(paths), batch_size):
        yield torch.stack([_read(path, shape, resize) for path in paths[start : start + batch_size]])


def read_prompts(path: Path) -> list[str]:
    """Prompts: one a line, or the field "caption", "prompt" or "text" of each line of a .jsonl file.

    Args:
        path: The file.

    Returns:
        The prompts.

    Raises:
        ValueError: If there are none, a line has no prompt, or the file is no text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no text in UTF-8 ({error}).") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path}: no prompts in it.")
    if path.suffix != ".jsonl":
        return lines
    found = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            found.append(next(str(record[k]) for k in ("caption", "prompt", "text") if k in record))
        except (ValueError, TypeError, StopIteration) as error:
            raise ValueError(f"{path}, line {number}: no object with 'caption', 'prompt' or 'text'.") from error
    return found


def _natural(path: Path) -> tuple[list[tuple[str, int]], str]:
    """Text and the number after it, by turns; the name itself decides between 1.png and 01.png."""
    parts = re.findall(r"([^0-9]*)([0-9]*)", path.name)
    return [(text, int(number or -1)) for text, number in parts], path.name


def _read(path: Path, shape: tuple[int, int, int], resize: bool) -> Tensor:
    from PIL import Image, ImageOps, UnidentifiedImageError

    channels, height, width = shape
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{path}: {image.width} x {image.height} pixels are more than {MAX_PIXELS:,}.")
                if image.mode not in MODES:  # 16 bits would be cut off at 255, silently
                    raise ValueError(f"{path}: its mode is {image.mode!r}; give 8 bits a channel ({', '.join(MODES)}).")
                picture: Any = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable PNG, JPEG or WebP image ({error}).") from error
    if picture.size != (width, height):
        if not resize:
            raise ValueError(
                f"{path}: {picture.width} x {picture.height} pixels, and the model takes {width} x {height}; "
                "nothing is resized unless you say --resize."
            )
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    import numpy as np

    pixels = torch.from_numpy(np.array(picture, dtype=np.float32)) / 127.5 - 1
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)
