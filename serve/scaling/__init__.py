"""Which editor a stream goes to, who waits, and how many editors there shall be."""
