"""The Ray Serve application: ingress, sessions, scheduling, wire protocol, page, client."""
