"""The architectures, a file each; see `models.import_hf.architecture`."""
