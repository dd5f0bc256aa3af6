"""The command `hf-transfer embed`: embeds images, writes the embeddings, and finds images that are similar to others."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_transfer.config import ComputeConfig, DataConfig, ModelConfig
from hf_transfer.data.dataset import choose_columns
from hf_transfer.data.every_image import is_data_set, load_every_split, load_files
from hf_transfer.data.splits import Split
from hf_transfer.errors import count_noun, make_printable
from hf_transfer.inference.embed import Embedded, Pool, embed
from hf_transfer.inference.neighbors import find_nearest
from hf_transfer.inference.predict import find_images
from hf_transfer.network.backbone import Backbone
from hf_transfer.network.chain import FEATURES
from hf_transfer.network.peft_checkpoints import load_for_inspection
from hf_transfer.processes import run_on_main
from hf_transfer.reporting.embeddings import check_output, read_blocks, write_embeddings


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """What `embed_images` embeds, and what it does with the embeddings."""

    model: str  # Hub id, or folder of a model or of a run
    images: Sequence[str]  # image files and folders, or one data set
    output: Path | None = None
    query: Sequence[str] = ()  # image files
    top: int = 10
    at: str | None = None  # None: the features that the head reads
    pool: Pool | None = None  # None: mean
    data: DataConfig = field(default=DataConfig())
    compute: ComputeConfig = ComputeConfig()
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class Match:
    """An image that is similar to a query."""

    image: str
    cosine: float


@dataclass(frozen=True, kw_only=True)
class EmbeddedImages:
    """The result of `embed_images`."""

    at: str
    shape: tuple[int, ...]  # of one embedding
    num_images: int
    images_per_s: float | None  # None: all embeddings were in the cache
    output: str | None
    matches: dict[str, tuple[Match, ...]]  # by query, the most similar image first

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as JSON values."""
        matches = {q: [{"image": m.image, "cosine": m.cosine} for m in found] for q, found in self.matches.items()}
        return {
            "at": self.at,
            "shape": list(self.shape),
            "num_images": self.num_images,
            "images_per_s": self.images_per_s,
            "output": self.output,
            "queries": matches,
        }


def check_options(options: EmbedOptions) -> None:
    """Raises ValueError, before anything is loaded, if options are missing or contradict each other."""
    if options.output is None and not options.query:
        raise ValueError("nothing to do with the embeddings: give --output FILE.parquet (or .npy), or --query IMAGE")
    if options.top < 1:
        raise ValueError(f"top={options.top}: choose 1 or more images per query")
    if options.pool is not None and options.at in (None, FEATURES):
        raise ValueError(
            f"pool={options.pool!r}: the features of the head are one vector; give --at too, or omit --pool"
        )
    if options.output is not None:
        check_output(options.output)
    for image in options.query:
        if not Path(image).expanduser().is_file():
            raise ValueError(f"query={image!r}: no such file; give image files")


def embed_images(options: EmbedOptions) -> EmbeddedImages:
    """Embeds the images, writes the embeddings if `output` is given, and finds the images that are most similar to each query.

    Raises ValueError if the images, the model or the cut are not found, and BadImageError for an unreadable image.
    """
    splits, names = _load_images(options)
    backbone = load_for_inspection(ModelConfig(checkpoint=options.model, trust_remote_code=options.trust_remote_code))
    embedded = {name: _embed(backbone, split, options) for name, split in splits.items()}
    first = next(iter(embedded.values()))
    shape = first.store.shape[1:]
    if options.output is not None:
        description = {
            "model": backbone.source.name,
            "at": options.at or FEATURES,
            "pool": None if options.at in (None, FEATURES) else options.pool or "mean",
            "shape": list(shape),
        }
        output = options.output
        run_on_main(lambda: write_embeddings(output, embedded, description))
    computed, seconds = (sum(getattr(e, name) for e in embedded.values()) for name in ("computed", "seconds"))
    return EmbeddedImages(
        at=options.at or FEATURES,
        shape=shape,
        num_images=sum(len(split) for split in splits.values()),
        images_per_s=computed / seconds if computed else None,
        output=None if options.output is None else str(options.output),
        matches=_search(backbone, embedded, names, options) if options.query else {},
    )


def format_embedded(result: EmbeddedImages) -> str:
    """Returns the lines that `hf-transfer embed` prints."""
    size = " x ".join(map(str, result.shape))
    speed = "found in the cache" if result.images_per_s is None else f"{result.images_per_s:.0f} images/s"
    written = f"; wrote {result.output}" if result.output else ""
    lines = [f"{count_noun(result.num_images, 'image')}, {size} numbers each ({result.at}), {speed}{written}"]
    for query, found in result.matches.items():
        lines += ["", f"{make_printable(query)}:"]
        lines += [f"{match.cosine:8.4f}  {make_printable(match.image)}" for match in found]
    return "\n".join(lines)


def _load_images(options: EmbedOptions) -> tuple[dict[str, Split], list[str]]:
    """Returns the splits by stored name (image files: one split, without a name), and the names of all images, to print."""
    if is_data_set(options.images):
        splits = load_every_split(replace(options.data, dataset=options.images[0]))
    else:
        choose_columns(options.data).refuse("a list of image files")
        files = find_images([Path(image).expanduser() for image in options.images])
        splits = {"": load_files(files, on_bad_image=options.data.on_bad_image)}
    return splits, [split.image_name(i) for split in splits.values() for i in range(len(split))]


def _embed(backbone: Backbone, images: Split, options: EmbedOptions) -> Embedded:
    return embed(backbone, images, at=options.at or FEATURES, pool=options.pool or "mean", compute=options.compute)


def _search(
    backbone: Backbone, embedded: dict[str, Embedded], names: list[str], options: EmbedOptions
) -> dict[str, tuple[Match, ...]]:
    """Returns the images that are most similar to each query."""
    files = [Path(image).expanduser() for image in options.query]
    cache = options.compute.cache if options.compute.cache == "none" else "memory"
    few = replace(options.compute, cache=cache, engine="eager")  # few images are not worth more
    queries = _embed(backbone, load_files(files), replace(options, compute=few)).store[:]
    neighbors = find_nearest(queries.reshape(len(queries), -1), _read_rows(embedded), options.top)
    return {
        query: tuple(Match(image=names[i], cosine=float(c)) for i, c in zip(indices, cosines, strict=True))
        for query, indices, cosines in zip(options.query, neighbors.indices, neighbors.cosines, strict=True)
    }


def _read_rows(embedded: dict[str, Embedded]) -> Iterator[NDArray[np.float32]]:
    for each in embedded.values():
        for _, values in read_blocks(each):
            yield values.reshape(len(values), -1)
