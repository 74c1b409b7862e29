"""How stages are run: each only once, in order, planned before and shown meanwhile.

May import the records and MLflow of `tracking`, and the settings; knows no stage.
"""
