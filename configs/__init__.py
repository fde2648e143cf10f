"""Experiment families: each file has `get_config(arg) -> ConfigDict`."""
