"""The command `hf-transfer`, which trains, advises, ranks, audits, predicts, evaluates, publishes, exports, and more.

`hf_transfer/commands/` has a file for each command. Heavy modules are imported only when a command runs, so that `--help` is
fast.
"""

import importlib
import logging
import sys
from collections.abc import Mapping, Sequence

from hf_transfer.commands import (
    add_classes,
    advise,
    audit,
    cache,
    doctor,
    embed,
    evaluate,
    export,
    inspect,
    predict,
    publish,
    rank,
    report,
    train,
)
from hf_transfer.commands.command import Command, is_first_process, print_text
from hf_transfer.errors import EXIT_STATUS, one_line_errors
from hf_transfer.flags import HELP_ALL, Parser, add_quiet
from hf_transfer.launch import run_recipe
from hf_transfer.logs import start_logging
from hf_transfer.startup import limit_spinning
from hf_transfer.strategy import strategy_names

COMMANDS: Mapping[str, Command] = {  # in the order of `--help`
    "train": train.COMMAND,
    "advise": advise.COMMAND,
    "rank": rank.COMMAND,
    "audit": audit.COMMAND,
    "inspect": inspect.COMMAND,
    "embed": embed.COMMAND,
    "predict": predict.COMMAND,
    "evaluate": evaluate.COMMAND,
    "add-classes": add_classes.COMMAND,
    "publish": publish.COMMAND,
    "export": export.COMMAND,
    "report": report.COMMAND,
    "cache": cache.COMMAND,
    "doctor": doctor.COMMAND,
}

START = """hf-transfer fine-tunes pretrained vision checkpoints, and publishes the result. Five things to do:

  hf-transfer train linear_probe
      try it on small images that come with it, in less than a minute
  hf-transfer advise --checkpoint ID --dataset FOLDER
      learn which strategy suits your images; FOLDER has one folder of images for each class
  hf-transfer train auto --checkpoint ID --dataset FOLDER --output_dir runs/mine
      train on your images, and see how good the model is in runs/mine/report.html
  hf-transfer predict runs/mine PHOTO_OR_FOLDER
      label new photos with the model
  hf-transfer publish runs/mine --repo_id OWNER/NAME --dry_run
      check what would be published on the Hub; without --dry_run, publish it

ID is a model on the Hub such as timm/mobilenetv2_100.ra_in1k, or a folder. More: hf-transfer --help (all commands),
hf-transfer COMMAND --help, hf-transfer train STRATEGY --help, hf-transfer doctor (checks this machine)."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command that the command line names. An error ends in one line (see `errors.one_line_errors`)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["train"] and len(words) > 1 and words[1] in strategy_names():
        run_recipe(words[1], prog=f"hf-transfer train {words[1]}", arguments=words[2:])
        return
    if not words:
        print_text(START)
        return
    description = "Fine-tune pretrained vision checkpoints, and publish them."
    parser = Parser(prog="hf-transfer", description=description, epilog=EXIT_STATUS)
    version = f"hf-transfer-learning {importlib.import_module('hf_transfer').__version__}"
    parser.add_argument("--version", action="version", version=version, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.summary,
            description=command.description,
            epilog=EXIT_STATUS,
            shows_all=HELP_ALL in words,
        )
        command.add_flags(sub)
        add_quiet(sub)
    given, unknown = parser.parse_known_args(words)
    if unknown:
        commands.choices[given.command].refuse(unknown, words)
    limit_spinning()
    start_logging(logging.ERROR if given.quiet else logging.WARNING)
    with one_line_errors(f"hf-transfer {given.command}"):
        text = COMMANDS[given.command].run(given)
    if text and is_first_process():
        print_text(text)


if __name__ == "__main__":
    main()
