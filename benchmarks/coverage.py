"""Which families of networks the chain covers: every one of timm's and transformers' is built small, chained and checked.

    python benchmarks/coverage.py                       # all, into docs/coverage.md
    python benchmarks/coverage.py --only 'swin|resnet'  # some, printed, and kept with --json
    python benchmarks/coverage.py --library headless    # checkpoints without a classifier: see headless_coverage.py
    python benchmarks/coverage.py --merge A.json B.json # docs/coverage.md from several such runs

A timm family is a module file and the first word of its models' names; its smallest member stands for it. A transformers
family is an entry of the image-classification mapping, with a small configuration. Weights are random, images small where
the network allows it. Four checks, on other weights, images and batch size than the chain's own verification saw:

- the layers and the unused parameters hold every parameter exactly once;
- at every cut, suffix(prefix(x)) is the network's logits;
- behind the middle cut a step in train mode gives gradients to the parameters that a plain step reaches, to no other;
- at every block boundary there is a cut. Blocks are found here by another rule than the package's: the innermost
  children of nn.Sequential or nn.ModuleList containers that have two or more weights and are called with the spine.
"""

import argparse
import inspect
import json
import multiprocessing
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from hf_transfer.network.chain import Chain, build_chain
from hf_transfer.network.cut import Cut
from hf_transfer.network.forward import compute_logits
from hf_transfer.network.trace import Call, Trace, trace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for the checkpoints in tests/

from headless_coverage import format_section, format_totals, is_covered, run_cases  # noqa: E402

DOCS = ROOT / "docs"
HEADLESS = "headless"
NUM_CLASSES = 7
BATCH = 3
IMAGE_PX = (64, 96, 112, 128)  # tried in this order, then the network's own size
RELATIVE = 1e-5
TIMEOUT_S = 600


def main() -> None:
    """Chains every family, prints a line for each, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=["timm", "transformers", "all", "headless"], default="all")
    parser.add_argument("--only", metavar="REGEX", help="only families whose name this finds; nothing is written")
    parser.add_argument("--json", type=Path, help="where the rows of --only go")
    parser.add_argument(
        "--merge", type=Path, nargs="+", metavar="JSON", help="write the docs from such rows; later ones win"
    )
    options = parser.parse_args()
    if options.merge:
        found = [row for file in options.merge for row in json.loads(file.read_text())]
        _write_docs(list({(row["library"], row["family"]): row for row in found}.values()))
        return
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)  # before any fork: OpenMP's threads would not survive it
    rows = []
    is_headless = options.library == HEADLESS
    for row in run_cases(_run_apart, options.only) if is_headless else _run_families(options.library, options.only):
        rows.append(row)
        print(_progress(row), flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(format_totals(rows) if is_headless else _totals(rows))
    if not options.only and options.library in ("all", HEADLESS):
        _write_docs(rows)


def _run_families(library: str, only: str | None) -> Iterator[dict[str, Any]]:
    for name, family, build in _families(library):
        if not only or re.search(only, f"{name} {family}"):
            yield {"library": name, "family": family, **_run_apart(partial(_check, build))}


# --- families -----------------------------------------------------------------------------------------------------------

Candidate = tuple[str, nn.Module, int]  # name, network, image size in pixels


def _families(library: str) -> Iterator[tuple[str, str, Callable[[], Candidate]]]:
    if library != "transformers":
        for module in timm.list_modules():
            members: dict[str, list[str]] = {}
            for name in timm.list_models(module=module):
                found = re.match(r"[a-z]+(v\d)?", name)
                if found and found[0] != "test":
                    members.setdefault(found[0], []).append(name)
            for word, names in sorted(members.items()):
                yield "timm", f"{module}: {word}", partial(_small_timm, names)
    if library != "timm":
        for family, classes in sorted(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.items()):
            if family == "timm_wrapper":
                continue  # a timm model in another's clothes: load() takes out the model itself
            for name in [classes] if isinstance(classes, str) else classes:
                label = (
                    family if isinstance(classes, str) else f"{family}: {name.partition('ForImage')[2][14:] or 'plain'}"
                )
                yield "transformers", label, partial(_small_transformers, name)


class NotAnImageNetworkError(Exception):
    """What the mapping lists, but can't be built here as a network of pixels alone; it does not count."""


