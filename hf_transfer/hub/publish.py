"""The push: a saved run to the Hub, checked before it leaves, repeatable until it succeeds.

Everything lies on this disk first, so a push that fails loses nothing: the same command goes on. Files that arrived are not
sent again (LFS knows them by content), and the model appears in one commit, whole or not at all.
"""

import json
import logging
import re
import shlex
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
from hf_transfer.hub.attempts import Attempts, PushError, refusal_of
from hf_transfer.hub.card import OUR_TAG, address_card
from hf_transfer.hub.save import save_model
from hf_transfer.hub.verify import MERGED_TOLERANCE, REFERENCE, TOLERANCE, Verified, find_libraries, verify
from hf_transfer.network.adapters import is_adapter_folder, load_adapted, read_base
from hf_transfer.network.source import find_source

log = logging.getLogger(__name__)

MERGED = "merged"  # beside model/ where that is an adapter: the plain checkpoint that is sent instead
CARD = "README.md"
# Where one of these is on the Hub and not in the new model, it would be loaded with it; all else there is its owner's.
LOADED = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "preprocessor_config.json", "adapter_config.json",
    "task.json",
)  # fmt: skip

__all__ = ["Published", "PushError", "check_push", "publish"]


@dataclass(frozen=True, kw_only=True)
class Published:
    """What was sent, or would be."""

    repo_id: str
    files: dict[str, int]  # bytes by path
    url: str | None  # None for a dry run
    verified: tuple[Verified, ...]


def publish(
    run: str | Path,
    repo_id: str,
    *,
    adapter: bool = False,
    base: str | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
    without_fine_tuning: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    first_wait_s: float = 1.0,
) -> Published:
    """Sends the model of a run to `repo_id` in one commit, after a fresh process has loaded it and agreed with the run.

    `run` is an output folder of a recipe. Where its model is an adapter, that is merged into its base first (`base`: a folder
    or id of it, where the id that is recorded cannot be reached), or sent as it is (`adapter`). `private`: a repository that
    is made is private; `revision`: a branch, made where there is none; `create_pr`: a pull request instead of a commit;
    `overwrite`: also where the repository's card is not ours; `without_fine_tuning`: also a greedy stack whose layers were
    never trained together. Raises ValueError for what is no run or no id, and for an adapter whose base cannot be had;
    VerificationError where the saved model is not the one that was measured; PushError for what the Hub refuses, with the
    remedy.
    """
    run = Path(run)
    if not (run / "model" / CARD).is_file() or not (run / "results.json").is_file():
        raise ValueError(f"{run}: no finished run (results.json and model/ are what a recipe writes last)")
    repo_id, branch = split_repo_id(repo_id)
    revision = revision or branch
    results = json.loads((run / "results.json").read_text())
    if results["details"].get("fine_tuned") is False and not without_fine_tuning:
        raise ValueError(
            f"{run}: this stack was not fine-tuned end to end, which is what makes it good to build on. Run the recipe with "
            "--fine_tune, or publish it so with --without_fine_tuning"
        )
    model = _choose_model(run, results, adapter=adapter, base=base)
    tolerance = MERGED_TOLERANCE if model.name == MERGED else TOLERANCE
    verified = verify(model, run / REFERENCE, find_libraries(model), tolerance=tolerance)
    for each in verified:
        log.info("reloaded by %s in a fresh process: logits differ by %.1g (relative)", each.library, each.logits)
    files = {p.relative_to(model).as_posix(): p for p in sorted(model.rglob("*")) if p.is_file()}
    files = {name: p for name, p in files.items() if not re.search(r"(^|/)\.", name)}  # hidden ones are nobody's model
    url = None
    if not dry_run:
        options = {"--base": base, "--revision": revision}
        switches = {"--adapter": adapter, "--private": private, "--create_pr": create_pr, "--overwrite": overwrite}
        switches |= {"--without_fine_tuning": without_fine_tuning}
        again = ["hf-transfer", "publish", str(run), "--repo_id", repo_id]
        again += [word for flag, value in options.items() if value for word in (flag, value)]
        again += [flag for flag, is_set in switches.items() if is_set]
        then = f"Nothing is lost: the run lies on this disk. Repeat: {shlex.join(again)}"
        api, attempt = HfApi(token=token), Attempts(repo_id, then, first_wait_s=first_wait_s)
        _open_repository(api, attempt, repo_id, private=private, revision=revision, overwrite=overwrite)
        card = address_card(files[CARD].read_text(), repo_id, revision, verified)
        message = f"Add {results['strategy']}"
        url = _commit(api, attempt, repo_id, files, card, message, revision=revision, create_pr=create_pr)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    return Published(repo_id=repo_id, files=sizes, url=url, verified=verified)


