"""List or remove stored activations and unpacked archives. A cache is never stale, because its name is a hash of the
network, the preprocessing and the images. When the caches reach the limit (--cache_gb), the least recently used caches are
evicted. Unpacked archives do not count; --clear without a key removes them too.
"""

import argparse

from hf_transfer.commands.command import Command


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clear", nargs="*", metavar="KEY", help="remove the caches with these keys, or all caches")


def _run(given: argparse.Namespace) -> str:
    from hf_transfer.data.archives import clear_unpacked, count_bytes, list_unpacked
    from hf_transfer.prefix.contents import clear_caches, list_caches

    if given.clear:
        return f"removed {clear_caches(given.clear) / 1e6:.1f} MB of stored activations"
    if given.clear is not None:
        removed = f"removed {clear_caches() / 1e6:.1f} MB of stored activations"
        unpacked_bytes = clear_unpacked()
        return f"{removed} and {unpacked_bytes / 1e6:.1f} MB of unpacked archives" if unpacked_bytes else removed
    entries, unpacked = list_caches(), {folder: count_bytes(folder) for folder in list_unpacked()}
    if not entries and not unpacked:
        return "no caches"
    lines = [f"{e.key}  {e.nbytes / 1e6:10.1f} MB  last used {e.last_used:%Y-%m-%d %H:%M}  {e.title}" for e in entries]
    for folder, nbytes in unpacked.items():
        names = ", ".join(path.name for path in folder.iterdir())
        lines.append(f"{folder.name}  {nbytes / 1e6:10.1f} MB  unpacked archive {names}")
    total = sum(e.nbytes for e in entries) + sum(unpacked.values())
    return "\n".join([*lines, f"{len(entries) + len(unpacked)} caches, {total / 1e6:.1f} MB"])


COMMAND = Command(
    summary="list or remove stored activations",
    description=__doc__,
    add_flags=_add_flags,
    run=_run,
)
