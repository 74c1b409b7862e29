"""Everything that only a GPU runs; `accelerate` is its one door."""
