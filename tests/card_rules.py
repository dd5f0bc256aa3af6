"""The Hub's rules for the metadata that our cards use: allowed names, the form of ids, the structure of eval results.

Written from the Hub's documentation of model cards, because its validator is not public.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
LICENSES = {
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0",
    "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0",
    "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0", "cdla-permissive-1.0",
    "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "agpl-3.0", "gfdl", "gpl",
    "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "isc", "intel-research", "lppl-1.3c", "ms-pl", "apple-ascl",
    "apple-amlr", "mpl-2.0", "odc-by", "odbl", "openrail++", "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense",
    "zlib", "pddl", "unknown", "other",
}  # fmt: skip
RELATIONS = {"adapter", "finetune", "merge", "quantized"}


def find_errors(card: str) -> list[str]:
    """Error messages for the YAML block of a card; none if there is no block."""
    return list(_find(card))


def _find(card: str) -> Iterator[str]:
    block = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    data: dict[str, Any] = (yaml.safe_load(block[1]) if block else None) or {}
    if data.get("license", "unknown") not in LICENSES:
        yield f'"license" must be one of {len(LICENSES)} ids, not {data["license"]!r}'
    for key in ("base_model", "datasets"):
        ids = data.get(key, [])
        for each in [ids] if isinstance(ids, str) else ids:
            if not isinstance(each, str) or not REPO_ID.fullmatch(each):
                yield f'"{key}" with value {each!r} is not valid. Use an id of the Hub'
    if data.get("base_model_relation", "finetune") not in RELATIONS:
        yield f'"base_model_relation" must be one of {sorted(RELATIONS)}'
    for key in ("tags", "metrics"):
        if not all(isinstance(each, str) for each in data.get(key, [])):
            yield f'"{key}" must be an array of strings'
    for key in ("library_name", "pipeline_tag", "license_name"):
        if not isinstance(data.get(key, ""), str):
            yield f'"{key}" must be a string'
    for model in data.get("model-index", []):
        for result in model["results"]:
            needed = (result["task"].get("type"), result["dataset"].get("type"), result["dataset"].get("name"))
            if not model.get("name") or not all(isinstance(each, str) and each for each in needed):
                yield '"model-index" lacks a name, a task or a dataset'
            for metric in result["metrics"]:
                if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), int | float):
                    yield '"model-index" has a metric without type or value'
