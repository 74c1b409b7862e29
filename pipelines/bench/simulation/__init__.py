"""A day of an application with up to thousands of editors, on a simulated clock.

What decides is what serves: `Placement`, `Capacity` and the policy that Serve's autoscaler calls.
Only what they decide about is simulated: clients, what their chunks really cost, editors that take
their time to start, machines that are lost.

May import of `serve` what decides, and what that is decided about.
"""
