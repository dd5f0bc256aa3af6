"""Adapt pretrained vision checkpoints to a new image-classification task, and publish what anyone can load.

    from hf_transfer import load, load_data, extract, fit_probe

Names are imported when they are used: `import hf_transfer` is light.
"""

import importlib
import importlib.metadata
from typing import Any

__version__ = "0.1.0"

_HOME_OF = {
    "AdapterConfig": "network.methods",
    "Backbone": "network.backbone",
    "Chain": "network.chain",
    "Cut": "network.cut",
    "DataConfig": "config",
    "Layer": "network.chain",
    "Optimization": "training.optim",
    "Phase": "training.phase",
    "Policy": "network.policies",
    "Preprocessing": "network.preprocessing",
    "ProbePhase": "training.phase",
    "TrainConfig": "config",
    "add_adapters": "network.adapters",
    "advise": "choosing.advise",
    "biases": "network.policies",
    "build_chain": "network.chain",
    "create": "network.backbone",
    "evaluate": "hub.predict",
    "extract": "data.extract",
    "fit_probe": "training.probe",
    "from_layer": "network.policies",
    "full": "network.policies",
    "gradual": "network.policies",
    "head": "network.policies",
    "last": "network.policies",
    "load": "network.backbone",
    "load_adapted": "network.adapters",
    "load_data": "data.dataset",
    "load_saved": "hub.predict",
    "matching": "network.policies",
    "merge_adapters": "network.adapters",
    "norms": "network.policies",
    "predict": "hub.predict",
    "publish": "hub.publish",
    "rank": "choosing.rank",
    "run_plan": "training.plan",
    "save_model": "hub.save",
    "score": "training.metrics",
}

__all__ = [*_HOME_OF]


def _refuse_old_hf_transfer() -> None:
    """The registry's hf-transfer (a download accelerator) has this import name too: both write the same folder."""
    try:
        version = importlib.metadata.version("hf-transfer")
    except importlib.metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"hf-transfer {version} (the download accelerator) is installed beside hf-transfer-learning. Both are imported as "
        "`hf_transfer`, so one environment can't hold both. Remedy: pip uninstall hf-transfer hf-transfer-learning, then "
        "pip install hf-transfer-learning (huggingface_hub 1.0 and later do not need hf-transfer)"
    )


_refuse_old_hf_transfer()


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'hf_transfer' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hf_transfer.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
