"""The push: a saved run to the Hub, verified before it leaves, and safe to repeat until it succeeds.

Everything is on disk first, so a failed push loses nothing: the same command resumes it. Uploaded files are not sent again
(LFS recognizes their content), and the model appears in one commit, whole or not at all.
"""

import json
import logging
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_transfer.config import split_repo_id
from hf_transfer.hub.attempts import Attempts, PushError, no_write_access
from hf_transfer.hub.card import OUR_TAG, address_card
from hf_transfer.hub.save import save_model
from hf_transfer.hub.verify import MERGED_TOLERANCE, REFERENCE, TOLERANCE, Verified, find_libraries, verify
from hf_transfer.network.adapters import is_adapter_folder, load_adapted, read_base
from hf_transfer.network.source import find_source

log = logging.getLogger(__name__)

MERGED = "merged"  # beside model/ if that is an adapter: the plain checkpoint that is pushed instead
CARD = "README.md"
# A push deletes these from the repository if the new model lacks them: they would be loaded with it. All else stays.
LOADED = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "preprocessor_config.json", "adapter_config.json",
    "task.json",
)  # fmt: skip

__all__ = ["PublishOptions", "Published", "PushError", "check_push", "publish"]


@dataclass(frozen=True, kw_only=True)
class PublishOptions:
    """How a run is pushed."""

    private: bool = False  # a new repository is private
    revision: str | None = None  # branch, created if missing
    create_pr: bool = False  # a pull request instead of a commit
    overwrite: bool = False  # replace a card that hf_transfer did not write
    without_fine_tuning: bool = False  # allow a greedy stack whose layers were never trained together
    dry_run: bool = False  # verify the model and list its files, without the Hub


@dataclass(frozen=True, kw_only=True)
class Published:
    """The files that were pushed, or would be."""

    repo_id: str
    files: dict[str, int]  # bytes by path
    url: str | None  # None for a dry run
    verified: tuple[Verified, ...]


@dataclass(frozen=True, kw_only=True)
class _Target:
    """The branch to push to, and the client that makes the calls."""

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
    """Pushes the model of a run to `repo_id` in one commit, once a fresh process has reproduced its logits.

    `run` is the output folder of a recipe. An adapter is merged into its base first (`base`: a folder or id of the base, if
    the recorded id is unreachable), or pushed as it is (`adapter=True`). `token` defaults to the one of `hf auth login`.

    Raises ValueError if `run` is not a finished run, `repo_id` is not OWNER/NAME or an adapter's base is unreachable;
    VerificationError if the saved model differs from the measured one; PushError, with the remedy, if the Hub refuses.

        publish("runs/x", "me/model", options=PublishOptions(private=True))
    """
    run, options = Path(run), options or PublishOptions()
    if not (run / "model" / CARD).is_file() or not (run / "results.json").is_file():
        raise ValueError(f"{run}: no finished run (a recipe writes results.json and model/ last)")
    repo_id, branch = split_repo_id(repo_id)
    results = json.loads((run / "results.json").read_text())
    if results["details"].get("fine_tuned") is False and not options.without_fine_tuning:
        raise ValueError(
            f"{run}: this stack was not fine-tuned end to end, so its layers were never trained together. Run the recipe with "
            "--fine_tune, or publish it as it is with --without_fine_tuning"
        )
    model = _choose_model(run, results, adapter=adapter, base=base)
    tolerance = MERGED_TOLERANCE if model.name == MERGED else TOLERANCE
    verified = verify(model, run / REFERENCE, find_libraries(model), tolerance=tolerance)
    for each in verified:
        log.info("reloaded by %s in a fresh process: logits differ by %.1g (relative)", each.library, each.logits)
    files = {p.relative_to(model).as_posix(): p for p in sorted(model.rglob("*")) if p.is_file()}
    files = {
        name: p for name, p in files.items() if not re.search(r"(^|/)\.", name)
    }  # hidden files are not the model's
    url = None
    if not options.dry_run:
        command = _command(run, repo_id, options, adapter=adapter, base=base)
        attempt = Attempts(repo_id, f"Nothing is lost: the run is on this disk. Repeat: {command}")
        revision = options.revision or branch
        target = _Target(repo_id=repo_id, revision=revision, api=HfApi(token=token), attempt=attempt)
        _open_repository(target, options)
        card = address_card(files[CARD].read_text(), repo_id, revision, verified)
        url = _commit(target, files, card, f"Add {results['strategy']}", create_pr=options.create_pr)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    return Published(repo_id=repo_id, files=sizes, url=url, verified=verified)


