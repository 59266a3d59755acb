"""The verbs that make and check data: synth, pack, verify."""

from __future__ import annotations

import argparse
from pathlib import Path

from coupalign.cli.options import Answer, add_file_and_overrides, add_verb, ok_or_no
from coupalign.errors import InputError


def add_synth(verbs: argparse._SubParsersAction) -> None:
    parser = add_verb(
        verbs,
        "synth",
        run_synth,
        "generate RefShapes: drawn scenes and sentences in the layout of RefCOCO",
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--images", type=int, default=6000, help="number of images; default 6000")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument(
        "--level",
        choices=("easy", "hard"),
        default="easy",
        help="easy (default): color, shape, size and place; hard: relations and order as well",
    )
    parser.add_argument(
        "--size", type=int, default=96, help="side of an image, in pixels; default 96"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes; default 2")


def run_synth(options: argparse.Namespace) -> Answer:
    from coupalign.data.refshapes.generate import synth

    report = synth(
        options.out,
        options.images,
        options.seed,
        level=options.level,
        size=options.size,
        workers=options.workers,
    )
    print(report.table())
    return Answer(report.to_json())


def add_pack(verbs: argparse._SubParsersAction) -> None:
    parser = add_verb(
        verbs, "pack", run_pack, "pack annotations and images into WebDataset shards with an index"
    )
    add_file_and_overrides(parser, "recipe", "YAML file, see shards/recipes/")
    parser.add_argument("--out", type=Path, help="shard directory; overrides the recipe's `out`")
    parser.add_argument("--workers", type=int, default=4, help="processes; default 4")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace existing shards of other content"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="read the annotations and report counts and missing images; write nothing",
    )


def run_pack(options: argparse.Namespace) -> Answer:
    from coupalign.data.packing.pack import inspect, pack
    from coupalign.data.packing.recipe import read_recipe

    recipe = read_recipe(options.recipe, options.overrides)

    # Read everything, write nothing.
    if options.dry_run:
        report = inspect(recipe)
        print(report.table())
        is_complete = not report.missing_images and not report.missing_annotations
        return Answer(report.to_json(), ok_or_no(is_complete))

    out = options.out or recipe.out
    if out is None:
        raise InputError(
            f"{options.recipe}: `out` is empty. Set it to the folder for the shards, or use --out"
        )
    report = pack(recipe, out, options.workers, overwrite=options.overwrite)
    print(report.table())
    return Answer(report.to_json())


def add_verify(verbs: argparse._SubParsersAction) -> None:
    parser = add_verb(
        verbs,
        "verify",
        run_verify,
        "check that shard directories are intact: sizes, sha256, every sample, counts",
    )
    parser.add_argument(
        "directories",
        nargs="+",
        metavar="directory",
        help="shard directory; with --leaks also an address, http(s):// or s3://",
    )
    parser.add_argument(
        "--leaks",
        action="store_true",
        help="instead, count the photographs that their splits share: which splits you may train "
        "on when you score which",
    )


def run_verify(options: argparse.Namespace) -> Answer:
    if options.leaks:
        return _count_leaks(options)
    from coupalign.addresses import hide_secret
    from coupalign.data.packing.verify import verify
    from coupalign.data.shards import is_remote

    for directory in options.directories:
        if is_remote(directory):
            raise InputError(
                f"{hide_secret(directory)}: verify reads every byte, so the shards must be on this "
                "machine. Copy them, or use --leaks, which needs the index only"
            )
    reports = [verify(directory.removeprefix("file://")) for directory in options.directories]
    print("\n\n".join(report.table() for report in reports))

    # One directory answers with an object, several with a list of them.
    values = [report.to_json() for report in reports]
    value = values[0] if len(values) == 1 else values
    return Answer(value, ok_or_no(all(report.ok for report in reports)))


def _count_leaks(options: argparse.Namespace) -> Answer:
    from coupalign.data.leak import count_overlaps
    from coupalign.data.shards import open_index

    overlaps = count_overlaps([open_index(directory) for directory in options.directories])
    print(overlaps.table())
    return Answer(overlaps.to_json())
