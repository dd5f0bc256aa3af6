"""Pushes the model of a run to the Hub, after a verification of the saved model. A failed push can be repeated.

The model is on disk before the push, so a failed push loses nothing, and the same command repeats the push. Uploaded files are
not sent again (LFS recognizes their content), and the model appears in one commit, completely or not at all.
"""

import logging
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch, fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_transfer.confidence.record import CONFIDENCE
from hf_transfer.config import split_repo_id
from hf_transfer.hub.attempts import Attempts, PushError, RefusedPushError, no_write_access
from hf_transfer.hub.card import OUR_TAG, address_card, record_verified
from hf_transfer.hub.card_images import EXAMPLES, draw_examples, insert_examples
from hf_transfer.hub.exports import verify_exports
from hf_transfer.hub.save import save_model
from hf_transfer.hub.verify import MERGED_TOLERANCE, REFERENCE, TOLERANCE, Verified, find_libraries, verify
from hf_transfer.locations import find_run
from hf_transfer.network.adapters import is_adapter_folder, load_adapted, read_base
from hf_transfer.network.damage import read_json
from hf_transfer.network.source import find_source
from hf_transfer.reporting.comparison import read_saved_target

log = logging.getLogger(__name__)

MERGED = "merged"  # folder beside model/ for the plain checkpoint that is pushed instead of an adapter
CARD = "README.md"
NAMED = 5  # files in a message
# A push deletes such old files if the new model lacks them, as libraries would load them with it. Other files stay.
LOADED = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "preprocessor_config.json", "adapter_config.json",
    "task.json", "onnx/*", "openvino/*", "export.json", EXAMPLES,
)  # fmt: skip

# The files of a saved and exported model, by folder below model/. A push refuses all other files, because they may be private,
# except the texts in TERMS, which a license may oblige the user to add.
WRITTEN: Mapping[str, tuple[str, ...]] = {
    ".": (
        CARD, "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
        "adapter_config.json", "task.json", "export.json", "model*.safetensors", "model.safetensors.index.json",
        "adapter_model.safetensors", CONFIDENCE, "confusion_matrix.svg", "curve_*.svg", "*.py",
    ),
    "onnx": ("model*.onnx", "model*.onnx.data"),
    "openvino": ("model*.xml", "model*.bin"),
}  # fmt: skip
TERMS = tuple(f"{name}{suffix}" for name in ("LICENSE", "NOTICE") for suffix in ("", ".txt", ".md"))

__all__ = ["PublishOptions", "Published", "PushError", "check_push", "publish", "publish_command"]


@dataclass(frozen=True, kw_only=True)
class PublishOptions:
    """The options of a push to the Hub."""

    private: bool = False  # create a new repository as private
    revision: str | None = None  # branch to push to, created if missing
    create_pr: bool = False  # open a pull request instead of committing
    overwrite: bool = False  # replace a card that hf_transfer did not write
    without_fine_tuning: bool = False  # allow a greedy stack whose layers were never trained together
    publish_images: bool = False  # show photographs of the scored split in the card; otherwise no photograph is pushed
    dry_run: bool = False  # verify the model, say so in its card, and list its files, without calling the Hub


@dataclass(frozen=True, kw_only=True)
class Published:
    """The result of a push. In a dry run, `files` are the files that would be pushed."""

    repo_id: str
    files: dict[str, int]  # size in bytes by path
    url: str | None  # None for a dry run
    card: Path  # the card beside the weights
    command: str  # pushes the files
    verified: tuple[Verified, ...]


@dataclass(frozen=True, kw_only=True)
class _Target:
    """The repository and branch to push to, the Hub's client `api`, and `attempt`, which retries a call."""

    repo_id: str
    revision: str | None
    api: HfApi
    attempt: Attempts


