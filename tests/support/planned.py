"""Planned runs and the folder of their results, as `launch.experiments` makes them."""

from launch.experiments import __main__ as experiments
from mpmc_jax.experiments.paper.results import Place


def place_of(folder, *flags):
    """The folder of runs that are planned with these flags."""
    return Place(folder, lambda run: experiments._configuration(run.flags(flags)))
