"""How stages are run: each only once, in order, planned before and shown meanwhile.

May import training's job, the settings, the records and MLflow; knows no stage.
"""
