"""The command `hf-transfer`, which trains, advises, ranks, audits, predicts, evaluates, publishes, exports, and more.

`hf_transfer/commands/` has a file for each command. Heavy modules are imported only when a command runs, so that `--help` is
fast.
"""

import logging
import os
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
from hf_transfer.commands.command import Command, print_text
from hf_transfer.errors import make_log_handler, one_line_errors
from hf_transfer.flags import Parser
from hf_transfer.launch import run_recipe
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command that the command line names. An error ends in one line (see `errors.one_line_errors`)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["train"] and len(words) > 1 and words[1] in strategy_names():
        run_recipe(words[1], prog=f"hf-transfer train {words[1]}", arguments=words[2:])
        return
    parser = Parser(prog="hf-transfer", description="Fine-tune pretrained vision checkpoints, and publish them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.summary, description=command.description)
        command.add_flags(sub)
    given = parser.parse_args(words)
    limit_spinning()
    logging.basicConfig(level=logging.WARNING, handlers=[make_log_handler()])
    with one_line_errors(f"hf-transfer {given.command}"):
        text = COMMANDS[given.command].run(given)
    if text and os.environ.get("RANK", "0") == "0":  # a launcher numbers its processes
        print_text(text)


if __name__ == "__main__":
    main()
