"""What was done, with what, and where it is: records, fingerprints, MLflow.

May import datasets and model directories; MLflow is imported here and by the registry reader alone.
"""
