"""What the pipeline chains: one file a stage, and what runs them."""