def _small_timm(names: list[str]) -> Candidate:
    """The member with the fewest parameters, at the smallest image size that it takes."""

    def count(name: str) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(name).parameters())

    name = min(names, key=count)
    own = timm.get_pretrained_cfg(name)
    assert own is not None
    own_px = own.input_size[-1]
    tries: list[tuple[int, Callable[[], nn.Module]]] = []
    for px in (*(p for p in IMAGE_PX if p < own_px), own_px):
        tries.append((px, partial(timm.create_model, name, num_classes=NUM_CLASSES, img_size=px)))
        tries.append((px, partial(timm.create_model, name, num_classes=NUM_CLASSES)))
    return name, *_first_that_runs(tries)


# Field of a configuration -> the most that is built of it. Lists are cut to three blocks a stage (CvT needs three).
SMALL = {
    "num_hidden_layers": 4,
    "depths": 3,
    "depth": 3,
    "num_latents": 16,
    "num_self_attends_per_block": 3,
    "num_cross_attention_heads": 1,
}


def _small_transformers(name: str) -> Candidate:
    """The default configuration with fewer blocks, on the smallest images that it takes."""
    model_class = getattr(transformers, name)
    taken = inspect.signature(model_class.forward).parameters
    for other in ("input_ids", "spatial_shapes"):
        if other in taken:
            raise NotAnImageNetworkError(f"takes {other}, not images alone")
    default = model_class.config_class()

    def build(px: int | None) -> nn.Module:
        config = model_class.config_class(num_labels=NUM_CLASSES)
        for part in (config, getattr(config, "vision_config", None)):
            if part is None:
                continue
            for key, most in SMALL.items():
                value = getattr(part, key, None)
                if isinstance(value, int):
                    setattr(part, key, min(value, most))
                elif isinstance(value, list | tuple):
                    setattr(part, key, [min(v, most) for v in value])
            own = getattr(part, "image_size", None)
            if px is not None and own is not None:
                part.image_size = px if isinstance(own, int) else [px] * len(own)
        model: nn.Module = model_class(config)
        return model

    own_px = getattr(getattr(default, "vision_config", default), "image_size", 224)
    own_px = own_px if isinstance(own_px, int) else own_px[0]
    tries = [(px, partial(build, px)) for px in (*(p for p in IMAGE_PX if p < own_px), own_px)]
    return name, *_first_that_runs(tries)


def _first_that_runs(tries: Sequence[tuple[int, Callable[[], nn.Module]]]) -> tuple[nn.Module, int]:
    errors = []
    for px, build in tries:
        try:
            torch.manual_seed(0)
            model = build().eval()
            with torch.no_grad():
                compute_logits(model, torch.randn(2, 3, px, px))
        except ImportError as error:
            raise NotAnImageNetworkError(str(error).strip().split(" but")[0]) from error
        except TypeError as error:
            if "not one tensor of logits" in str(error):
                raise NotAnImageNetworkError(str(error)) from error
            errors.append(f"{px} px: {error}")
        except Exception as error:  # noqa: BLE001 - any: another size is tried, and all errors are raised in the end
            errors.append(f"{px} px: {type(error).__name__}: {error}")
        else:
            return model, px
    raise RuntimeError("; ".join(e[:200] for e in errors))


# --- checks -------------------------------------------------------------------------------------------------------------