def check_push(repo_id: str, *, token: str | None = None) -> None:
    """Checks, before training, that a push to `repo_id` would be accepted.

    Raises PushError if there is no valid token, the token cannot write there, or hf_transfer did not write the card there.
    """
    repo_id, revision = split_repo_id(repo_id)
    attempt = Attempts(repo_id, "Nothing was trained: fix this, or train without --push_to_hub and publish later")
    target = _Target(repo_id=repo_id, revision=revision, api=HfApi(token=token), attempt=attempt)
    user = attempt("sign in", target.api.whoami)
    owners = [user["name"], *(org["name"] for org in user.get("orgs", []))]
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read" or repo_id.split("/")[0] not in owners:
        raise attempt.refuse("push", no_write_access(repo_id))
    attempt("read its card", lambda: _refuse_foreign_card(target))


def _command(run: Path, repo_id: str, options: PublishOptions, *, adapter: bool, base: str | None) -> str:
    """The command that repeats a push."""
    values = {"--base": base, "--revision": options.revision}
    names = ("private", "create_pr", "overwrite", "without_fine_tuning")
    flags = {"--adapter": adapter} | {f"--{name}": getattr(options, name) for name in names}
    words = ["hf-transfer", "publish", str(run), "--repo_id", repo_id]
    words += [word for flag, value in values.items() if value for word in (flag, value)]
    return shlex.join([*words, *(flag for flag, is_set in flags.items() if is_set)])


def _choose_model(run: Path, results: Mapping[str, Any], *, adapter: bool, base: str | None) -> Path:
    """The folder to push: the run's model, or the plain checkpoint that its adapter and base are merged into."""
    model = run / "model"
    if not is_adapter_folder(str(model)):
        if adapter or base:
            raise ValueError(f"{model} is a plain checkpoint, not an adapter: leave --adapter and --base out")
        return model
    if adapter and base:
        raise ValueError(f"base={base!r}: an adapter is merged into its base, and --adapter does not merge; choose one")
    recorded = read_base(model)
    try:
        if adapter:
            find_source(recorded)  # the fresh process loads it, and so will everyone who downloads the adapter
            return model
        merged = load_adapted(model, checkpoint=base)
    except ValueError as error:
        remedy = "publish the merged model (--merge)" if adapter else "give a folder of the base with --base"
        raise ValueError(
            f"the base of this adapter, {base or recorded}, cannot be loaded: {error}; or {remedy}"
        ) from error
    save_model(merged, results, run / MERGED)
    return run / MERGED


def _open_repository(target: _Target, options: PublishOptions) -> None:
    """Creates the repository and the branch if missing. Raises PushError if they are not ours to write."""
    api, attempt, repo_id, revision = target.api, target.attempt, target.repo_id, target.revision
    attempt("sign in", api.whoami)
    attempt("create the repository", lambda: api.create_repo(repo_id, private=options.private, exist_ok=True))
    if options.private and not attempt("read its settings", lambda: api.model_info(repo_id)).private:
        raise attempt.refuse("push privately", f"{repo_id} exists and is public: make it private in its settings")
    if not options.overwrite:
        attempt("read its card", lambda: _refuse_foreign_card(target))
    if revision is not None:
        attempt("create the branch", lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))


def _commit(target: _Target, files: Mapping[str, Path], card: str, message: str, *, create_pr: bool) -> str:
    """Commits the files, with this card, and deletes those of an older model. Returns the URL."""
    api, attempt, repo_id, revision = target.api, target.attempt, target.repo_id, target.revision
    existing = attempt("list its files", lambda: api.list_repo_files(repo_id, revision=revision))
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
        raise PushError(
            f"hf_transfer did not write the card of {target.repo_id}, and a push would replace it. Choose another repository, "
            "or publish with --overwrite"
        )
