"""Compute the features that the head of a model reads, or the activations at any cut (--at), of image files, of all
images in folders, or of a data set. Write them to FILE.parquet, or to FILE.npy with the names in FILE.csv, or print the images
that are most similar to those of --query, by the cosine of the features. The model may have no classifier. What was computed
is stored in the cache, so the next query needs no pass over the images.
"""

import argparse
import json
from pathlib import Path

from hf_transfer.commands.command import Command
from hf_transfer.commands.shared_flags import add_json, add_trust, read_given
from hf_transfer.config import ComputeConfig, DataConfig
from hf_transfer.flags import add_settings
from hf_transfer.settings import list_settings, replace_settings
from hf_transfer.startup import fast_imports

EMBEDDED_DATA = (  # settings of the data set that `embed` takes
    "image_column", "image_root", "label_column", "label_columns", "split_column", "where", "on_bad_image",
)  # fmt: skip


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hub id[@revision], or folder of the model or of its run")
    text = "image files, folders of image files, or one data set: a table, an archive or a Hub id"
    parser.add_argument("images", nargs="+", help=text)
    parser.add_argument("--output", metavar="FILE", help="file for the embeddings: FILE.parquet or FILE.npy")
    parser.add_argument(
        "--query", nargs="+", metavar="IMAGE", help="print the images most similar to these image files"
    )
    parser.add_argument("--top", type=int, default=10, help="number of images to print per query (default: 10)")
    text = "cut, as `inspect` names them (default: features, which the head reads)"
    parser.add_argument("--at", metavar="LAYER", help=text)
    text = "of the activation at --at: the mean over the positions of the image, or all of it (default: mean)"
    parser.add_argument("--pool", choices=("mean", "none"), help=text)
    data, compute = list_settings(DataConfig()), list_settings(ComputeConfig())
    add_settings(parser, [data[name] for name in EMBEDDED_DATA])
    add_settings(parser, [compute[name] for name in ("batch_size", "num_workers", "engine", "cache")])
    add_json(parser)
    add_trust(parser)


def _run(given: argparse.Namespace) -> str:
    with fast_imports():
        from hf_transfer.embeddings import EmbedOptions, check_options, embed_images, format_embedded

    options = EmbedOptions(
        model=given.model,
        images=given.images,
        output=None if given.output is None else Path(given.output).expanduser(),
        query=given.query or (),
        top=given.top,
        at=given.at,
        pool=given.pool,
        data=replace_settings(DataConfig(), read_given(given, DataConfig())),
        compute=replace_settings(ComputeConfig(), read_given(given, ComputeConfig())),
        trust_remote_code=given.trust_remote_code,
    )
    check_options(options)
    result = embed_images(options)
    return json.dumps(result.to_dict(), indent=1) if given.json else format_embedded(result)


COMMAND = Command(
    summary="write the features of images, or find similar images",
    description=__doc__,
    add_flags=_add_flags,
    run=_run,
)
