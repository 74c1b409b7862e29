"""What was done, with what, and where it is: records, fingerprints, MLflow."""
