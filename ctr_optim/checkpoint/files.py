"""Checkpoint files: written whole or not at all, read without running code."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(path: str | os.PathLike[str], checkpoint: Any) -> None:
    """``torch.save`` that cannot leave half a file: ``path`` holds the old checkpoint or the new one, come what may.

    The file is written under another name beside it (``.<name>.<pid>.tmp``, which a killed process leaves behind),
    flushed to the disk, and renamed.

    Args:
        path: the file; its directory must exist.
        checkpoint: what :func:`load_checkpoint` can read: tensors, numbers, strings, and lists and dicts of them.
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
    if os.name == "posix":  # the new name is durable once its directory is
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def load_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> Any:
    """``torch.load`` that runs no code of the file's (``weights_only=True``) and says what is wrong with it.

    Raises:
        FileNotFoundError: no file there.
        ValueError: it is truncated or corrupted, or holds more than tensors and plain values.
    """
    try:
        if zipfile.is_zipfile(path):  # torch writes checksums and does not look at them
            with zipfile.ZipFile(path) as file:
                if (damaged := file.testzip()) is not None:
                    raise zipfile.BadZipFile(f"bad checksum of {damaged}")
        return torch.load(path, map_location=map_location, weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ValueError(
            f"{os.fspath(path)}: cannot be loaded; expected a checkpoint of tensors and plain values, whole and "
            f"unchanged since it was saved ({reason[0]})"
        ) from error
