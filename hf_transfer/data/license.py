"""The license that a dataset's card states: a model trained on it may have to name it too."""

from pathlib import Path

from huggingface_hub import DatasetCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

CARD = "README.md"


def read_license(folder: Path) -> str | None:
    """The `license` in the card of a dataset folder; None if there is no card or it states none."""
    card = folder / CARD
    if not card.is_file():
        return None
    stated = DatasetCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.get("license")
    return ", ".join(map(str, stated)) if isinstance(stated, list) else str(stated) if stated else None


def fetch_license(hub_id: str, revision: str | None) -> str | None:
    """The `license` in the card of a Hub dataset; None if it states none or the card is not available now."""
    try:
        card = hf_hub_download(hub_id, CARD, repo_type="dataset", revision=revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled):
        return None
    return read_license(Path(card).parent)
