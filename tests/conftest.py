"""Ctrl-C must reach what the tests start, even where it is ignored for themselves.

A shell starts `make test &` with SIGINT ignored, and children inherit that for ever.
"""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
