"""The license that a dataset's card states: a model trained on it may have to name it too."""

import logging
from pathlib import Path

import yaml
from huggingface_hub import DatasetCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

log = logging.getLogger(__name__)

CARD = "README.md"


def read_license(folder: Path) -> str | None:
    """The `license` in the card of a dataset folder; None if there is no card or it states none."""
    card = folder / CARD
    if not card.is_file():
        return None
    try:
        stated = DatasetCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.get("license")
    except (ValueError, OSError, yaml.YAMLError) as error:
        log.warning("%s cannot be read, so the dataset's license is unknown: %s", CARD, " ".join(str(error).split()))
        return None
    return ", ".join(map(str, stated)) if isinstance(stated, list) else str(stated) if stated else None


def fetch_license(hub_id: str, revision: str | None) -> str | None:
    """The `license` in the card of a Hub dataset; None if it states none or the card is not available now."""
    try:
        card = hf_hub_download(hub_id, CARD, repo_type="dataset", revision=revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled):
        return None
    return read_license(Path(card).parent)
