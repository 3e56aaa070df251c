"""Does MPMC help? Stages 1 to 3 of the evidence, in runs of minutes on a CPU.

Stage 0 trains no segmentation network: it is the figure `evidence0`. Stage 1 looks for
settings in which semi-supervision is better than supervision; stage 2 adds MPMC part by
part; stage 3 varies what won, and goes beyond the paper. Runs of one seed have the same
split, order of images and initial weights, and equal runs of two stages are one.
"""

from collections.abc import Mapping
from typing import Any

from mpmc_jax.experiments.paper.base import Choice, Experiment, Pair

# Short runs at a high rate, whose average forgets within them.
_SHORT = {
    "train.steps": 300,
    "train.eval_every": 100,
    "train.checkpoint_every": 100,
    "train.precise_bn": 20,
    "optimizer.lr": 0.05,
    "method.ema_decay": 0.97,
    # The published head has eight times the FLOPs of these networks.
    "mpmc.head": "lite",
}
_SETTINGS = {
    "acdc": {
        **_SHORT,
        "data.crop": 96,
        "train.batch_size": 8,
        "train.group_size": 8,
        # Where stage 0's oracle removes a tenth of the wrong weight.
        "mpmc.tap": "stage2",
    },
    # Trained and evaluated at a third of its images' size, where a small crop shows
    # enough of a street to learn from. Adam learns from random weights in a fourth of
    # the steps that SGD takes.
    "camvid": {
        **_SHORT,
        "train.steps": 400,
        "optimizer.name": "adamw",
        "optimizer.lr": 0.002,
        "model.name": "unet",
        "data.crop": 96,
        "data.scale_base": 160,
        "data.scale_min": 0.8,
        "data.scale_max": 1.5,
        "eval.scales": (0.33334,),
        "train.batch_size": 8,
        "train.group_size": 8,
        "mpmc.tap": "stage2",
    },
}
# Of CamVid's 367 images 23 are labeled.
_PARTS = {"camvid": "1_16"}
_COLUMNS = {"3": Choice("3 cases", {"split": "3"})}


def _choice(
    label: str,
    method: str,
    mpmc: str = "off",
    settings: Mapping[str, Any] | None = None,
) -> Choice:
    return Choice(label, {"method": method, "mpmc": mpmc}, settings or {})


# What the arms train on: the best of stage 1. The size of lambda matters to
# cross-entropy; it cancels in Dice.
_BASE = {"method.unlabeled_loss": "ce", "method.threshold": 0.0}
# What the arms trained on first.
_BALANCED = {**_BASE, "method.unlabeled_loss": "balanced_ce"}


def _mean_teacher(label: str, **settings: Any) -> Choice:
    """Mean teacher with settings of its section "method"."""
    settings = {f"method.{key}": value for key, value in settings.items()}
    return _choice(f"Mean teacher, {label}", "mean_teacher", settings=settings)


_BETTER = "Is it better than supervision at equal steps?"
STAGE1 = Experiment(
    "Is semi-supervision better than supervision?",
    "acdc",
    {
        "supervised": _choice("Supervised", "supervised"),
        "mean_teacher": _choice("Mean teacher, as its preset", "mean_teacher"),
        "mean_teacher_ce": _mean_teacher("cross-entropy", unlabeled_loss="ce"),
        "mean_teacher_ce_07": _mean_teacher(
            "cross-entropy, threshold 0.7", unlabeled_loss="ce", threshold=0.7
        ),
        "mean_teacher_ce_0": _mean_teacher(
            "cross-entropy, threshold 0", unlabeled_loss="ce", threshold=0.0
        ),
        "mean_teacher_0": _mean_teacher("its preset, threshold 0", threshold=0.0),
        "mean_teacher_balanced_0": _choice(
            "Mean teacher, balanced cross-entropy, threshold 0",
            "mean_teacher",
            settings=_BALANCED,
        ),
        "unimatch": _choice("UniMatch", "unimatch"),
        "no_unlabeled": _choice(
            "Mean teacher, unlabeled loss of weight 0",
            "mean_teacher",
            settings={**_BASE, "mpmc.alpha": 0.0},
        ),
    },
    _COLUMNS,
    pairs=tuple(
        Pair(row, "supervised", _BETTER)
        for row in (
            "mean_teacher",
            "mean_teacher_ce",
            "mean_teacher_ce_07",
            "mean_teacher_ce_0",
            "mean_teacher_0",
            "mean_teacher_balanced_0",
            "unimatch",
            "no_unlabeled",
        )
    )
    + (Pair("mean_teacher_ce_0", "no_unlabeled", "Does the unlabeled loss help?"),),
    note="All are evaluated by averaged parameters, but mean teacher's batch-norm "
    "statistics are of labeled and unlabeled images, supervision's of labeled ones. "
    "Where the unlabeled loss has weight 0, nothing else differs from supervision.",
    settings=_SETTINGS,
    parts=_PARTS,
)

