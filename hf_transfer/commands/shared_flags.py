"""Flags that several commands have, and the settings that they give."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hf_transfer.config import ComputeConfig, RunConfig
from hf_transfer.flags import Parser, add_groups, add_help_all, add_settings
from hf_transfer.settings import Setting, list_settings, replace_settings
from hf_transfer.strategy import default_config

EVALUATED_DATA = (  # settings of the data set that `evaluate` takes
    "image_column", "image_root", "label_column", "label_columns", "split_column", "where", "train_split", "validation_split",
    "test_split", "on_bad_image",
)  # fmt: skip

MOST_USED = (
    "checkpoint",
    "dataset",
    "epochs",
    "label_column",
    "images_per_class",
    "image_size_px",
    "seed",
    "batch_size",
)


def add_json(parser: argparse._ActionsContainer) -> None:
    """Adds --json."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Adds --trust_remote_code."""
    parser.add_argument("--trust_remote_code", action="store_true", help="allow Python code that comes with the model")


def list_compute() -> dict[str, Setting]:
    """Returns the compute settings of commands that take no gradient steps.

    There, the batch size "auto" means the default (see `ComputeConfig.images_per_batch`), so their help does not offer it.
    """
    settings = list_settings(ComputeConfig())
    number = replace(settings["batch_size"], hint=int, help="images per batch in each process")
    return {**settings, "batch_size": number}


def add_inference(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the engine. Exported files are engines here, but not in training."""
    settings = list_compute()
    add_settings(parser, [settings[name] for name in ("batch_size", "num_workers")])
    text = (
        "what runs the network: an engine of training runs, or the exported file (onnx; openvino if the folder has one); auto: "
        "by network and number of images, and the exported file if the folder has no weights (default: auto)"
    )
    choices = (*settings["engine"].choices, "onnx")
    parser.add_argument("--engine", dest="inference_engine", choices=choices, default="auto", help=text)
    text = "which exported file: fp32, fp16 or int8 (default: the most precise one)"
    parser.add_argument("--export_precision", choices=("fp32", "fp16", "int8"), help=text)


def add_run_settings(parser: argparse.ArgumentParser, groups: Sequence[str]) -> None:
    """Adds the settings of a run, of the nested configs `groups`, as flags. Help shows those in MOST_USED, --help_all all."""
    assert isinstance(parser, Parser)
    settings = {s.name: s for s in list_settings(default_config("auto")).values() if s.group in groups}
    add_help_all(parser, len(settings))
    add_groups(
        parser,
        parser.add_argument_group("most used settings"),
        settings,
        essential=[name for name in MOST_USED if name in settings],
    )


def read_run_config(given: argparse.Namespace) -> RunConfig:
    """Returns the settings of the strategy `auto`, with the values of the flags that the command line gives."""
    default = default_config("auto")
    return replace_settings(default, read_given(given, default) | {"tracker": "none"})


def read_given(given: argparse.Namespace, config: Any) -> dict[str, Any]:
    """Returns the settings of `config` that the command line gives, with their values, except `budget_s`."""
    values = {name: getattr(given, name, None) for name in list_settings(config)}
    return {name: value for name, value in values.items() if value is not None and name != "budget_s"}
