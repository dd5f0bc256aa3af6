"""Reads the license that a dataset's card states, because a model trained on the dataset may have to name this license."""

import logging
from pathlib import Path

import yaml
from huggingface_hub import DatasetCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

log = logging.getLogger(__name__)

CARD = "README.md"


def read_license(folder: Path) -> str | None:
    """Returns the `license` in the card of a dataset folder, or None if no readable card states a license."""
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
    """Returns the `license` in the card of a Hub dataset, or None if no license is stated or the card is unavailable."""
    try:
        card = hf_hub_download(hub_id, CARD, repo_type="dataset", revision=revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled):
        return None
    return read_license(Path(card).parent)