def check_push(repo_id: str, *, token: str | None = None) -> None:
    """Whether a push to `repo_id` would be let in, before there is anything to push.

    Raises PushError where there is no valid token, the token cannot write there, or the card there is not ours.
    """
    repo_id, revision = split_repo_id(repo_id)
    api = HfApi(token=token)
    attempt = Attempts(repo_id, "Nothing was trained: mend that, or train without --push_to_hub and publish later")
    who = attempt("sign in", api.whoami)
    owners = [who["name"], *(org["name"] for org in who.get("orgs", []))]
    role = who.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read" or repo_id.split("/")[0] not in owners:
        raise attempt.refuse("push", refusal_of(repo_id))
    attempt("read its card", lambda: _refuse_foreign_card(api, repo_id, revision))


def _choose_model(run: Path, results: dict[str, Any], *, adapter: bool, base: str | None) -> Path:
    """The folder to send: the run's model, or the plain checkpoint that its adapter and base are merged into."""
    model = run / "model"
    if not is_adapter_folder(str(model)):
        if adapter or base:
            raise ValueError(f"{model} is a plain checkpoint, not an adapter: leave --adapter and --base out")
        return model
    if adapter and base:
        raise ValueError(f"base={base!r}: it is what an adapter is merged into, and with --adapter nothing is merged")
    recorded = read_base(model)
    try:
        if adapter:
            find_source(recorded)  # a fresh process will want it, and so will everyone who downloads the adapter
            return model
        merged = load_adapted(model, checkpoint=base)
    except ValueError as error:
        remedy = "publish the merged model (--merge)" if adapter else "name a folder of the base with --base"
        raise ValueError(
            f"the base of this adapter, {base or recorded}, cannot be had: {error}; or {remedy}"
        ) from error
    save_model(merged, results, run / MERGED)
    return run / MERGED


def _open_repository(
    api: HfApi, attempt: Attempts, repo_id: str, *, private: bool, revision: str | None, overwrite: bool
) -> None:
    """Makes the repository and the branch where there are none. Raises PushError where they are not ours to write."""
    attempt("sign in", api.whoami)
    attempt("create the repository", lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    if private and not attempt("read its settings", lambda: api.model_info(repo_id)).private:
        raise attempt.refuse("send it in private", f"{repo_id} is there, and public: make it private in its settings")
    if not overwrite:
        attempt("read its card", lambda: _refuse_foreign_card(api, repo_id, revision))
    if revision is not None:
        attempt("make the branch", lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))


def _commit(
    api: HfApi, attempt: Attempts, repo_id: str, files: dict[str, Path], card: str, message: str, *,
    revision: str | None, create_pr: bool,
) -> str:  # fmt: skip
    """Sends the files, with this card; what an older model left there goes in the same commit. Returns its URL."""
    there = attempt("list its files", lambda: api.list_repo_files(repo_id, revision=revision))
    old = [name for name in there if name not in files and any(fnmatch(name, pattern) for pattern in LOADED)]
    operations: list[Any] = [CommitOperationDelete(name) for name in old]
    operations += [CommitOperationAdd(name, card.encode() if name == CARD else path) for name, path in files.items()]
    commit = attempt(
        "send the model",
        lambda: api.create_commit(repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr),
    )
    return commit.pr_url or str(commit)


def _refuse_foreign_card(api: HfApi, repo_id: str, revision: str | None) -> None:
    try:
        path = api.hf_hub_download(repo_id, CARD, revision=revision)
    except LocalEntryNotFoundError:  # the Hub did not answer: not the same as no card
        raise
    except (EntryNotFoundError, RevisionNotFoundError, RepositoryNotFoundError):
        return
    if OUR_TAG not in (ModelCard.load(path).data.get("tags") or []):
        raise PushError(
            f"{repo_id} has a card that hf_transfer did not write: its content would be replaced. Choose another repository, "
            "or publish with --overwrite"
        )
