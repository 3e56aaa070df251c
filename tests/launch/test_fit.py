"""What `launch.train --fit` chooses, and what it prints."""

import pytest

from launch import fit
from tests.support import tiny
from tests.support.data_sets import prepare_synthetic


def _config(**changes):
    return tiny.config("method=supervised", optimizer__lr=0.1, **changes)


def _measure(per_image, tried):
    """Peaks of 100 bytes and so many per image at once, by rematerialization."""

    def measure(candidate):
        at_once = candidate.train.batch_size // candidate.train.accumulation
        peak = 100 + at_once * per_image[candidate.model.remat]
        tried.append((candidate.train.accumulation, candidate.model.remat))
        return fit.Program(peak, 100)

    return measure


PER_IMAGE = {"off": 40, "cheap": 30, "all": 10}


@pytest.mark.parametrize(
    ("available", "chosen", "tried"),
    [
        (420, (1, "off"), [(1, "off")]),
        (340, (1, "cheap"), [(1, "off"), (1, "cheap")]),
        (180, (1, "all"), [(1, "off"), (1, "cheap"), (1, "all")]),
        # What the first tries rule out is not compiled.
        (140, (2, "all"), [(1, "off"), (1, "cheap"), (1, "all"), (2, "all")]),
        (120, (4, "all"), [(1, "off"), (1, "cheap"), (1, "all"), (4, "all")]),
    ],
)
def test_what_changes_least_is_chosen(available, chosen, tried):
    """A batch of 8 in groups of 2."""
    made = []
    tries = fit.candidates(_config(), 1)
    found, _ = fit.choose(tries, available, _measure(PER_IMAGE, made))
    assert (found.train.accumulation, found.model.remat) == chosen
    assert found.train.batch_size == 8 and found.optimizer.lr == 0.1
    assert made == tried


def test_nothing_that_fits_names_what_to_change():
    tries = fit.candidates(_config(), 1)
    with pytest.raises(ValueError, match="not even one group of images per device"):
        fit.choose(tries, 110, _measure(PER_IMAGE, []))


def test_groups_fill_all_devices_and_the_rate_follows_the_batch():
    (first, *_) = fit.candidates(_config(train__batch_size=6), 4)
    assert first.train.batch_size == 8
    assert first.optimizer.lr == pytest.approx(0.1 * 8 / 6)
    adamw = _config(train__batch_size=2, optimizer__name="adamw")
    (first, *_) = fit.candidates(adamw, 4)
    assert first.train.batch_size == 8 and first.optimizer.lr == pytest.approx(0.2)
    assert adamw.optimizer.lr == 0.1


@pytest.mark.parametrize(
    ("method", "weight"), [("ael", "ael.scale"), ("u2pl", "u2pl.contrast_weight")]
)
def test_weights_by_the_number_of_groups_stay(method, weight):
    config = tiny.config(f"method={method}")
    assert weight not in fit.describe(config)
    larger = fit.scaled(config, 4 * config.train.batch_size, 1, "off")
    flag = f"--config.{weight}={config.train.group_size / config.train.batch_size:g}"
    assert flag in fit.describe(larger)
    assert flag in fit.describe(fit.scaled(larger, 128, 1, "off"))


def test_settings_that_are_saved_already_are_not_given_up():
    saving = _config(train__accumulation=2)
    tries = fit.candidates(saving, 1, ("all",))
    tried = [(c.train.accumulation, c.model.remat) for c in tries]
    assert tried == [(2, "all"), (4, "all")]


@pytest.mark.parametrize(
    ("available", "images", "batch"),
    [(10**4, 100, 64), (10**4, 20, 16), (1400, 100, 32), (700, 100, None)],
)
def test_a_larger_batch_is_the_largest_that_fits(available, images, batch):
    config, measure = _config(), _measure(PER_IMAGE, [])
    program = measure(config)
    found = fit.enlarge(config, program, images, available, measure)
    assert (found and found.train.batch_size) == batch
    if found:
        assert found.optimizer.lr == pytest.approx(0.1 * batch / 8)


def test_the_flags_are_those_of_training():
    config = _config(model__remat="cheap")
    assert fit.describe(config) == (
        "--config.train.batch_size=8 --config.train.accumulation=1 "
        "--config.model.remat=cheap --config.optimizer.lr=0.1"
    )


def test_a_real_step_is_compiled_and_timed(tmp_path, capsys):
    prepare_synthetic(tmp_path, train=9, val=1)
    config = tiny.config(
        "method=supervised", data__split="4", data__threads=0, train__batch_size=2
    )
    config.data.data_dir, config.train.devices = str(tmp_path), 1
    fit.fit(config)
    lines = capsys.readouterr().out.splitlines()
    flags = fit.describe(config)
    assert lines[0].startswith("1 x cpu, ") and lines[0].endswith(" GB free on each")
    assert lines[1].startswith(f"  {flags}: 0.") and lines[1].endswith(" GB, fits")
    assert lines[2] == f"Use {flags}"
    assert lines[3].startswith("A step takes ") and "and 20 steps take " in lines[3]
    assert len(lines) == 4
