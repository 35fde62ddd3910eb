"""A Python process that runs our own modules."""

from __future__ import annotations

import sys
from pathlib import Path


def command(code: str, *arguments: str) -> list[str]:
    """The words that run *code*, for which ``sys`` is imported, with our sys.path.

    Its own path would begin with the working directory, where anybody may have put modules. PYTHONPATH would reach
    what the process starts: a kubeconfig's credential plugin may be of another Python.
    """
    path = [each for each in sys.path if Path(each).is_absolute()]
    return [sys.executable, "-c", f"import sys; sys.path[:] = {path!r}; {code}", *arguments]