# L_l^M trains the head and the encoder; nothing else of MPMC acts.
_LABELED = {**_BASE, "mpmc.unlabeled": False, "mpmc.lambda_s": False}
# And lambda_s weighs pseudo-labels, 1 for the patch's most probable class.
_MAX = {**_BASE, "mpmc.unlabeled": False, "mpmc.lambda_scale": "max"}
# What stage 0 finds to tell right from wrong best.
_LOGIT = {
    **_BASE,
    "mpmc.unlabeled": False,
    "mpmc.confidence": "softmax_logit",
    "mpmc.lambda_scale": "mean",
}
_CLASS_MEAN = {**_LOGIT, "mpmc.lambda_scale": "class_mean"}
# The preset `mpmc=recommended`, whose head all of these runs have.
_RECOMMENDED = {**_BASE, "mpmc.lambda_scale": "mean"}
_UNIFORM = {**_BASE, "mpmc.unlabeled": False, "mpmc.uniform": True}
_HARD = {
    **_BASE,
    "mpmc.lambda_s": False,
    "mpmc.target": "hard",
    "mpmc.lambda_m_scale": "mean",
}


def _without_base(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Presets and other methods have unlabeled losses of their own."""
    return {key: value for key, value in settings.items() if key not in _BASE}


def _arm(label: str, settings: Mapping[str, Any]) -> Choice:
    return _choice(label, "mean_teacher", "paper", settings)


_OFF = _choice("A: mean teacher", "mean_teacher", settings=_BASE)
STAGE2 = Experiment(
    "Which part of MPMC helps?",
    "acdc",
    {
        "supervised": STAGE1.rows["supervised"],
        "mean_teacher": STAGE1.rows["mean_teacher"],
        "off": _OFF,
        "labeled": _arm("B: L_l^M alone", _LABELED),
        "detached": _arm("C: B, head detached", {**_LABELED, "mpmc.detach": "all"}),
        "max": _arm("D: B, lambda_s divided by the patch's largest", _MAX),
        "paper": _arm("E: the paper", _BASE),
        "uniform": _arm("F: B, mean lambda_s everywhere", _UNIFORM),
        "shuffled": _arm("G: D, lambda_s shuffled", {**_MAX, "mpmc.shuffle": True}),
        "hard": _arm("H: B, L_u^M with hard targets and lambda_m of mean 1", _HARD),
        "logit": _arm("I: B, lambda_s from the softmax of logits, mean 1", _LOGIT),
        "logit_detached": _arm("J: I, head detached", {**_LOGIT, "mpmc.detach": "all"}),
        "logit_shuffled": _arm(
            "K: I, lambda_s shuffled", {**_LOGIT, "mpmc.shuffle": True}
        ),
        "preset_logit": _arm("L: the preset with I's MPMC", _without_base(_LOGIT)),
        "recommended": _arm("M: `recommended`", _RECOMMENDED),
        "class_mean": _arm("N: I with mean 1 in each pseudo-class", _CLASS_MEAN),
        **{
            f"balanced_{row}": _arm(f"Balanced {label}", {**settings, **_BALANCED})
            for row, label, settings in (
                ("labeled", "B", _LABELED),
                ("logit", "I", _LOGIT),
                ("logit_shuffled", "K", {**_LOGIT, "mpmc.shuffle": True}),
            )
        },
        "balanced_off": _choice("Balanced A", "mean_teacher", settings=_BALANCED),
    },
    _COLUMNS,
    note="Arms train on cross-entropy without a threshold, the best of stage 1, in "
    "which the size of lambda_s acts. In C nothing of MPMC reaches the network: it "
    "must equal A up to rounding. Lambda_s of F is the mean over confident pixels, per "
    "step, of the paper's. Balanced arms give all classes of pseudo-labels the same "
    "weight, so that those of rare classes, often wrong, weigh as much as others.",
    pairs=(
        Pair("labeled", "off", "Does L_l^M help?"),
        Pair("detached", "off", "Nothing reaches the network: is it equal?"),
        Pair("max", "off", "Does L_l^M with lambda_s help?"),
        Pair("max", "labeled", "Does lambda_s help beyond L_l^M?"),
        Pair("max", "shuffled", "Does it matter where lambda_s is small?"),
        Pair("paper", "off", "Does the paper's MPMC help?"),
        Pair("paper", "uniform", "Is it more than a smaller alpha?"),
        Pair("hard", "labeled", "Does L_u^M help beyond L_l^M?"),
        Pair("logit", "off", "Does L_l^M with stage 0's best lambda_s help?"),
        Pair("logit", "labeled", "Does that lambda_s help beyond L_l^M?"),
        Pair("logit", "supervised", "Is that better than supervision?"),
        Pair("logit", "mean_teacher", "Is that better than the preset without MPMC?"),
        Pair("logit", "logit_shuffled", "Does it matter where that one is small?"),
        Pair("logit_detached", "off", "Does that lambda_s help without L_l^M?"),
        Pair("logit_detached", "logit", "Is it better without L_l^M?"),
        Pair("preset_logit", "mean_teacher", "Does that MPMC help the preset?"),
        Pair("recommended", "off", "Does `recommended` help?"),
        Pair("logit", "recommended", "Is I better than `recommended`?"),
        Pair("class_mean", "off", "Does lambda_s help if it weights no class down?"),
        Pair("class_mean", "logit", "Is it better so?"),
        Pair("balanced_off", "off", "Does it help to balance classes?"),
        Pair("balanced_labeled", "balanced_off", "Does L_l^M help there?"),
        Pair("balanced_logit", "balanced_off", "Does lambda_s help there?"),
        Pair("balanced_logit", "balanced_logit_shuffled", "Does it matter where?"),
        Pair("balanced_logit", "off", "Is that better than not to balance?"),
    ),
    settings=_SETTINGS,
    parts=_PARTS,
)

# What is varied: the paper's form, since no arm of stage 2 was better than A.
_WINNER = _BASE
_METHODS = {"unimatch": "UniMatch", "augseg": "AugSeg"}
_VARIED = {
    "gamma_neg_0": ("gamma- = 0", {"mpmc.gamma_neg": 0.0}),
    "gamma_neg_2": ("gamma- = 2", {"mpmc.gamma_neg": 2.0}),
    "gamma_pos_1": ("gamma+ = 1", {"mpmc.gamma_pos": 1.0}),
    "weight_03": ("weight of L_l^M 0.3", {"mpmc.labeled_weight": 0.3}),
    "weight_3": ("weight of L_l^M 3", {"mpmc.labeled_weight": 3.0}),
    "alpha_1": ("alpha = 1", {"mpmc.alpha": 1.0}),
}
# One idea at a time, and never part of `paper`.
_BEYOND = {
    "gate": ("a gate at probability 0.1", {"mpmc.gate": 0.1}),
    "temperature": ("temperature 0.25", {"mpmc.temperature": 0.25}),
    "sigmoid": ("gamma the patch's probability", {"mpmc.confidence": "sigmoid"}),
    "ramped": ("lambda_s from the second epoch on", {"mpmc.warmup_epochs": 1}),
}


_STAGE3 = {"off": _OFF, "winner": _arm("E", _WINNER)}
for _row, (_label, _changes) in (_VARIED | _BEYOND).items():
    _STAGE3[_row] = _arm(f"E, {_label}", {**_WINNER, **_changes})
for _method, _label in _METHODS.items():
    _STAGE3[_method] = _choice(_label, _method)
    _STAGE3[f"{_method}_winner"] = _choice(
        f"{_label} + MPMC", _method, "paper", _without_base(_WINNER)
    )
# In 300 steps a seed whose network finds the right ventricle late stays behind.
_LONG = {"train.steps": 600}
_STAGE3 |= {
    "long_off": _choice("A, 600 steps", "mean_teacher", settings={**_BASE, **_LONG}),
    "long_labeled": _arm("B, 600 steps", {**_LABELED, **_LONG}),
    "long_max": _arm("D, 600 steps", {**_MAX, **_LONG}),
}
STAGE3 = Experiment(
    "Other settings and methods, longer runs, and ideas beyond the paper",
    "acdc",
    _STAGE3,
    _COLUMNS,
    pairs=(
        Pair("winner", "off", "Does it help?"),
        *(Pair(row, "winner", "Is it a better setting?") for row in _VARIED),
        *(Pair(row, "winner", "Does it help beyond the paper?") for row in _BEYOND),
        *(Pair(row, "off", "And against none of MPMC?") for row in _BEYOND),
        Pair("long_labeled", "long_off", "Does L_l^M help in twice the steps?"),
        Pair("long_max", "long_off", "Does L_l^M with lambda_s help in them?"),
        *(
            Pair(f"{method}_winner", method, f"Does it help {label}?")
            for method, label in _METHODS.items()
        ),
    ),
    settings=_SETTINGS,
    parts=_PARTS,
)
