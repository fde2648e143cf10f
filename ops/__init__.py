"""The primitives: pure functions on arrays, with no Flax, no configuration and no parameters."""

from common import cpu_compiler

cpu_compiler.avoid_wrong_products()
