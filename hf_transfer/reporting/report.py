"""Writes report.html, one self-contained page of a run's results.

The page depends on results.json and, for its pictures, on the `Illustrations` of the run, so it can be written again at any
time. Styles, script, pictures and charts (SVG) are inline, and the page loads nothing. The template escapes text from the data
set (class names, notes). The page follows the reader's light or dark setting, and fits the screen of a phone.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from markupsafe import Markup

from hf_transfer.reporting.candidates import lay_out_candidates
from hf_transfer.reporting.charts import HEIGHT, WIDTH, lay_out_curve, lay_out_matrix
from hf_transfer.reporting.confidence import describe_confidence
from hf_transfer.reporting.cost_table import lay_out_cost, list_by_name
from hf_transfer.reporting.curves import list_curves, mark_curve, show_shares_in_percent
from hf_transfer.reporting.formats import format_metric, make_environment
from hf_transfer.reporting.glossary import COSTS, METRICS, WORDS
from hf_transfer.reporting.illustrations import Illustrations
from hf_transfer.reporting.label_table import find_confused_pairs, lay_out_labels
from hf_transfer.reporting.page_images import lay_out_map, write_image_data
from hf_transfer.reporting.reliability import lay_out_diagram
from hf_transfer.reporting.report_results import (
    choose_split,
    describe_scored_images,
    explain_validation,
    find_interval,
    find_metrics,
)
from hf_transfer.reporting.sentences import describe_repeats
from hf_transfer.reporting.settings_table import flatten
from hf_transfer.reporting.verdict import give_verdict
from hf_transfer.targets.target import MetricInfo

REPORT = "report.html"  # file of an output folder
_FOLDED = [  # key, title
    ("plan", "Plan: what each phase did"),
    ("config", "Configuration: all settings"),
    ("checkpoint", "Checkpoint"),
    ("details", "Details"),
    ("versions", "Versions"),
]
_IN_CURVES = ("phases",)  # entries of `details` that the curves show


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    """One main metric as text. `interval` and `validation` (the value on validation images) are empty if not available."""

    title: str
    value: str
    interval: str
    validation: str
    help: str


def write_report(results: Mapping[str, Any], path: str | Path, illustrations: Illustrations | None = None) -> None:
    """Writes the HTML page of `results` (the content of results.json) to `path`, and replaces an existing file."""
    Path(path).write_text(render_report(results, illustrations), encoding="utf-8")


def render_report(results: Mapping[str, Any], illustrations: Illustrations | None = None) -> str:
    """Returns the HTML page of `results`, the content of results.json, with the pictures of `illustrations`, if given.

    Only `metrics` is required, with the metrics of `test` or `validation` (see `metrics.records`). Without a test split, the
    page shows validation metrics and warns that they are optimistic. Every other part of `results` (strategy, checkpoint,
    data, curves, cost, plan, details, config, versions) is shown if present.

    Raises ValueError if `metrics` contains neither the test split nor the validation split, or if a curve cannot be drawn.
    """
    shown, scores = choose_split(results)
    data = {"name": "", "fingerprint": "", "num_images": {}, "notes": []} | results.get("data", {})
    validation = results["metrics"].get("validation") or {} if shown == "test" else {}
    return (
        make_environment("reporting")
        .get_template("report.html.jinja")
        .render(
            style=read_part("page.css"),
            script=read_part("page.js"),
            strategy=str(results.get("strategy", "training")).replace("_", " ").capitalize(),
            checkpoint={"id": "", "revision": ""} | results.get("checkpoint", {}),
            data=data,
            shown=shown,
            warning="" if shown == "test" else explain_validation(results, scores),
            verdict=give_verdict(results, None if illustrations is None else illustrations.num_suspects),
            scored_images=describe_scored_images(shown, scores),
            is_held_out="estimated_by" in scores,  # by other models than the saved one
            network=_describe_outputs(results, scores),
            has_pairs="confusion_matrix" in scores,
            metrics=_lay_out_metrics(find_metrics(results), scores, validation),
            charts=[
                lay_out_curve(*show_shares_in_percent(curve, mark_curve(curve, results)))
                for curve in list_curves(results)
            ],
            width=WIDTH,
            height=HEIGHT,
            matrix=lay_out_matrix(scores),
            pairs=find_confused_pairs(scores),
            labels=lay_out_labels(scores),
            candidates=lay_out_candidates(results.get("details", {}), find_metrics(results)[0]),
            cost=lay_out_cost(results.get("cost", {})),
            fingerprints=list_by_name(data["fingerprint"]),
            notes=[
                *describe_repeats(results),
                *describe_confidence(results),
                *data["notes"],
                *scores.get("notes", []),
            ],
            folded=[(title, _list_rows(key, results[key])) for key, title in _FOLDED if results.get(key)],
            words=WORDS,
            cost_words=COSTS,
            **_lay_out_illustrations(illustrations),
        )
    )


@functools.cache
def read_part(name: str) -> Markup:
    """Returns a file beside this module, such as the style or the script of pages, to be inserted as it is."""
    return Markup((resources.files("hf_transfer") / "reporting" / name).read_text(encoding="utf-8"))


def _lay_out_illustrations(illustrations: Illustrations | None) -> dict[str, Any]:
    """Returns what the template shows of the illustrations; nothing without them."""
    if illustrations is None:
        return {
            "galleries": (),
            "image_data": Markup("[]"),
            "map": None,
            "diagram": None,
            "chain": None,
            "has_heat": False,
            "mistake_buttons": {},
            "number_plots": (),
        }
    return {
        "galleries": illustrations.galleries,
        "image_data": write_image_data(illustrations.images),
        "map": lay_out_map(illustrations),
        "diagram": lay_out_diagram(illustrations.bins) if illustrations.bins else None,
        "chain": illustrations.chain,
        "has_heat": any(image.heat for image in illustrations.images),
        "mistake_buttons": _make_buttons(illustrations),
        "number_plots": illustrations.number_plots,
    }


def _make_buttons(illustrations: Illustrations) -> dict[str, list[tuple[str, str, int]]]:
    """Returns, for each label, the (key, title, count) of the buttons that show its missed images and its false alarms."""
    return {
        each.label: [
            (f"missed {k}", f"of {each.label} missed", len(each.missed)),
            (f"extra {k}", f"wrongly labeled {each.label}", len(each.false_alarms)),
        ]
        for k, each in enumerate(illustrations.label_mistakes)
    }


def _lay_out_metrics(
    metrics: Sequence[MetricInfo], scores: Mapping[str, Any], validation: Mapping[str, Any]
) -> list[MetricRow]:
    """Returns one row for each main metric in `scores`, with the metric's interval and its value in `validation`."""
    rows = []
    for info in metrics:
        if scores.get(info.key) is None:
            continue
        bounds, on_validation = find_interval(scores, info.key), validation.get(info.key)
        title = f"{info.title}, %" if info.kind == "percent" else f"{info.title}{', ' * bool(info.unit)}{info.unit}"
        rows.append(
            MetricRow(
                title=title,
                value=format_metric(scores[info.key], info, has_unit=False),
                interval="" if bounds is None else " to ".join(format_metric(x, info, has_unit=False) for x in bounds),
                validation="" if on_validation is None else format_metric(on_validation, info, has_unit=False),
                help=METRICS.get(info.key, ""),
            )
        )
    return rows


def _describe_outputs(results: Mapping[str, Any], scores: Mapping[str, Any]) -> str:
    count = len(results.get("label_names", scores.get("per_class", [])))
    word = "numbers" if "per_number" in scores else "classes" if "confusion_matrix" in scores else "labels"
    return f"{count} {word if count != 1 else {'classes': 'class'}.get(word, word.removesuffix('s'))}"


def _list_rows(key: str, part: Any) -> list[tuple[str, str]]:
    """Returns the plan in results.json as numbered sentences, and any other part of results.json as names and values."""
    if isinstance(part, list) and part and all("description" in item for item in part):
        return [(f"Phase {i}", item["description"]) for i, item in enumerate(part, 1)]
    if isinstance(part, Mapping):
        part = {name: value for name, value in part.items() if key != "details" or name not in _IN_CURVES}
    return list(flatten(part))
