"""`hf-transfer`: what is no training run. Training runs are the scripts under recipes/.

Nothing heavy is imported before a command runs.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from hf_transfer.config import EMBEDDED_CHECKPOINT

INSPECT = """Print the chain of a checkpoint: its layers in order, with parameters, activation shape, bytes an image in the
cache and share of the FLOPs; then what each strategy would train, where it cuts, and what it would store."""
CACHE = """List or remove the stored activations. A cache is never stale: its name is a hash of the weights, the preprocessing
and the images it was made from. The oldest go first when the bound (--cache_gb of a recipe) is reached."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command. A user's mistake ends with one line on stderr and status 2."""
    parser = argparse.ArgumentParser(
        prog="hf-transfer", description="Look at checkpoints and caches; train with the scripts under recipes/."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="print a checkpoint's layers and what each strategy costs")
    inspect.description = INSPECT
    inspect.add_argument(
        "checkpoint", nargs="?", default=EMBEDDED_CHECKPOINT, help="Hub id[@revision], folder, or embedded"
    )
    inspect.add_argument(
        "--trust_remote_code", action="store_true", help="run Python code that comes with the checkpoint"
    )
    cache = commands.add_parser("cache", help="list or remove stored activations")
    cache.description = CACHE
    cache.add_argument("--clear", nargs="*", metavar="KEY", help="remove these caches, or all of them if none is named")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        text = _inspect(given) if given.command == "inspect" else _cache(given)
    except ValueError as error:
        parser.exit(2, f"hf-transfer {given.command}: {error}\n")
    sys.stdout.write(text + "\n")


def _inspect(given: argparse.Namespace) -> str:
    from hf_transfer.locations import chain_dir
    from hf_transfer.network.backbone import load
    from hf_transfer.network.describe import format_chain

    backbone = load(given.checkpoint, trust_remote_code=given.trust_remote_code)
    found = backbone.preprocessing
    crop = f", crop {found.crop_pct}" if found.crop_pct else ""
    title = (
        f"{backbone.source.name} ({backbone.library} {type(backbone.model).__name__}), {len(backbone.label_names)} classes, "
        f"{found.height_px}x{found.width_px} px {found.interpolation}{crop}"
    )
    return f"{title}\n\n{format_chain(backbone.chain(cache_dir=chain_dir()))}"


def _cache(given: argparse.Namespace) -> str:
    from hf_transfer.data.cache import clear_caches, list_caches

    if given.clear is not None:
        freed = clear_caches(given.clear or None)
        return f"removed {freed / 1e6:.1f} MB"
    entries = list_caches()
    if not entries:
        return "no caches"
    lines = [f"{e.key}  {e.nbytes / 1e6:10.1f} MB  last used {e.last_used:%Y-%m-%d %H:%M}  {e.title}" for e in entries]
    return "\n".join([*lines, f"{len(entries)} caches, {sum(e.nbytes for e in entries) / 1e6:.1f} MB"])


if __name__ == "__main__":
    main()
