"""What is compiled is kept, for this processor and these versions, and a damaged entry does no harm."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from common import compilation_cache
from common.errors import UserError
from common.files import cache_folder

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import jax, jax.numpy as jnp
from common import compilation_cache
compilation_cache.MINIMUM_SECONDS = 0.0
compilation_cache.use()
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
print(float(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.arange(4.0))), len(hits) > 0, jax.config.jax_compilation_cache_dir)
"""


def start(cache, **environment):
    environment = {**os.environ, "MIXOLOGY_CACHE": str(cache), "JAX_PLATFORMS": "cpu", **environment}
    run = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    value, hit, folder = run.stdout.split()
    return float(value), hit == "True", folder


def test_a_user_without_a_home(monkeypatch):
    """Has no cache of what is compiled, and is told what to do where one is needed."""
    monkeypatch.setenv("MIXOLOGY_CACHE", "~nobody_here/cache")
    before = jax.config.jax_compilation_cache_dir
    compilation_cache.use()
    assert jax.config.jax_compilation_cache_dir == before
    with pytest.raises(UserError, match=r"~nobody_here/cache: .*: give a folder .*MIXOLOGY_CACHE"):
        cache_folder()


def test_the_second_start_does_not_compile(tmp_path):
    value, hit, folder = start(tmp_path)
    assert not hit and folder.startswith(str(tmp_path / "compiled" / "jax-"))
    assert start(tmp_path) == (value, True, folder)
    for entry in pathlib.Path(folder).iterdir():
        entry.write_bytes(b"damaged")
    assert start(tmp_path)[0] == value
    assert start(tmp_path / "other", JAX_ENABLE_COMPILATION_CACHE="false") == (value, False, "None")
