"""Measurements of speed and memory: one program per claim, which prints a table and writes JSON."""
