"""Push the model of a finished run to the Hub in one commit. Before the push, a fresh process loads the saved model
and checks that its outputs equal those of the trained network. An adapter is merged into its base first, unless --adapter is
given. If a push fails, nothing is lost: repeat the command. The token comes from `hf auth login` or HF_TOKEN.
"""

import argparse
import logging

from hf_transfer.commands.command import Command


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="output folder of a finished run")
    parser.add_argument("--repo_id", required=True, help="Hub repository OWNER/NAME; created if it does not exist")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--adapter", action="store_true", help="push an adapter without merging it, for peft")
    form.add_argument("--merge", action="store_true", help="push an adapter merged into its base (the default)")
    parser.add_argument("--base", help="folder or Hub id of an adapter's base, if the recorded base is missing")
    parser.add_argument("--private", action="store_true", help="make the repository private when it is created")
    parser.add_argument("--revision", help="branch of the repository to push to (default: main)")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of pushing to the branch")
    parser.add_argument("--overwrite", action="store_true", help="replace a model card that hf_transfer did not write")
    text = "publish a greedy stack even if its layers were never trained together"
    parser.add_argument("--without_fine_tuning", action="store_true", help=text)
    text = (
        "show a few photographs of the scored split in the card; without this flag, no photograph leaves this machine"
    )
    parser.add_argument("--publish_images", action="store_true", help=text)
    text = "verify the model, say so in its card, and list the files, without pushing"
    parser.add_argument("--dry_run", action="store_true", help=text)


def _run(given: argparse.Namespace) -> str:
    from hf_transfer.hub.publish import PublishOptions, publish

    if not given.quiet:
        logging.getLogger("hf_transfer").setLevel(logging.INFO)
    names = PublishOptions.__dataclass_fields__
    options = PublishOptions(**{name: getattr(given, name) for name in names})
    published = publish(given.run, given.repo_id, adapter=given.adapter, base=given.base, options=options)
    lines = [f"{size:>12,} bytes  {path}" for path, size in published.files.items()]
    if published.url is not None:
        return "\n".join([*lines, f"published: {published.url}"])
    end = f"these files would be pushed to {published.repo_id}; first read the card, {published.card}"
    return "\n".join([*lines, end, f"next: {published.command}"])


COMMAND = Command(
    summary="push the model of a finished run to the Hub",
    description=__doc__,
    add_flags=_add_flags,
    run=_run,
)
