"""The peer of these benchmarks: transformers' published image-classification example, as a function.

`datasets` image folder, the checkpoint's own processor, random resized crop and flip for training, transformers' Trainer; one
evaluation at the end. As a script it prints the test accuracy of a whole fine-tune, with the example's own settings or with
good ones:

    python benchmarks/trainer_example.py --checkpoint FOLDER --dataset IMAGE_FOLDER --settings defaults --seed 0

`defaults`: what TrainingArguments says (AdamW 5e-5, linear, 3 epochs, batch 8). `tuned`: AdamW 1e-4, cosine, 20 epochs, batch
32, weight decay 0.05. `--bf16` and `--channels_last` save time; accuracy moves within what rounding moves.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from timm.data import create_transform
from torchvision import transforms
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "tuned": {
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "num_train_epochs": 20,
        "per_device_train_batch_size": 32,
        "weight_decay": 0.05,
    },
}


@dataclass(frozen=True, kw_only=True)
class TrainerResult:
    """A finished training run; seconds count from loading until the model is scored and saved."""

    seconds: float
    images_per_second: float | None  # after the first epoch
    accuracy: float  # of the test split
    logits: NDArray[np.float32]  # (N, K) of the test split

    def figures(self) -> dict[str, Any]:
        """Returns the numbers without the logits."""
        return {
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
            "accuracy": self.accuracy,
        }


class EpochClock(TrainerCallback):
    """When each epoch ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        """Called by Trainer."""
        self.ends.append(time.perf_counter())


def train(
    checkpoint: str,
    dataset: str | datasets.DatasetDict,
    scratch: str,
    arguments: dict[str, Any],
    *,
    trainable: Collection[str] | None = None,
    adapted: Collection[str] | None = None,
    our_layout: bool = False,
    image_size_px: int | None = None,
) -> TrainerResult:
    """Trains, scores the test split, and saves under `scratch`.

    `dataset`: an image folder, or splits `train` and `test` with columns `image` and `label`. `trainable`: names in the timm
    model of what is not frozen; None: everything. `adapted`: names of modules that get LoRA of rank 16 by peft; the head
    trains too. `our_layout`: channels-last weights and images, frozen layers in eval mode without gradients. `image_size_px`:
    side of the inputs; None: the checkpoint's.
    """
    started = time.perf_counter()
    data = datasets.load_dataset("imagefolder", data_dir=dataset) if isinstance(dataset, str) else dataset
    names = data["train"].features["label"].names
    config = {**AutoImageProcessor.from_pretrained(checkpoint).data_config}
    if image_size_px is not None:
        config["input_size"] = (3, image_size_px, image_size_px)
    torch.manual_seed(arguments.get("seed", 0))  # the new head's weights
    model = AutoModelForImageClassification.from_pretrained(
        checkpoint, num_labels=len(names), ignore_mismatched_sizes=True
    )
    body = model.timm_model
    if image_size_px is not None and hasattr(body, "set_input_size"):
        body.set_input_size(config["input_size"][1:])  # resamples the position embedding
    if trainable is not None:
        for name, parameter in body.named_parameters():
            parameter.requires_grad = name in trainable
    if adapted is not None:
        import peft

        head = [f"timm_model.{n}" for n, m in body.named_modules() if m is body.get_classifier()]
        settings = peft.LoraConfig(
            r=16, lora_alpha=16, target_modules=[f"timm_model.{n}" for n in adapted], modules_to_save=head
        )
        model = peft.get_peft_model(model, settings)
    if our_layout:
        model = model.to(memory_format=torch.channels_last)
        _hold_frozen_in_eval(body)
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(config["input_size"][1:]),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(config["mean"], config["std"]),
        ]
    )

    def transform(function: Any) -> Any:
        return lambda rows: {
            "pixel_values": [function(image.convert("RGB")) for image in rows["image"]],
            "labels": rows["label"],
        }

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        pixels = torch.stack([row["pixel_values"] for row in rows])
        if our_layout:
            pixels = pixels.to(memory_format=torch.channels_last)
        return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}

    clock = EpochClock()
    test = data["test"].with_transform(transform(create_transform(**config, is_training=False)))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=f"{scratch}/trainer",
            remove_unused_columns=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=data["train"].with_transform(transform(augment)),
        data_collator=collate,
        callbacks=[clock],
    )
    trainer.train()
    scored = trainer.predict(test)
    trainer.save_model(f"{scratch}/trainer/model")
    later = len(clock.ends) - 1
    return TrainerResult(
        seconds=time.perf_counter() - started,
        images_per_second=len(data["train"]) * later / (clock.ends[-1] - clock.ends[0]) if later else None,
        accuracy=float((np.argmax(scored.predictions, 1) == scored.label_ids).mean()),
        logits=np.asarray(scored.predictions, np.float32),
    )


def _hold_frozen_in_eval(body: Any) -> None:
    """From now on train() leaves the modules in eval that hold nothing trainable, BatchNorm among them."""
    train = body.train
    frozen = [m for m in body.modules() if not any(p.requires_grad for p in m.parameters())]

    def train_unfrozen(mode: bool = True) -> Any:
        train(mode)
        for module in frozen:
            module.training = False
        return body

    body.train = train_unfrozen


def main() -> None:
    """Prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="timm checkpoint folder in Hub layout")
    parser.add_argument("--dataset", required=True, help="image folder with train/ and test/")
    parser.add_argument("--settings", choices=tuple(SETTINGS), default="defaults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="mixed precision, as --precision bf16 of the recipes")
    parser.add_argument("--channels_last", action="store_true", help="weights and images in channels-last layout")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = {**SETTINGS[given.settings], "seed": given.seed, "bf16": given.bf16}
        arguments["use_cpu"] = not torch.cuda.is_available()  # bf16 on a CPU has to be asked for
        found = train(given.checkpoint, given.dataset, scratch, arguments, our_layout=given.channels_last)
    print(json.dumps({"settings": given.settings, "seed": given.seed, "bf16": given.bf16, **found.figures()}))


if __name__ == "__main__":
    main()
