"""The primitives: pure functions on arrays, with no Flax, no configuration and no parameters."""