def _check(build: Callable[[], Candidate]) -> Iterator[dict[str, Any]]:
    """The row, as far as it got, before each step that could end the process (a crash inside torch); then the whole row."""
    name, model, px = build()
    started = time.perf_counter()
    chain = build_chain(model, (3, px, px))
    seconds = time.perf_counter() - started
    inner = [layer.name for layer in chain.layers[1:-1]]
    failures = [*_check_partition(chain), *_check_exactness(chain)]
    blocks, missed = _check_blocks(chain)
    row = {
        "architecture": name,
        "image_px": px,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_layers": len(inner),
        "layers": inner,
        "head": list(chain.head.modules) if chain.head is not None else [],
        "features": list(chain.features.shape) if chain.features is not None else None,
        "num_cuts": len(chain.cuts),
        "num_blocks": blocks,
        "missed_blocks": missed,
        "unused_parameters": list(chain.unused_parameters),
        "notes": list(chain.notes),
        "seconds": round(seconds, 2),
    }
    if not chain.cuts:
        yield {**row, "failures": failures}
        return
    cut = chain.cuts[len(chain.cuts) // 2]
    yield {**row, "failures": [*failures, f"torch crashes: the plain network, frozen before {cut.name}, in train mode"]}
    expected = _reached_by_a_plain_step(chain, cut)
    yield {**row, "failures": [*failures, f"the process died: suffix after {cut.name} in train mode"]}
    yield {**row, "failures": [*failures, *_check_training(chain, cut, expected)]}


def _check_partition(chain: Chain) -> list[str]:
    placed = [n for layer in chain.layers for n in layer.parameters] + list(chain.unused_parameters)
    names = [n for n, _ in chain.model.named_parameters()]
    wrong = {n for n, count in Counter(placed).items() if count > 1} ^ (set(placed) ^ set(names))
    duplicates = [n for n, count in Counter(layer.name for layer in chain.layers).items() if count > 1]
    found = [f"not in exactly one layer: {', '.join(sorted(wrong)[:3])}"] if wrong else []
    return [*found, *(["layer names that repeat: " + ", ".join(duplicates)] if duplicates else [])]


def _check_exactness(chain: Chain) -> list[str]:
    pixels = torch.randn(BATCH, *chain.image_shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = compute_logits(chain.model, pixels)
        activations = chain.run_prefix(chain.cuts, pixels)
        found = []
        for cut, activation in zip(chain.cuts, activations, strict=True):
            with chain.part(start=cut) as suffix:
                difference = float((suffix(activation) - whole).abs().max() / whole.abs().max().clamp(min=1e-6))
            if not difference <= RELATIVE:
                found.append(f"logits differ by {difference:.1e} at {cut.name}")
    return found


def _reached_by_a_plain_step(chain: Chain, cut: Cut) -> set[str]:
    """Parameters behind `cut` that get a gradient in train mode without any cut: the reference."""
    frozen = set(chain.before(cut)[0])
    for name, parameter in chain.model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    running = {name: buffer.clone() for name, buffer in chain.model.named_buffers()}
    chain.model.train()
    try:
        logits = compute_logits(chain.model, torch.randn(BATCH, *chain.image_shape))
        (logits * torch.randn_like(logits)).sum().backward()
    finally:
        chain.model.eval()
    for name, buffer in chain.model.named_buffers():
        buffer.copy_(running[name])
    reached = {n for n, p in chain.model.named_parameters() if p.grad is not None}
    chain.model.zero_grad(set_to_none=True)
    return reached


def _check_training(chain: Chain, cut: Cut, expected: set[str]) -> list[str]:
    """One backward in train mode behind `cut`; upstream's random parts (drop path, ...) are then on."""
    chain.model.requires_grad_(True)
    pixels = torch.randn(BATCH, *chain.image_shape, generator=torch.Generator().manual_seed(3))
    activation = chain.run_prefix([cut], pixels)[0]
    kept = activation.clone()
    try:
        with chain.part(start=cut) as suffix:
            suffix.train()
            logits = suffix(activation)
            (logits * torch.randn_like(logits)).sum().backward()
    except Exception as error:  # noqa: BLE001 - any: it becomes a row of the table
        return [f"train mode at {cut.name}: {type(error).__name__}: {str(error)[:200]}"]
    finally:
        chain.model.eval()
    reached = {n for n, p in chain.model.named_parameters() if p.grad is not None}
    found = []
    if reached - expected:
        found.append(f"train mode at {cut.name} reaches too much: {', '.join(sorted(reached - expected)[:3])}")
    if expected - reached:
        found.append(f"train mode at {cut.name} misses: {', '.join(sorted(expected - reached)[:3])}")
    if not torch.equal(activation, kept):
        found.append("the activation at the cut was written to")
    return found


def _check_blocks(chain: Chain) -> tuple[int, list[str]]:
    """(number of blocks, those at whose end there is no cut, each with where it lies)."""
    try:
        seen = trace(chain.model, chain.image_shape)
    except ValueError:
        return 0, []
    cut_nodes = set()
    for cut in chain.cuts:
        call = next(c for c in seen.calls if (c.module, c.index) == (cut.site.module, cut.site.index))
        cut_nodes.add((call.outputs if cut.site.side == "after" else call.inputs)[cut.site.leaf].node)
    names = [layer.name for layer in chain.layers]
    position = {node: i for i, node in enumerate(seen.spine)}
    ends = sorted(position[n] for n in cut_nodes if n is not None)
    blocks = _blocks(chain.model, seen)
    missed = []
    for call, end in blocks:
        if seen.spine[end] in cut_nodes:
            continue
        inside = next((n for n in names if call.module.startswith(n + ".")), None)
        place = sum(e < end for e in ends)
        if inside is not None:
            where = f"inside {inside}"
        elif place == 0:
            where = "in the stem"
        elif place >= len(ends) - (chain.features is not None):
            where = "in the head"
        else:
            where = f"before {names[place]}" if place < len(names) else "at the end"
        missed.append(f"{call.module} ({where})")
    return len(blocks), missed


def _blocks(model: nn.Module, seen: Trace) -> list[tuple[Call, int]]:
    modules = dict(model.named_modules())
    contained = {
        id(child)
        for module in modules.values()
        if isinstance(module, nn.Sequential | nn.ModuleList)
        for child in module.children()
    }
    position = {node: i for i, node in enumerate(seen.spine)}
    times = Counter(call.module for call in seen.calls)
    found: list[tuple[Call, int]] = []
    for call in seen.calls:
        module = modules[call.module]
        weights = sum(p.ndim >= 2 for p in module.parameters())
        if id(module) not in contained or times[call.module] > 1 or weights < 2:
            continue
        start = [position[i.node] for i in call.inputs if i.node in position]
        end = [position[o.node] for o in call.outputs if o.node in position]
        if start and end and max(end) > max(start):
            found.append((call, max(end)))
    outer = {id(a) for call, _ in found for a in call.ancestors()}
    return [(call, end) for call, end in found if id(call) not in outer]


# --- running and telling ------------------------------------------------------------------------------------------------


def _run_apart(check: Callable[[], Iterator[dict[str, Any]]]) -> dict[str, Any]:
    """The row of one family, from a process of its own: neither a crash nor a hang stops the others."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_work, args=(check, theirs))
    process.start()
    theirs.close()
    row: dict[str, Any] = {"error": "its process died"}
    try:
        while ours.poll(TIMEOUT_S):
            row = ours.recv()  # the last one counts
        row = {**row, "error": f"no end after {TIMEOUT_S} s"}
    except EOFError:
        pass
    process.kill()
    process.join()
    return row


def _work(check: Callable[[], Iterator[dict[str, Any]]], pipe: Connection) -> None:
    try:
        for row in check():
            pipe.send(row)
    except (NotAnImageNetworkError, NotImplementedError) as error:
        pipe.send({"skipped": str(error)})
    except Exception as error:  # noqa: BLE001 - any: it becomes a row of the table
        traceback.print_exc(file=sys.stderr)
        pipe.send({"error": f"{type(error).__name__}: {str(error)[:500]}"})


def _is_covered(row: dict[str, Any]) -> bool:
    """Whether the network has layers of its own between stem and head, and all checks held."""
    interior = row.get("num_layers", 0) > 0
    return interior and not row["failures"] and not any("no verified cut" in n for n in row["notes"])


def _progress(row: dict[str, Any]) -> str:
    if row["library"] == HEADLESS:
        failures = row.get("error") or row.get("skipped") or row["failures"] or row["refused"] or ""
        return f"{'ok  ' if is_covered(row) else 'FAIL'} {row['family']}: {row.get('class', '')} {failures}"
    if "skipped" in row:
        return f"skip {row['library']} {row['family']}: {row['skipped']}"
    if "error" in row:
        return f"ERROR {row['library']} {row['family']}: {row['error']}"
    missed = f" missed {row['missed_blocks']}" if row["missed_blocks"] else ""
    ends = " ... ".join(row["layers"][:: max(1, len(row["layers"]) - 1)][:2])
    return (
        f"{'ok  ' if _is_covered(row) else 'WEAK'} {row['library']} {row['family']} {row['architecture']} {row['image_px']} px "
        f"{row['num_parameters'] / 1e6:.1f} M: {row['num_layers']} layers ({ends}), {row['num_cuts']} cuts, "
        f"{row['num_blocks'] - len(row['missed_blocks'])}/{row['num_blocks']} blocks, head {' + '.join(row['head'])} "
        f"{row['features']}, {row['seconds']} s{missed} {row['notes'] or ''} {row['failures'] or ''}"
    )


def _totals(rows: list[dict[str, Any]]) -> str:
    lines = []
    for library in ("timm", "transformers"):
        own = [r for r in rows if r["library"] == library and "skipped" not in r]
        good = [r for r in own if "error" not in r]
        blocks = sum(r["num_blocks"] for r in good)
        missed = sum(len(r["missed_blocks"]) for r in good)
        whole = sum(r["num_blocks"] > 0 and not r["missed_blocks"] for r in good)
        lines.append(
            f"{library}: {sum(map(_is_covered, good))} of {len(own)} families are cut between their layers, exactly "
            f"({sum(r['num_cuts'] for r in good)} cuts); {blocks - missed} of {blocks} independently found blocks end at a "
            f"cut, in {whole} of {sum(r['num_blocks'] > 0 for r in good)} families all of them; "
            f"{sum(bool(r['head']) for r in good)} families with a linear head"
        )
    return "\n".join(lines)


def _write_docs(rows: list[dict[str, Any]]) -> None:
    """Writes the tables of `rows` into docs/coverage.md, and keeps the other tables."""
    file = DOCS / "coverage.md"
    heading = format_section([])[0]
    main, _, rest = file.read_text().partition(heading)
    section = heading + rest if rest else ""
    headless = [row for row in rows if row["library"] == HEADLESS]
    if len(headless) < len(rows):
        main = _markdown([row for row in rows if row["library"] != HEADLESS]) + "\n"
    if headless:
        section = "\n".join(format_section(headless))
    file.write_text(f"{main.rstrip()}\n\n{section}".rstrip() + "\n")


def _markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/coverage.md: totals, then a line a family."""
    versions = (
        f"torch {torch.__version__.partition('+')[0]}, timm {timm.__version__}, transformers {transformers.__version__}"
    )
    lines = [
        "# Coverage",
        "",
        "Every timm and transformers family, built small with random weights, chained, cut and checked by",
        f"`python benchmarks/coverage.py` ({versions}; CPU). The script's header says what is checked. A block is found there",
        "by a rule of its own, and counts where the chain has a cut at its end.",
        "",
        *(f"- {line}" for line in _totals(rows).splitlines()),
        "",
        "| library | family | smallest member | layers | first ... last | cuts | blocks | features | note |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "skipped" in row or "error" in row:
            note = row.get("skipped") or f"not checked: {row['error']}"
            lines.append(f"| {row['library']} | {row['family']} | | | | | | | {note} |")
            continue
        ends = " ... ".join(row["layers"][:: max(1, len(row["layers"]) - 1)][:2])
        blocks = f"{row['num_blocks'] - len(row['missed_blocks'])}/{row['num_blocks']}"
        features = "x".join(map(str, row["features"])) if row["features"] else ""
        note = "; ".join([*row["notes"], *row["failures"]]).replace("|", "/")
        lines.append(
            f"| {row['library']} | {row['family']} | {row['architecture']} | {row['num_layers']} | {ends} | "
            f"{row['num_cuts']} | {blocks} | {features} | {note} |"
        )
    lines += [
        "",
        "## Blocks that end at no cut",
        "",
        "A downsampling belongs to the layer after it, a small block to the layer around it, what comes before the first",
        "repeated block to the stem; and no cut may split a shared parameter.",
        "",
    ]
    lines += [f"- {r['family']}: {', '.join(r['missed_blocks'])}" for r in rows if r.get("missed_blocks")]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