def publish(
    run: str | Path,
    repo_id: str,
    *,
    adapter: bool = False,
    base: str | None = None,
    options: PublishOptions | None = None,
    token: str | None = None,
) -> Published:
    """Pushes the model of a run to `repo_id` in one commit, after a fresh process has reproduced its logits.

    `run` is the output folder of a recipe, or its folder `model`. An adapter is first merged into its base, unless
    `adapter=True`. `base` is a folder or Hub id to load in place of the base that the adapter records. `token` defaults to the
    token of `hf auth login`. After a dry run, the card in the folder says what was verified.

    Raises ValueError if `run` is not a finished run, `repo_id` is not OWNER/NAME, an adapter's base is unreachable or the model
    folder contains a file that hf_transfer has not written and that is not in TERMS, VerificationError or ExportError if the
    saved model or an exported file differs from the measured model, and PushError with a remedy if the Hub refuses.

        publish("runs/x", "me/model", options=PublishOptions(private=True))
    """
    run, options = find_run(run), options or PublishOptions()
    if not (run / "model" / CARD).is_file() or not (run / "results.json").is_file():
        raise ValueError(f"{run} is not a finished run: give a run's output folder, with results.json and model/")
    repo_id, branch = split_repo_id(repo_id)
    results = read_json(run / "results.json")
    if results["details"].get("fine_tuned") is False and not options.without_fine_tuning:
        raise ValueError(
            f"{run}: this greedy stack was not fine-tuned end to end, so its layers were never trained together. Run the "
            "recipe with --fine_tune, or publish the stack as it is with --without_fine_tuning"
        )
    pictures = draw_examples(run, read_saved_target(results)) if options.publish_images else None
    model = _choose_model(run, results, adapter=adapter, base=base)
    files = _list_files(model)
    tolerance = MERGED_TOLERANCE if model.name == MERGED else TOLERANCE
    verified = verify(model, run / REFERENCE, find_libraries(model), tolerance=tolerance)
    for each in verified:
        log.info("model reloaded by %s in a fresh process: logits differ by %.1g (relative)", each.library, each.logits)
    verify_exports(model, run / REFERENCE)
    if pictures is not None:
        files[EXAMPLES] = pictures[0]
    url = None
    command = publish_command(run, repo_id, options, adapter=adapter, base=base)
    if options.dry_run:
        _update_card(model / CARD, verified)
    else:
        attempt = Attempts(repo_id, f"Nothing is lost, because the run is on this disk. Repeat: {command}")
        revision = options.revision or branch
        target = _Target(repo_id=repo_id, revision=revision, api=HfApi(token=token), attempt=attempt)
        _open_repository(target, options)
        card = address_card(files[CARD].read_text(encoding="utf-8"), repo_id, revision, verified)
        card = card if pictures is None else insert_examples(card, pictures[1])
        url = _commit(target, files, card, f"Add {results['strategy']}", create_pr=options.create_pr)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    return Published(repo_id=repo_id, files=sizes, url=url, card=model / CARD, command=command, verified=verified)


def check_push(repo_id: str, *, token: str | None = None) -> None:
    """Checks, before training, that the Hub would accept a push to `repo_id`.

    Raises PushError if there is no valid token, the token cannot write to `repo_id`, or the card has another origin.
    """
    repo_id, revision = split_repo_id(repo_id)
    attempt = Attempts(repo_id, "Nothing was trained. Fix this, or train without --push_to_hub and publish later")
    target = _Target(repo_id=repo_id, revision=revision, api=HfApi(token=token), attempt=attempt)
    user = attempt("sign in", target.api.whoami)
    owners = [user["name"], *(org["name"] for org in user.get("orgs", []))]
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read" or repo_id.split("/")[0] not in owners:
        raise attempt.refuse("push", no_write_access(repo_id))
    attempt("read the model card", lambda: _refuse_foreign_card(target))


def publish_command(
    run: Path, repo_id: str, options: PublishOptions, *, adapter: bool = False, base: str | None = None
) -> str:
    """Returns the `hf-transfer publish` command that repeats this push."""
    values = {"--base": base, "--revision": options.revision}
    names = ("private", "create_pr", "overwrite", "without_fine_tuning", "publish_images")
    flags = {"--adapter": adapter} | {f"--{name}": getattr(options, name) for name in names}
    words = ["hf-transfer", "publish", str(run), "--repo_id", repo_id]
    words += [word for flag, value in values.items() if value for word in (flag, value)]
    return shlex.join([*words, *(flag for flag, is_set in flags.items() if is_set)])


