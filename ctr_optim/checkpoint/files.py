"""Checkpoint files: written completely or not at all, and read without running code from the file."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(path: str | os.PathLike[str], checkpoint: Any) -> None:
    """Save a checkpoint atomically: at any time, ``path`` holds either the complete old file or the complete new file.

    The function writes to ``.<name>.<pid>.tmp`` in the same directory, flushes that file to the disk and renames it. A
    killed process may leave the temporary file behind.

    Args:
        path: the file; its directory must exist.
        checkpoint: tensors, numbers and strings, and lists and dicts of them; :func:`load_checkpoint` reads only these.

    Raises:
        OSError: if the file cannot be written; the old file stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename is durable only after the directory is flushed
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def load_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> Any:
    """Load a checkpoint without running code from the file (``weights_only=True``), and check it for damage.

    Args:
        path: the file.
        map_location: as in ``torch.load``.

    Returns:
        the saved object.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated or corrupted, or holds other objects than tensors and plain values.
    """
    try:
        if zipfile.is_zipfile(path):  # torch writes checksums, but does not verify them
            with zipfile.ZipFile(path) as file:
                if (damaged := file.testzip()) is not None:
                    raise zipfile.BadZipFile(f"bad checksum of {damaged}")
        return torch.load(path, map_location=map_location, weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ValueError(
            f"{os.fspath(path)}: cannot be loaded ({reason[0]}); expected an undamaged checkpoint of tensors and plain "
            "values, as save_checkpoint writes it"
        ) from error
