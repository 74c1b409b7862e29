"""The front deployment: sockets, sessions, pacing, HTTP."""
