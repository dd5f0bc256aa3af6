"""The one OpenVINO core of this process."""

from functools import cache
from typing import Any


@cache
def openvino_core() -> Any:
    """Returns the `openvino.Core` that compiles every network of this process, and that lives as long as the process.

    OpenVINO's plugin for CPUs gives the thread that creates it a stack for signal handlers. Without a core, the plugin ends
    with its last network and unmaps that stack. If another thread drops that network, the stack stays registered, and the next
    signal, such as Ctrl-C, ends the process with a segmentation fault before any handler runs (OpenVINO 2026.4).
    """
    import openvino

    return openvino.Core()
