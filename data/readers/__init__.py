"""The kinds of corpora that are read from files: one file each, found by name."""