def _choose_model(run: Path, results: Mapping[str, Any], *, adapter: bool, base: str | None) -> Path:
    """Returns the folder to push: the run's model, or the plain checkpoint made from the run's adapter and its base."""
    model = run / "model"
    if not is_adapter_folder(str(model)):
        if adapter or base:
            raise ValueError(f"{model} is a plain checkpoint, not an adapter: omit --adapter and --base")
        return model
    if adapter and base:
        raise ValueError(f"base={base!r}: --adapter pushes an adapter without its base; omit --base or --adapter")
    recorded = read_base(model)
    try:
        if adapter:
            find_source(recorded)  # the fresh process loads this base, as will users of the adapter
            return model
        merged = load_adapted(model, checkpoint=base)
    except ValueError as error:
        remedy = "publish the merged model (--merge)" if adapter else "give a folder of the base with --base"
        raise ValueError(
            f"the base of this adapter, {base or recorded}, cannot be loaded: {error}. You can also {remedy}"
        ) from error
    save_model(merged, results, run / MERGED)
    for name in TERMS:
        if (model / name).is_file():
            shutil.copy(model / name, run / MERGED / name)
    return run / MERGED


def _list_files(model: Path) -> dict[str, Path]:
    """Returns the files of the model folder to push, by name. Hidden files do not belong to the model.

    Raises ValueError if the folder contains a file that a run or an export cannot have written and that is not in TERMS.
    """
    files = {p.relative_to(model).as_posix(): p for p in sorted(model.rglob("*")) if p.is_file()}
    files = {name: path for name, path in files.items() if not re.search(r"(^|/)\.", name)}
    foreign = [f"{model.name}/{n}" for n in files if n not in TERMS and not _is_written(PurePosixPath(n))]
    if foreign:
        more = f" and {len(foreign) - NAMED} more" if len(foreign) > NAMED else ""
        verb, them = ("was", "it") if len(foreign) == 1 else ("were", "them")
        raise ValueError(
            f"{', '.join(foreign[:NAMED])}{more} {verb} not written by hf_transfer: move {them} out of {model.name}/, then "
            "publish again"
        )
    return files


def _is_written(name: PurePosixPath) -> bool:
    """Returns whether `name`, a path below the model folder, is the name of a file of a saved or exported model."""
    return any(fnmatchcase(name.name, pattern) for pattern in WRITTEN.get(str(name.parent), ()))


def _update_card(card: Path, verified: Sequence[Verified]) -> None:
    """Writes the results of the verification to the card beside the weights, if that folder is writable."""
    try:
        card.write_text(record_verified(card.read_text(encoding="utf-8"), verified), encoding="utf-8")
    except OSError as error:
        log.warning("%s: the card beside the weights stays without the verification (%s)", card, error.strerror)


def _open_repository(target: _Target, options: PublishOptions) -> None:
    """Creates the repository and the branch if they are missing. Raises PushError if a push is not allowed."""
    api, attempt, repo_id, revision = target.api, target.attempt, target.repo_id, target.revision
    attempt("sign in", api.whoami)
    attempt("create the repository", lambda: api.create_repo(repo_id, private=options.private, exist_ok=True))
    if options.private and not attempt("read the repository", lambda: api.model_info(repo_id)).private:
        raise attempt.refuse("push privately", f"{repo_id} is a public repository; make it private in its settings")
    if not options.overwrite:
        attempt("read the model card", lambda: _refuse_foreign_card(target))
    if revision is not None:
        attempt("create the branch", lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))


def _commit(target: _Target, files: Mapping[str, Path], card: str, message: str, *, create_pr: bool) -> str:
    """Commits the files with `card` as README.md, deletes files of an older model, and returns the commit's URL."""
    api, attempt, repo_id, revision = target.api, target.attempt, target.repo_id, target.revision
    existing = attempt("list the files", lambda: api.list_repo_files(repo_id, revision=revision))
    old = [name for name in existing if name not in files and any(fnmatch(name, pattern) for pattern in LOADED)]
    operations: list[Any] = [CommitOperationDelete(name) for name in old]
    operations += [CommitOperationAdd(name, card.encode() if name == CARD else path) for name, path in files.items()]
    commit = attempt(
        "push the model",
        lambda: api.create_commit(repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr),
    )
    return commit.pr_url or str(commit)


def _refuse_foreign_card(target: _Target) -> None:
    try:
        path = target.api.hf_hub_download(target.repo_id, CARD, revision=target.revision)
    except LocalEntryNotFoundError:  # the Hub did not answer, which does not mean that there is no card
        raise
    except (EntryNotFoundError, RevisionNotFoundError, RepositoryNotFoundError):
        return
    if OUR_TAG not in (ModelCard.load(path).data.get("tags") or []):
        raise RefusedPushError(
            f"hf_transfer did not write the card of {target.repo_id}, and a push would replace this card. Choose another "
            "repository, or publish with --overwrite"
        )
