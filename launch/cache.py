"""Compiled programs that outlive the process."""

import pathlib

import jax


def keep_compiled_programs() -> None:
    """Turns JAX's compilation cache on, unless a place for it was already chosen.

    Evaluation compiles a program a distinct image size; the next run finds them.
    JAX_COMPILATION_CACHE_DIR chooses another place, ~/.cache/mpmc_jax otherwise.
    """
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore
        cache = pathlib.Path.home() / ".cache" / "mpmc_jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
