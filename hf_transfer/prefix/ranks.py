"""The processes (ranks) that fill a store together, and which of these ranks see the same cache folder.

Each group of ranks that sees one folder keeps all stores there, so nodes with a cache folder each never wait for a file of
another node (see `exchange`). All ranks run the same collectives in the same order, whatever their group.
"""

import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from hf_transfer.errors import describe_error
from hf_transfer.locations import describe_unwritable, report_unwritable, store_dir

log = logging.getLogger(__name__)

T = TypeVar("T")
TOKEN = ".token."  # part of the names of files that show which ranks see the same folder


@dataclass(frozen=True, kw_only=True)
class Outcomes(Generic[T]):
    """What one step returned on each rank, by rank, or the errors that it raised."""

    values: list[T]  # the values of failed ranks are missing
    errors: dict[int, tuple[bool, str]]  # rank -> whether the error is a ValueError, and its message
    own_error: Exception | None

    def check(self) -> list[T]:
        """Returns the values of all ranks. Raises an error on every rank if the step failed on any rank."""
        if self.own_error is not None:
            raise self.own_error
        for rank, (is_value_error, message) in self.errors.items():
            raise (ValueError if is_value_error else RuntimeError)(f"process {rank} failed: {message}")
        return self.values


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes (ranks) that fill a store together. `gather` returns the values that all ranks give, by rank."""

    rank: int = 0
    count: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]

    def attempt(self, step: Callable[[], T]) -> Outcomes[T]:
        """Runs `step` on every rank, and waits for all ranks. An error of one rank is reported to all ranks."""
        value, own_error, report = None, None, None
        try:
            value = step()
        except Exception as error:  # noqa: BLE001  `check` raises it, after the other ranks know
            own_error, report = error, (isinstance(error, ValueError), describe_error(error))
        results = self.gather((value, report))
        errors = {rank: error for rank, (_, error) in enumerate(results) if error is not None}
        values = [value for value, error in results if error is None]
        return Outcomes(values=values, errors=errors, own_error=own_error)

    def together(self, step: Callable[[], T]) -> list[T]:
        """Runs `step` on every rank and returns its values by rank. If it fails on one rank, every rank raises an error."""
        return self.attempt(step).check()


@dataclass(frozen=True, kw_only=True)
class FolderGroup:
    """The ranks that see the same cache folder as this rank, and why they cannot write there (None if they can)."""

    rank: int
    members: tuple[int, ...]
    problem: str | None

    @property
    def leader(self) -> int:
        """The rank that opens, checks, completes and evicts the group's stores."""
        return self.members[0]

    @property
    def is_leader(self) -> bool:
        """Whether this rank is the leader."""
        return self.rank == self.leader

    @cached_property
    def index(self) -> int:
        """The position of this rank among the members."""
        return self.members.index(self.rank)


_groups: dict[tuple[Path, int, int], FolderGroup] = {}


def find_group(ranks: Ranks) -> FolderGroup:
    """Returns this rank's group. The first call of a process writes a file of each rank and looks for the others' files."""
    folder = store_dir()
    key = (folder, ranks.rank, ranks.count)
    if key not in _groups:
        _groups[key] = _probe(ranks, folder)
    return _groups[key]


def _probe(ranks: Ranks, folder: Path) -> FolderGroup:
    token = folder / f"{ranks.rank}{TOKEN}{uuid.uuid4().hex}"
    problem = _write_token(token)
    try:
        tokens: list[tuple[str, str | None]] = ranks.gather((token.name, problem))
        # Listing the folder reads it again on a network file system, where a single name might be looked up in an old copy.
        names = _list_names(folder)
        seen = tuple(rank for rank, (name, _) in enumerate(tokens) if name in names) or (ranks.rank,)
        views: list[tuple[int, ...]] = ranks.gather(seen)
    finally:
        if problem is None:
            token.unlink(missing_ok=True)
    members = tuple(rank for rank, view in enumerate(views) if view == seen)
    if ranks.count > 1 and len(members) < ranks.count:
        log.info("%d of %d processes share the cache folder %s", len(members), ranks.count, folder)
    problems = [p for rank, (_, p) in enumerate(tokens) if rank in members and p is not None]
    return FolderGroup(rank=ranks.rank, members=members, problem=problems[0] if problems else None)


def _write_token(token: Path) -> str | None:
    """Creates an empty file in the cache folder. Returns None, or a sentence that says why this is impossible."""
    try:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch()  # without content, which a full disk would refuse before stores are evicted
    except OSError as error:
        report_unwritable(error)
        return describe_unwritable(error)
    return None


def _list_names(folder: Path) -> set[str]:
    try:
        return {file.name for file in folder.iterdir()}
    except OSError:
        return set()
