"""Say what happens to a checkpoint: its class and pooling, preprocessing, cuts, head and size, and what stays behind.
Then print its chain (the network as a sequence of layers): the parameters, activation shape, bytes per image in the cache and
share of the FLOPs of each layer. Then print which part of the chain each strategy would train, and how much it would store.
With --adapter, print the modules that would get adapters, and the number of their parameters.
"""

import argparse
import json
from dataclasses import asdict

from hf_transfer.commands.command import Command
from hf_transfer.commands.shared_flags import add_json, add_trust, read_given
from hf_transfer.config import EMBEDDED_CHECKPOINT, AdapterConfig, ModelConfig
from hf_transfer.flags import add_settings
from hf_transfer.settings import list_settings, replace_settings


def _add_flags(parser: argparse.ArgumentParser) -> None:
    help_text = "Hub id[@revision] of the checkpoint, or its folder, or that of a run (default: embedded)"
    parser.add_argument("checkpoint", nargs="?", default=EMBEDDED_CHECKPOINT, help=help_text)
    add_trust(parser)
    add_json(parser)
    own = list_settings(ModelConfig())
    shown = [own[name] for name in ("image_size_px", "preprocessing_from", "pooling", "model_args")]
    add_settings(parser, [*shown, *list_settings(AdapterConfig()).values()])


def _run(given: argparse.Namespace) -> str:
    from hf_transfer.locations import chain_dir
    from hf_transfer.network.describe import describe_checkpoint, format_adapters, format_chain, list_chain
    from hf_transfer.network.peft_checkpoints import load_for_inspection

    settings = read_given(given, AdapterConfig())
    if settings and given.json:
        raise ValueError("--json lists layers and strategies, but no adapters: give --json or settings of adapters")
    backbone = load_for_inspection(replace_settings(ModelConfig(), read_given(given, ModelConfig())))
    chain = backbone.chain(cache_dir=chain_dir())
    overview = describe_checkpoint(backbone, chain)
    if given.json:
        return json.dumps(asdict(overview) | list_chain(chain), indent=1)
    if not settings:
        return f"{overview.format()}\n\n{format_chain(chain)}"
    return f"{overview.format()}\n\n{format_adapters(backbone, chain, replace_settings(AdapterConfig(), settings))}"


COMMAND = Command(
    summary="print a checkpoint's layers and the cost of each strategy",
    description=__doc__,
    add_flags=_add_flags,
    run=_run,
)
