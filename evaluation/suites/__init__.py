"""Suites: tasks and settings that are asked together. Each file is one, found by its name."""
