"""What licence a model may carry, from those of its base and of its data; and where that is not known, the words that say so.

A table of what derives from what, not legal advice: permissive terms let the result carry any licence, all others go on to
it, and two different ones of those don't fit together. Nothing is claimed that neither the base nor the data states.
"""

from dataclasses import dataclass

# As the Hub writes them.
PERMISSIVE = frozenset((
    "apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "isc", "zlib", "unlicense", "wtfpl",
    "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "odc-by", "pddl", "cdla-permissive-1.0",
    "cdla-permissive-2.0", "afl-3.0", "artistic-2.0", "ms-pl", "ncsa", "bsl-1.0", "etalab-2.0", "ecl-2.0", "postgresql",
))  # fmt: skip
# Others whose ids the Hub knows; it takes any further licence as `other` with a name.
BINDING = frozenset((
    "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "epl-1.0", "epl-2.0", "eupl-1.1",
    "osl-3.0", "lppl-1.3c", "cc", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0",
    "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cdla-sharing-1.0", "odbl", "c-uda", "gfdl", "ofl-1.1", "openrail", "openrail++", "creativeml-openrail-m",
    "bigscience-openrail-m", "bigcode-openrail-m", "apple-ascl", "apple-amlr", "intel-research", "other",
))  # fmt: skip
UNSTATED = frozenset({"", "unknown", "none"})


@dataclass(frozen=True, kw_only=True)
class Derived:
    """`id` as the Hub takes it, None where no licence can be stated; `name` where that is `other`; `notes`: sentences."""

    id: str | None
    name: str | None
    notes: tuple[str, ...]


def derive_license(base: str | None, data: str | None, *, has_base: bool = True) -> Derived:
    """The licence of a model trained from `base` on `data`; each None (or "unknown") where none is stated.

    `has_base` is False for a model that was trained from random weights.
    """
    stated = {"base model": _clean(base)} if has_base else {}
    stated |= {"data set": _clean(data)}
    notes = []
    for what, terms in stated.items():
        unknown = f"**The licence of the {what} is not known**: find it out before you rely on this model's."
        notes.append(unknown if terms is None else f"The {what} states {terms}.")
    known = {terms for terms in stated.values() if terms is not None}
    binding = known - PERMISSIVE
    if any("-nd-" in terms for terms in known):
        notes.append("**These terms forbid to share what is derived (no derivatives)**: ask whose work it is.")
        return Derived(id=None, name=None, notes=tuple(notes))
    if len(binding) > 1:
        notes.append("**These terms conflict**: neither lets the model carry the other's, so no licence is stated.")
        return Derived(id=None, name=None, notes=tuple(notes))
    found = stated.get("base model")
    # What binds goes on, else the base's, whose weights these are; of a base that states nothing, nothing is claimed.
    if binding and (found or not has_base):
        found = next(iter(binding))
    if found is None or found in PERMISSIVE | BINDING:
        return Derived(id=found, name=None, notes=tuple(notes))
    return Derived(id="other", name=found, notes=tuple(notes))


def _clean(terms: str | None) -> str | None:
    found = (terms or "").strip().lower()
    return None if found in UNSTATED else found
