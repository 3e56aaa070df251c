"""Declares every key of a run's configuration, with its default.

A data-set file (configs/<dataset>.py) starts from `get_base()`, sets what the data
set needs, and applies `presets.apply(config, argument)`, where `argument` is the text
after the colon of --config=configs/camvid.py:method=unimatch,mpmc=paper.
"""

import ml_collections

FORMAT_VERSION = 3


def get_base() -> ml_collections.ConfigDict:
    """Returns a locked configuration with every key; sizes are in pixels."""
    config = ml_collections.ConfigDict(
        {
            "format_version": FORMAT_VERSION,
            "seed": 0,
            # Matmul precision: "default", "high" or "highest" (see jax.lax.Precision).
            "matmul_precision": "default",
            "data": _data(),
            "model": _model(),
            "method": _method(),
            "imbalance": _imbalance(),
            "u2pl": _u2pl(),
            "ael": _ael(),
            "fixmatch": _fixmatch(),
            "cps": _cps(),
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
        # Folder of the data sets that launch.prepare_data wrote.
        "data_dir": "data",
        # 1_16 ... 1_2, full, or a number of labeled images. Used to draw the split
        # from split_seed, unless the two id lists are given.
        "split": "1_16",
        "split_seed": 0,
        "labeled_ids": "",
        "unlabeled_ids": "",
        # Train even if a class occurs in no labeled image, so that it cannot be
        # learned.
        "allow_absent_classes": False,
        # Side of the square training crop, and the range of the random resize.
        "crop": 321,
        "scale_min": 0.5,
        "scale_max": 2.0,
        # The long side that the range refers to (AugSeg on VOC: 500); 0: each image's
        # own. Methods whose resize is by a factor (u2pl, ael) use their own.
        "scale_base": 0,
        "flip": True,
        # How an image becomes a crop: "auto", the method's own way; or "acdc": the
        # whole image is turned, mirrored or rotated, then resized.
        "geometry": "auto",
        # Crops that UniMatch mixes in: "auto" and "same", a second crop of the same
        # image; "other", crops of other images, in an order of their own.
        "partner": "auto",
        # Mean and standard deviation: "imagenet", "half" (0.5 each), "dataset"
        # (measured unless the data set states its own), "none", or "auto": the
        # encoder's for 8-bit RGB ("half" for vit_*, else "imagenet"), else "dataset".
        "normalization": "auto",
        # Keep the training images on every device, and cut crops out of them there.
        # The crops are the same, but for AEL's, whose interpolation is in floats: a
        # byte may differ by one. For data sets of a few GB (ACDC, CamVid, VOC).
        "resident": False,
        # Reading threads: 0 for none, -1 for one per CPU of the process, at most 16;
        # and batches prepared ahead, at least one per thread.
        "threads": -1,
        "prefetch": 4,
    }


def _model() -> dict:
    return {
        # "deeplabv3plus"; "unet" (no backbone, no variant; crops of 16 n pixels); on a
        # vision transformer "dpt", "segmenter" (mask transformer) or
        # "segmenter_linear".
        "name": "deeplabv3plus",
        # A ResNet with a deep stem, or torchvision's: resnet50_plain, resnet101_plain,
        # resnet18; augreg's vit_s16, vit_b16, vit_l16 (crops of 16 n pixels), or
        # dinov2_s14, dinov2_b14, dinov2_l14 (crops of 14 n pixels). vit_xs16 and
        # dinov2_xs14 have four narrow blocks, for trials: no weights were published.
        "backbone": "resnet50",
        # "auto": the variant that the method's authors used.
        "variant": "auto",
        # Channels of the first residual stage over the expansion, or per attention
        # head; 64 is the published network, less is for tests.
        "width": 64,
        "dtype": "float32",
        # dtype of the teacher's passes; "": the same. Parameters, averages: float32.
        "teacher_dtype": "",
        # What the encoder recomputes in the backward pass, for less memory and more
        # time: "off", nothing; "cheap", norms, activations and attention weights;
        # "all", convolutions and dense layers too.
        "remat": "off",
        # "encoder": it never changes, nor do its batch-norm statistics; "": nothing.
        "freeze": "",
        # Vision transformers: share of the examples that skip a branch of the last
        # block in training (earlier blocks in proportion to their depth), and the
        # implementation of attention: "xla", or "cudnn" on GPUs in bfloat16.
        "drop_path": 0.0,
        "attention": "xla",
        # Initial weights of networks and averages: a file of launch.convert_weights or
        # of PyTorch; a name of mpmc_jax/models/weights/hub.py, such as dinov2_s14, or
        # hub:OWNER/NAME[/FILE][@REVISION], which are fetched; "": random.
        "pretrained": "",
    }


def _method() -> dict:
    return {
        "name": "unimatch",
        # Pseudo-labels below this confidence do not count.
        "threshold": 0.95,
        # Decay of the averaged network. Methods that learn without one (supervised,
        # unimatch) keep one for evaluation only if it is positive.
        "ema_decay": 0.0,
        # Supervised loss: "ce", "ohem" (with its two settings), "focal", "dice",
        # "lovasz", or the mean of two, such as "ce_dice".
        "supervised_loss": "ce",
        "ohem_threshold": 0.7,
        "ohem_min_kept": 200_000,
        # Loss of the unlabeled terms; augseg, u2pl and ael have their own. "ce";
        # "balanced_ce", where all classes of the pseudo-labels weigh the same; or
        # "dice".
        "unlabeled_loss": "ce",
        # Steps over which the weight of the unlabeled terms grows to mpmc.alpha, as
        # exp(-5 (1 - step / rampup)^2); 0: full from the start; -1: a tenth of the run.
        "rampup": 0,
        # Weight of the auxiliary classifier's loss; 0: the network has none.
        "auxiliary_weight": 0.0,
        # Mean teacher and CPS: whether the unlabeled images are mixed.
        "cutmix": True,
        # Mean teacher only: whether labeled images and strong views are one batch to
        # batch norm and the teacher's statistics are running ones ("joint"), or labeled
        # images, strong and weak views are normalized each by their own batch
        # ("apart").
        "normalization": "joint",
    }


def _imbalance() -> dict:
    return {
        # Weights of the classes in the supervised losses ce, ohem and focal: () for
        # none; one number per class; or ("frequencies",): median-frequency balancing,
        # from the labels of the training images, see mpmc_jax/data/class_weights.py.
        "class_weights": (),
        # Exponent of the focal loss; 0 is cross-entropy.
        "focal_gamma": 2.0,
        # Probability that a labeled crop is centered on a pixel of one of these classes
        # (numbers; (): all but class 0), drawn among those that the image has.
        "crop_probability": 0.0,
        "crop_classes": (),
        # One confidence per class below which its pseudo-labels do not count, instead
        # of method.threshold; (): that one for all.
        "thresholds": (),
    }


def _u2pl() -> dict:
    return {
        # Epochs of supervision alone.
        "warmup_epochs": 1,
        # Percentiles of the entropy at the start: pixels below the first are used as
        # pseudo-labels, pixels outside the second, on both sides, in the contrast.
        "kept_percent": 80.0,
        "contrast_percent": 20.0,
        # "released": the code of the published numbers; "corrected": the paper's text.
        "contrast": "released",
        # Weight of the contrast; -1: 1 / (number of groups) if released, 0.1 if
        # corrected.
        "contrast_weight": -1.0,
        # A negative key's class has a rank in [low, high) among a pixel's classes.
        "low_rank": 3,
        "high_rank": 20,
        # Bounds of the class's probability for anchors and negatives.
        "anchor_above": 0.3,
        "key_below": 1.0,
        # Anchors per class, negatives per anchor, and what divides the cosines.
        "queries": 256,
        "negatives": 50,
        "temperature": 0.5,
        # Negatives per class in the memory bank, those of class 0; float32 or bfloat16.
        "bank_size": 30_000,
        "bank_size_first": 50_000,
        "bank_dtype": "float32",
    }


def _ael() -> dict:
    return {
        # How many classes to draw for copying into labeled images; classes never drawn.
        "query_classes": 1,
        "unqueried": (),
        # Least share of the crop for an object to be cut out, and for a class to count
        # as present in an image.
        "object_area": 0.03,
        "presence_area": 0.03,
        # Steps from the choice of a partner image to its use; at least 3.
        "delay": 4,
        # Factor on the whole loss; 0: 1 / (number of groups), as released.
        "scale": 0.0,
    }


def _fixmatch() -> dict:
    return {
        # Who makes the pseudo-labels: "student", as UniMatch's authors compare with it;
        # or "average", as UniMatch V2's do, with method.ema_decay.
        "teacher": "student",
    }


def _cps() -> dict:
    return {
        # Weight of the networks' losses on each other's labels, with CutMix and without
        # (method.cutmix=False). Published: 1 and 1.5 (VOC), 5 and 6 (Cityscapes).
        "weight": 1.0,
        "plain_weight": 1.5,
    }


def _mpmc() -> dict:
    return {
        "enabled": False,
        # Layer whose output the patch classifier reads; "auto": layer1 of a ResNet,
        # stage3 of the U-Net, the first of four levels of a vision transformer.
        "tap": "auto",
        # Pooling windows, any of (1, 3, 7, 19); 1 is the feature itself. On patches of
        # a vision transformer (1, 3, 7) are about as large as (1, 7, 19) on layer1.
        "windows": (1, 7, 19),
        # "paper": widths 256, 128, 64; "lite": projected to 64 first (row D16 of
        # docs/deviations.md, as the D numbers below).
        "head": "paper",
        # Confidence gamma: softmax_prob (paper), softmax_logit, sigmoid (D4).
        "confidence": "softmax_prob",
        # Scale of lambda_s: none (paper), max, mean (D4); beyond the paper class_mean.
        "lambda_scale": "none",
        # Scale of lambda_m, which as written shrinks with the number of classes (D26).
        "lambda_m_scale": "none",
        # Weights of L_u (without MPMC too) and L_u^M in eq. 7 (D3), and of L_l^M (1 in
        # the paper).
        "alpha": 0.25,
        "beta": 0.15,
        "labeled_weight": 1.0,
        # Exponents of the asymmetric loss, eq. 3.
        "gamma_pos": 0.0,
        "gamma_neg": 1.0,
        # Target of eq. 6: "soft" probability or "hard" at 0.5 (D6).
        "target": "soft",
        # Head that makes the targets: "student" or "ema" (D8).
        "teacher_head": "student",
        # Epochs without L_u^M and lambda (D23); L_u itself is on.
        "warmup_epochs": 0,
        # Ablations: L_l^M, L_u^M, lambda_s and lambda_m on or off.
        "labeled": True,
        "unlabeled": True,
        "lambda_s": True,
        "lambda_m": True,
        # Ablation: images on which the head's losses train the head alone and not the
        # network (D26): "none", "labeled" or "all".
        "detach": "none",
        # Ablation: lambda_s permuted among the pixels of a pseudo-class of an image.
        "shuffle": False,
        # Ablation: every pixel of a view has its confident pixels' mean lambda_s.
        "uniform": False,
        # Beyond the paper: lambda_s is 0 where the patch classifier gives the pixel's
        # class less than this probability, and 1 elsewhere; with 0 there is no gate.
        "gate": 0.0,
        # Beyond the paper: what divides the patch classifier's logits before gamma.
        "temperature": 1.0,
    }


def _optimizer() -> dict:
    return {
        # "sgd", or "adamw".
        "name": "sgd",
        # Rate of the encoder; everything else learns at lr * head_multiplier.
        "lr": 1e-3,
        "head_multiplier": 10.0,
        "weight_decay": 1e-4,
        # For sgd.
        "momentum": 0.9,
        # For adamw: decays of the two moments, and what is added to the root.
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        # lr * (1 - t/T) ** power; t lags by `lag` steps (UniMatch sets its rate
        # after the step: 1).
        "power": 0.9,
        "lag": 0,
    }


def _train() -> dict:
    return {
        # Length of the run: steps if positive, else epochs over the unlabeled list.
        "steps": 0,
        "epochs": 80,
        # What an epoch passes over: "unlabeled", that list whatever the method (the
        # labeled one where it is empty); "labeled", for supervised alone, as its
        # published rows are trained: short batches are dropped.
        "epoch_of": "unlabeled",
        # Labeled images per step, over all devices; as many unlabeled ones (ael:
        # one and its partner per group).
        "batch_size": 8,
        # Number of images among which ranking, mixing and drawing happen (D14): the
        # images per GPU of a published configuration.
        "group_size": 2,
        # Micro-batches per step, run in sequence.
        "accumulation": 1,
        # How many devices to use; 0 means all.
        "devices": 0,
        # "pmap" or "shard_map".
        "parallel": "pmap",
        "log_every": 10,
        # Steps between evaluations and between checkpoints; 0: once per epoch.
        "eval_every": 0,
        "checkpoint_every": 0,
        # Training batches from whose plain crops batch norm's statistics are recomputed
        # before each evaluation; training continues with them. 0: running statistics,
        # as published.
        "precise_bn": 0,
        # Evaluations in a row without a higher eval.best_metric after which the run
        # ends; 0: never.
        "patience": 0,
        # Newest checkpoints to keep besides the best one.
        "keep": 2,
        # Validation images that each evaluation shows in TensorBoard: image, truth,
        # prediction, and lambda_s with MPMC.
        "panels": 0,
        # Project of Weights & Biases to which metrics go too; "": none.
        "wandb": "",
    }


def _eval() -> dict:
    return {
        # A network of the method by name ("student" where there is one), or "teacher",
        # the moving average of the first, even where the students themselves make the
        # pseudo-labels. "auto": the average where the method keeps one, else the first
        # network.
        "network": "auto",
        # How images are predicted: "whole"; in windows as large as the crop,
        # "slide_unimatch", "slide_u2pl" or "slide_ael"; "center_crop"; or "volume",
        # Dice of volumes from slices resized to the crop's size.
        "protocol": "whole",
        # Scales at which images are evaluated and averaged, and whether mirrored too.
        "scales": (1.0,),
        "flip": False,
        # Metric of the validation split that chooses the best checkpoint: "auto", the
        # protocol's (mean IoU, or Dice of volumes), or one by name, such as
        # "iou/road".
        "best_metric": "auto",
        # Images per call, all of one size.
        "batch_size": 4,
        # During training, pad whole images to multiples of this, for fewer programs;
        # 0 is exact.
        "pad_to": 0,
    }
