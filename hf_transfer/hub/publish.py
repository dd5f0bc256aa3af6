"""The push: a saved run to the Hub, checked before it leaves, repeatable until it succeeds.

Everything lies on this disk first, so a push that fails loses nothing: the same command goes on. Files that arrived are not
sent again (LFS knows them by content), and the model appears in one commit, whole or not at all.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_transfer.hub.verify import REFERENCE, Verified, verify

log = logging.getLogger(__name__)

OUR_TAG = "hf_transfer"  # in the metadata of every card that we write
RETRIED = (408, 429, 500, 502, 503, 504)
ATTEMPTS = 5
LONGEST_WAIT_S = 60.0
NOT_SENT = ("*.partial",)

T = TypeVar("T")


class PushError(RuntimeError):
    """The push did not succeed; the run is as it was, and the command can be repeated."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """What was sent, or would be."""

    repo_id: str
    files: dict[str, int]  # bytes by path
    url: str | None  # None for a dry run
    verified: tuple[Verified, ...]


def publish(
    run: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    first_wait_s: float = 1.0,
) -> Published:
    """Sends the model of a run to `repo_id` in one commit, after fresh processes have loaded it and agreed with the run.

    `run` is an output folder of a recipe. `revision`: a branch, made where there is none; `create_pr`: a pull request instead
    of a commit; `overwrite`: also where the repository's card is not ours. Raises ValueError for what is no run or no id;
    VerificationError where the saved model is not the one that was measured; PushError for what the Hub refuses, with the
    remedy.
    """
    model = run / "model"
    if not (model / "README.md").is_file() or not (run / "results.json").is_file():
        raise ValueError(f"{run}: no finished run (results.json and model/ are what a recipe writes last)")
    if repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise ValueError(f"repo_id={repo_id!r}: give OWNER/NAME")
    files = {p.relative_to(model).as_posix(): p.stat().st_size for p in sorted(model.rglob("*")) if p.is_file()}
    verified = tuple(verify(model, run / REFERENCE, _libraries(model)))
    for each in verified:
        log.info("reloaded by %s in a fresh process: logits differ by %.1g (relative)", each.library, each.logits)
    if dry_run:
        return Published(repo_id=repo_id, files=files, url=None, verified=verified)
    api = HfApi(token=token)
    again = f"hf-transfer publish {run} --repo_id {repo_id}"
    attempt = _Attempt(repo_id, again, first_wait_s)
    attempt("sign in", api.whoami)
    attempt("create the repository", lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    if not overwrite:
        _refuse_foreign_card(attempt("read its card", lambda: _read_card(api, repo_id, revision)), repo_id)
    if revision is not None:
        attempt("make the branch", lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    commit = attempt(
        "send the model",
        lambda: api.upload_folder(
            repo_id=repo_id,
            folder_path=model,
            commit_message=f"Add {json.loads((run / 'results.json').read_text())['strategy']}",
            revision=revision,
            create_pr=create_pr,
            ignore_patterns=list(NOT_SENT),
        ),
    )
    return Published(repo_id=repo_id, files=files, url=commit.pr_url or str(commit), verified=verified)


class _Attempt:
    """Calls the Hub, waits and calls again for what may pass, and says what to do about what does not."""

    def __init__(self, repo_id: str, again: str, first_wait_s: float) -> None:
        self.repo_id, self.again, self.first_wait_s = repo_id, again, first_wait_s

    def __call__(self, what: str, call: Callable[[], T]) -> T:
        wait_s = self.first_wait_s
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return call()
            except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
                status = _status(error)
                if status is not None and status not in RETRIED:
                    raise PushError(self._explain(what, status, error)) from error
                if attempt == ATTEMPTS:
                    reason = f"the Hub answers {status}" if status else f"the connection fails ({type(error).__name__})"
                    raise PushError(
                        f"could not {what}: {reason}, {ATTEMPTS} times. Nothing is lost: the run lies on this disk. Repeat "
                        f"later: {self.again}"
                    ) from error
                log.info("could not %s (%s); again in %.0f s", what, status or type(error).__name__, wait_s)
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        raise AssertionError("not reached")

    def _explain(self, what: str, status: int, error: Exception) -> str:
        owner = self.repo_id.split("/")[0]
        remedy = {
            401: "no token, or one that is not valid: `hf auth login`, or set HF_TOKEN to a token with write access",
            403: f"the token may not write to {owner!r}: take one with write access, and a --repo_id of your own",
            404: f"{self.repo_id} is not there for this token: it is private to someone else, or the branch is missing",
        }.get(status, f"the Hub answers {status}: {str(error).splitlines()[0] if str(error) else ''}")
        return f"could not {what}: {remedy}. Nothing is lost; then repeat: {self.again}"


def _status(error: Exception) -> int | None:
    if isinstance(error, LocalTokenNotFoundError):
        return 401
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _libraries(model: Path) -> list[str]:
    if (model / "adapter_config.json").is_file():
        raise ValueError(
            f"{model} is an adapter folder: its reload cannot be checked without its base, so it is not sent; train with "
            "--merge, or push the folder with `hf upload`"
        )
    config = json.loads((model / "config.json").read_text())
    return ["transformers", "timm"] if "architecture" in config else ["transformers"]


def _read_card(api: HfApi, repo_id: str, revision: str | None) -> ModelCard | None:
    try:
        path = api.hf_hub_download(repo_id, "README.md", revision=revision)
    except (EntryNotFoundError, RevisionNotFoundError, RepositoryNotFoundError):
        return None
    card: ModelCard = ModelCard.load(path)
    return card


def _refuse_foreign_card(card: ModelCard | None, repo_id: str) -> None:
    if card is not None and OUR_TAG not in (card.data.get("tags") or []):
        raise PushError(
            f"{repo_id} has a card that hf_transfer did not write: its content would be replaced. Choose another --repo_id, or "
            "say --overwrite"
        )
