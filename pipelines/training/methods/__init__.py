"""What the training loop trains: one small class a method, all with the shape of `base.Stage`.

May import the networks, the settings and `zero`; the loop knows no method.
"""
