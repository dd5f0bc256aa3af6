"""Lets the main process decide for all processes of a run."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")


def decide_on_main(decide: Callable[[], T]) -> T:
    """Returns, in every process, the result of `decide()` in the main process. An error is raised in every process."""
    state = PartialState()
    if state.num_processes == 1:
        return decide()
    result: T | None = None
    error: Exception | None = None
    if state.is_main_process:
        try:
            result = decide()
        except (ValueError, OSError, RuntimeError) as raised:
            error = raised
    kind = ValueError if isinstance(error, ValueError) else RuntimeError
    shared = broadcast_object_list([result, error and (kind, str(error))])
    if error is not None:
        raise error
    if shared[1] is not None:
        kind, message = shared[1]
        raise kind(message)
    value: T = shared[0]
    return value
