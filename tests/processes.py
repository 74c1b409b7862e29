"""Processes that may end while they are looked at."""

from __future__ import annotations

import psutil


def command_of(process: psutil.Process) -> list[str]:
    """Its command line, empty if it has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []
