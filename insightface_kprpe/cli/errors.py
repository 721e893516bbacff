"""What went wrong, in one sentence for the user."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from ..debugging import VARIABLE

# Raised by this package, or written for users: the message is the sentence.
_SENTENCES = (ValueError, RuntimeError, ImportError, FileNotFoundError)


def describe(error: Exception, arguments: Sequence[str]) -> str:
    """A sentence that names the file, whatever raised the error.

    Args:
        error: what ended the command.
        arguments: of the command line; where an error names no file, those that are files or folders are named.
    """
    text = _on_one_line(error)
    if isinstance(error, OSError) and error.strerror:
        text = _system_error(error)
        if error.filename is None:
            return text + _given("", arguments)
    elif isinstance(error, MemoryError):
        text = f"not enough memory ({text})" if text else "not enough memory"
    elif isinstance(error, EOFError):
        text = f"a file ends too early ({text})" if text else "a file ends too early"
    elif not isinstance(error, _SENTENCES):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
        text += f" (unexpected; {VARIABLE}=1 or --debug before the verb shows the traceback)"
    return (text or type(error).__name__) + _given(text, arguments)


def _system_error(error: OSError) -> str:
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    subject = " -> ".join(names)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left to write {subject or 'a file'}; free some, or write elsewhere"
    return f"{subject}: {error.strerror}" if subject else error.strerror


def _on_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _given(text: str, arguments: Sequence[str]) -> str:
    """The files on the command line, where the text names none."""
    files = [argument for argument in arguments if os.path.lexists(argument)]
    if not files or "/" in text or os.sep in text or any(os.path.basename(file.rstrip("/")) in text for file in files):
        return ""
    return f" (given: {', '.join(files)})"
