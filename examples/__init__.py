"""Programs to start from, one file each: `python -m examples.NAME` from the root of the repository."""
