"""Plug-ins: supervision that any base method can carry."""

from mpmc_jax.plugins.base import Identity as Identity
from mpmc_jax.plugins.base import Plugin as Plugin
from mpmc_jax.plugins.registry import build_plugin as build_plugin
