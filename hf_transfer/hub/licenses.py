"""Derives the license of a model from the licenses of its base model and its dataset, with notes for the card.

The rules are no legal advice. A permissive license allows any license of the derived model. Other licenses are binding, and
two different binding licenses conflict. The derived license is always a license that the base or the dataset states.
"""

from dataclasses import dataclass

from hf_transfer.reporting.formats import escape_markdown

# License ids as the Hub writes them.
PERMISSIVE = frozenset((
    "apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "isc", "zlib", "unlicense", "wtfpl",
    "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "odc-by", "pddl", "cdla-permissive-1.0",
    "cdla-permissive-2.0", "afl-3.0", "artistic-2.0", "ms-pl", "ncsa", "bsl-1.0", "etalab-2.0", "ecl-2.0", "postgresql",
))  # fmt: skip
# All other licenses with an id on the Hub. A license without an id is `other` with a name.
BINDING = frozenset((
    "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "epl-1.0", "epl-2.0", "eupl-1.1",
    "osl-3.0", "lppl-1.3c", "cc", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0",
    "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cdla-sharing-1.0", "odbl", "c-uda", "gfdl", "ofl-1.1", "openrail", "openrail++", "creativeml-openrail-m",
    "bigscience-openrail-m", "bigcode-openrail-m", "apple-ascl", "apple-amlr", "intel-research", "other",
))  # fmt: skip
UNSTATED = frozenset({"", "unknown", "none"})


@dataclass(frozen=True, kw_only=True)
class DerivedLicense:
    """The license of a trained model. `notes` are sentences about this license for the model card, in Markdown."""

    id: str | None  # the Hub's id; None if no license can be stated
    name: str | None  # only if the id is `other`
    notes: tuple[str, ...]


def derive_license(base: str | None, data: str | None, *, has_base: bool = True) -> DerivedLicense:
    """Returns the license of a model, given the licenses of its base model and its dataset.

    A license that is not stated is None or "unknown". `has_base` is False for a model trained from random weights.
    """
    stated = {"base model": _clean(base)} if has_base else {}
    stated |= {"dataset": _clean(data)}
    notes = []
    for origin, terms in stated.items():
        remedy = "find it out before you publish" + (", unless the images are yours" if origin == "dataset" else "")
        unknown = f"**The license of the {origin} is unknown**, and may limit the use of this model: {remedy}."
        notes.append(unknown if terms is None else f"The {origin} states {escape_markdown(terms)}.")
    known = {terms for terms in stated.values() if terms is not None}
    binding = known - PERMISSIVE
    if any("-nd-" in terms for terms in known):
        notes.append("**These terms forbid sharing derived works (no derivatives)**: ask the authors.")
        return DerivedLicense(id=None, name=None, notes=tuple(notes))
    if len(binding) > 1:
        notes.append("**These terms conflict**: the model cannot satisfy both, so no license is stated.")
        return DerivedLicense(id=None, name=None, notes=tuple(notes))
    license_id = stated.get("base model")
    # Binding terms win, then the terms of the base, the origin of the weights. A base without a license gives no license.
    if binding and (license_id or not has_base):
        license_id = next(iter(binding))
    if license_id is None or license_id in PERMISSIVE | BINDING:
        return DerivedLicense(id=license_id, name=None, notes=tuple(notes))
    return DerivedLicense(id="other", name=license_id, notes=tuple(notes))


def _clean(terms: str | None) -> str | None:
    cleaned = (terms or "").strip().lower()
    return None if cleaned in UNSTATED else cleaned
