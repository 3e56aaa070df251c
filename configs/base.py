"""Every key of a run, with its default. No key exists that is not declared here.

A data-set file (configs/<dataset>.py) starts from `get_base()`, sets what the data
set needs, and applies `presets.apply(config, argument)`, where `argument` is the text
behind the colon of --config=configs/camvid.py:method=unimatch,mpmc=paper.
"""

import ml_collections

FORMAT_VERSION = 1


def get_base() -> ml_collections.ConfigDict:
    """A locked configuration with every key; sizes in pixels, times in steps."""
    config = ml_collections.ConfigDict(
        {
            "format_version": FORMAT_VERSION,
            "seed": 0,
            # Matmul precision: "default", "high" or "highest" (see jax.lax.Precision).
            "matmul_precision": "default",
            "data": _data(),
            "model": _model(),
            "method": _method(),
            "mpmc": _mpmc(),
            "optimizer": _optimizer(),
            "train": _train(),
            "eval": _eval(),
        }
    )
    return config.lock()


def _data() -> dict:
    return {
        "name": "synthetic",
        # Where launch.prepare_data put the data set.
        "data_dir": "data",
        # 1_16 ... 1_2, full, or a number of labelled images. Used to draw the split
        # from split_seed, unless the two id lists are given.
        "split": "1_16",
        "split_seed": 0,
        "labeled_ids": "",
        "unlabeled_ids": "",
        # Side of the square training crop, and the range of the random resize,
        # relative to the image's own long side.
        "crop": 321,
        "scale_min": 0.5,
        "scale_max": 2.0,
        "flip": True,
        # Reading threads, and batches prepared ahead.
        "threads": 2,
        "prefetch": 4,
    }


def _model() -> dict:
    return {
        "name": "deeplabv3plus",
        "backbone": "resnet50",
        # "auto": the variant that the method's authors used.
        "variant": "auto",
        # Channels of the first residual stage over the expansion; 64 is the
        # published network, less is for tests.
        "width": 64,
        "dtype": "float32",
        # Recompute activations in the backward pass: less memory, more time.
        "remat": False,
    }


def _method() -> dict:
    return {
        "name": "unimatch",
        # Pseudo-labels below this confidence do not count.
        "threshold": 0.95,
        # Decay of the averaged network. Methods that learn without one (supervised,
        # unimatch) keep one for evaluation only if it is positive.
        "ema_decay": 0.0,
        # Supervised loss: "ce" or "ohem" (with its two settings).
        "supervised_loss": "ce",
        "ohem_threshold": 0.7,
        "ohem_min_kept": 200_000,
        # Mean teacher only: whether its strong view is mixed.
        "cutmix": True,
    }


def _mpmc() -> dict:
    return {
        "enabled": False,
        # Layer whose output the patch classifier reads.
        "tap": "layer1",
        # Pooling windows, any of (1, 7, 19); 1 is the feature itself.
        "windows": (1, 7, 19),
        # "paper": widths 256, 128, 64; "lite": projected to 64 first (D16).
        "head": "paper",
        # Confidence gamma: softmax_prob (paper), softmax_logit, sigmoid (D4).
        "confidence": "softmax_prob",
        # Scale of lambda_s: none (paper), max, mean (D4).
        "lambda_scale": "none",
        # Weights of L_u and L_u^M in eq. 7 (D3), and of L_l^M (1 in the paper).
        "alpha": 0.25,
        "beta": 0.15,
        "labeled_weight": 1.0,
        # Exponents of the asymmetric loss, eq. 3.
        "gamma_pos": 0.0,
        "gamma_neg": 1.0,
        # Target of eq. 6: "soft" probability or "hard" at 0.5 (D6).
        "target": "soft",
        # Head that plays the teacher: "student" or "ema" (D8).
        "teacher_head": "student",
        # Epochs without the unlabelled terms and lambda (D23).
        "warmup_epochs": 0,
        # Ablations: L_l^M, L_u^M, lambda_s and lambda_m on or off.
        "labeled": True,
        "unlabeled": True,
        "lambda_s": True,
        "lambda_m": True,
    }


def _optimizer() -> dict:
    return {
        # Rate of the backbone; heads learn at lr * head_multiplier.
        "lr": 1e-3,
        "head_multiplier": 10.0,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        # lr * (1 - t/T) ** power; t lags by `lag` steps (UniMatch sets its rate
        # after the step: 1).
        "power": 0.9,
        "lag": 0,
    }


def _train() -> dict:
    return {
        # Length of the run: steps if positive, else epochs over the unlabelled list.
        "steps": 0,
        "epochs": 80,
        # Labelled images a step, over all devices; as many unlabelled ones.
        "batch_size": 8,
        # Images that rank, mix and draw among themselves (D14): what a published
        # configuration had on one GPU.
        "group_size": 2,
        # Parts in which a batch is worked off one after the other.
        "accumulation": 1,
        # How many of the devices; 0 means all.
        "devices": 0,
        # "pmap" or "shard_map".
        "parallel": "pmap",
        "log_every": 10,
        # Steps between evaluations and between checkpoints; 0: once an epoch.
        "eval_every": 0,
        "checkpoint_every": 0,
        # Newest checkpoints to keep beside the best one.
        "keep": 2,
    }


def _eval() -> dict:
    return {
        # "auto": the teacher where the method averages one, else the student.
        "network": "auto",
        # Images of one size a call.
        "batch_size": 4,
        # Pad sizes up to multiples of this, for fewer programs; 0 is exact.
        "pad_to": 0,
    }
