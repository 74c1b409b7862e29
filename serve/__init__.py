"""The Ray Serve application: ingress, sessions, scheduling, wire protocol, page, client.

May import `modeling`, the video codec of `data`, and `infra.runtime`.
"""
