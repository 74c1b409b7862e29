"""Processes that may end while they are looked at, and a port that one has just left."""

from __future__ import annotations

import socket

import psutil


def command_of(process: psutil.Process) -> list[str]:
    """Its command line, empty if it has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def port_just_left() -> int:
    """One whose last connection, which the server closed, waits for stragglers for a minute."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
        with socket.create_connection(("127.0.0.1", port)) as client:
            listener.accept()[0].close()
            assert client.recv(1) == b""
    return port
