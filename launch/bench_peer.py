"""Our step beside PyTorch's, on the same network, weights and views."""

import importlib.util
from typing import Any

import jax
import ml_collections
import numpy as np

from launch.bench_step import TimedStep, noise_setup, random_batch
from launch.measuring import spread
from mpmc_jax.training.build import init_state
from mpmc_jax.training.state import TrainState
from mpmc_jax.training.step import make_keys
from mpmc_jax.types import Batch, PyTree


def bench_peers(
    config: ml_collections.ConfigDict, repeats: int, kinds: list[str]
) -> dict[str, Any]:
    """Times of both in turns (A B A B), and the ratios of neighbours.

    Args:
      config: of a UniMatch run on one device.
      repeats: timed steps of each; one before them warms up.
      kinds: of `peer_step.PEERS`.

    Returns:
      Our figures; for every kind the spread (least, median, most) of its times and of
      ours over its, and both first losses.

    Raises:
      ValueError: torch is not there, or the peer does not know such a run.
    """
    if importlib.util.find_spec("torch") is None:
        raise ValueError("--peer=torch needs torch: pip install torch")
    published = config.model.backbone in ("resnet50", "resnet101")
    if config.method.name != "unimatch" or not published:
        raise ValueError(
            "--peer=torch knows --method=unimatch with --backbone=resnet50 or resnet101"
        )
    from launch import peer_step

    unknown = set(kinds) - set(peer_step.PEERS)
    if unknown:
        raise ValueError(f"--peer={sorted(unknown)}: valid are {peer_step.PEERS}")
    setup = noise_setup(config, axis_name=None)
    state = init_state(setup, config.seed)
    batch = random_batch(config, setup)

    def augment(state: TrainState, batch: Batch) -> PyTree:
        keys = make_keys(setup.step, state, batch)
        return setup.method.augment(batch, state.method_state, keys)

    inputs = jax.jit(augment)(state, batch)
    rates = config.optimizer
    optimizer = {
        "lr": rates.lr,
        "momentum": rates.momentum,
        "decay": rates.weight_decay,
        "heads": rates.head_multiplier,
    }
    peers = {
        kind: peer_step.TorchPeer(
            kind,
            setup,
            state,
            inputs,
            bfloat16=config.model.dtype == "bfloat16",
            optimizer=optimizer,
        )
        for kind in kinds
    }
    del state, inputs
    ours = TimedStep(config)
    found: dict[str, Any] = {"loss": ours.step()}
    found |= {f"{kind}_loss": peer.step() for kind, peer in peers.items()}
    times: dict[str, list[float]] = {"": [], **{kind: [] for kind in peers}}
    for _ in range(repeats + 1):
        times[""].append(ours.seconds())
        for kind, peer in peers.items():
            times[kind].append(peer.seconds())
    measured = {kind: values[1:] for kind, values in times.items()}
    found["step_seconds"] = spread(measured[""])
    for kind in kinds:
        found[f"{kind}_seconds"] = spread(measured[kind])
        ratios = np.divide(measured[""], measured[kind])
        found[f"over_{kind}"] = spread(ratios.tolist())
    return {**found, **ours.figures}
