"""Text that users write: UTF-8, with or without a byte order mark, its lines ended by \\n or \\r\\n and by nothing else."""

import os
from pathlib import Path

from dmpctl.errors import UsageError
from dmpctl.words import printable


def decoded(data: bytes, what: str) -> str:
    """Returns the text of bytes that an error calls `what`, without a byte order mark; UsageError where they are not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        where = f"byte 0x{data[error.start]:02x} in line {line}, at {error.start}"
        raise UsageError(f"{what} is not text in UTF-8: {where}", "save it as UTF-8") from None


def read_user_text(path: Path) -> str:
    """Returns the text of a file; OSError where it cannot be read, otherwise as `decoded`."""
    return decoded(path.read_bytes(), printable(str(path)))


def lines_of(text: str) -> list[str]:
    """Returns the lines that are not blank: U+2028, form feeds and the like are part of a line, as they are for other tools."""
    return [line for each in text.split("\n") if (line := each.removesuffix("\r")).strip()]


def refuse_other_encoding(path: str | os.PathLike[str], what: str) -> None:
    """Raises UsageError for a path that is not UTF-8: JSON and safetensors, which record it, cannot hold it."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise UsageError(f"{what} {printable(os.fspath(path))} is not UTF-8", "give it a name in UTF-8") from None
