"""Reads the license that a dataset's card states, because a model trained on the dataset may have to name this license."""

from pathlib import Path

from huggingface_hub import DatasetCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

CARD = "README.md"


def read_license(folder: Path) -> str | None:
    """Returns the `license` in the card of a dataset folder, or None if there is no card or the card states no license."""
    card = folder / CARD
    if not card.is_file():
        return None
    stated = DatasetCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.get("license")
    return ", ".join(map(str, stated)) if isinstance(stated, list) else str(stated) if stated else None


def fetch_license(hub_id: str, revision: str | None) -> str | None:
    """Returns the `license` in the card of a Hub dataset, or None if no license is stated or the card is unavailable."""
    try:
        card = hf_hub_download(hub_id, CARD, repo_type="dataset", revision=revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled):
        return None
    return read_license(Path(card).parent)
