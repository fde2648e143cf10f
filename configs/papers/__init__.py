"""Reproductions: the configuration of a published result, and in its `expect` section the number to be found again."""
