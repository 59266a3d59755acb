"""The command line: a verb, its file, `key=value` overrides, few flags; what the verbs do is in `verbs.py`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import coupalign
from coupalign.cli import verbs
from coupalign.errors import ExitStatus, InputError, RunError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0, 1 (the answer is no), 2 (the input is wrong), 75 (stopped, can go on)."""
    options = _parse(arguments)
    logging.basicConfig(
        level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    for noisy in ("httpx", "urllib3", "botocore", "aiobotocore", "alembic", "mlflow.store"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        result = options.run(options)
    except InputError as error:
        print(f"coupalign: error: {error}", file=sys.stderr)
        return ExitStatus.INPUT_ERROR
    except RunError as error:
        print(f"coupalign: the run failed: {error}", file=sys.stderr)
        return ExitStatus.RUN_FAILED
    except BrokenPipeError:
        return 1
    status, value = result if isinstance(result, tuple) else (0, result)
    if options.json and value is not None:
        print(json.dumps(value, ensure_ascii=False), flush=True)
    return status


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse takes positional words only where they stand together; overrides may stand anywhere."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not (
        hasattr(options, "overrides")
        and all("=" in word and not word.startswith("-") for word in rest)
    ):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="coupalign",
        description="Referring image segmentation: data to shards, training, scores.",
    )
    parser.add_argument("--version", action="version", version=f"coupalign {coupalign.__version__}")
    kinds = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def verb(
        name: str, run: Callable[[argparse.Namespace], Any], summary: str
    ) -> argparse.ArgumentParser:
        made = kinds.add_parser(name, help=summary, description=summary)
        made.add_argument(
            "--json", action="store_true", help="print one JSON object as the last line"
        )
        made.add_argument(
            "--local_rank", type=int, help=argparse.SUPPRESS
        )  # the deepspeed launcher adds it
        made.set_defaults(run=run)
        return made

    _add_data_verbs(verb)
    _add_model_verbs(verb)
    _add_bench_verb(verb)
    made = verb(
        "doctor",
        verbs.doctor,
        "what this machine and this installation can do; --distributed: what a job on all its ranks can do",
    )
    made.add_argument(
        "--distributed",
        type=Path,
        nargs="?",
        const=Path("runs"),
        metavar="RUN_DIR",
        help="started by a launcher on all ranks: do they meet, share RUN_DIR (runs), agree on clock and versions, how fast",
    )
    return parser


def _file_and_overrides(
    made: argparse.ArgumentParser,
    name: str = "config",
    text: str = "YAML file, see configs/",
    optional: bool = False,
) -> None:
    made.add_argument(name, type=Path, help=text, nargs="?" if optional else None)
    made.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes of the file, by dotted key"
    )


_BENCHES = {
    "step": "CONFIG: samples per second, and where a training step's time and memory go",
    "loader": "CONFIG: what one core reads, beside what its photographs cost to decode",
    "eval": "CONFIG: what scoring costs",
    "startup": "CONFIG: seconds to the first step",
    "kernel": "time and bytes of word-pixel alignment, beside every other way to write it",
    "registers": "each kernel compiled for each GPU, none is needed",
    "traffic": "CONFIG: bytes and FLOPs of a training step by part",
    "order": "1e8 samples in order for 1,024 ranks, simulated; half a minute of one core, 2 GB",
}


def _add_bench_verb(verb: Callable[..., argparse.ArgumentParser]) -> None:
    made = verb(
        "bench",
        verbs.bench,
        "measure: a training step, the loader, scoring, the start, the kernels, traffic, the data order",
    )
    made.add_argument(
        "what",
        choices=tuple(_BENCHES),
        help="; ".join(f"{name} {text}" for name, text in _BENCHES.items()),
    )
    _file_and_overrides(
        made, "config", "YAML file, for step, loader, eval, startup and traffic", optional=True
    )
    made.add_argument(
        "--batch",
        type=int,
        action="append",
        help="images; kernel: may be given again, default 8 and 32 (2 on a CPU); "
        "traffic: default 32",
    )
    made.add_argument(
        "--steps", type=int, default=20, help="step, loader, eval: how many are timed"
    )
    made.add_argument(
        "--warmup", type=int, default=5, help="step, loader, eval: how many go before"
    )
    made.add_argument(
        "--random-data",
        action="store_true",
        help="step: random samples; data.train need not be there",
    )
    made.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="step: write the profiler's trace of three steps, for ui.perfetto.dev",
    )
    made.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="step: measure it in turn with the same configuration, changed like this; may be given again",
    )
    made.add_argument(
        "--soak",
        type=int,
        default=0,
        metavar="SAMPLES",
        help="loader: weigh the worker processes while they read so many",
    )
    made.add_argument(
        "--out", type=Path, help="step, loader, eval, startup: write the result as JSON"
    )
    made.add_argument(
        "--against",
        type=Path,
        metavar="FILE",
        help="step, loader, eval, startup: print ratios to an earlier --out of the same machine",
    )


def _add_data_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    made = verb(
        "synth", verbs.synth, "generate RefShapes: scenes and sentences in the layout of RefCOCO"
    )
    made.add_argument("out", type=Path)
    made.add_argument("--images", type=int, default=6000)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument(
        "--level",
        choices=("easy", "hard"),
        default="easy",
        help="easy: color, shape, size, place; hard: relations, order",
    )
    made.add_argument("--size", type=int, default=96, help="side of the pictures, pixels")
    made.add_argument("--workers", type=int, default=2)

    made = verb("pack", verbs.pack, "annotations and images -> WebDataset shards with an index")
    _file_and_overrides(made, "recipe", "YAML file, see shards/recipes/")
    made.add_argument("--out", type=Path, help="shard directory; wins over the recipe's")
    made.add_argument("--workers", type=int, default=4)
    made.add_argument(
        "--overwrite", action="store_true", help="replace a shard set of other content"
    )
    made.add_argument(
        "--dry-run",
        action="store_true",
        help="read annotations, report counts and missing images, write nothing",
    )

    made = verb(
        "verify", verbs.verify, "prove shard directories whole: sizes, sha256, every sample, counts"
    )
    made.add_argument("directories", type=Path, nargs="+", metavar="directory")
    made.add_argument(
        "--leaks",
        action="store_true",
        help="instead, count the photographs that their splits share: what may be trained "
        "on when what is scored",
    )


def _add_model_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    _file_and_overrides(
        verb("describe", verbs.describe, "parameters and FLOPs by part, shapes at each stage")
    )
    made = verb(
        "plan",
        verbs.plan,
        "what a training will need: memory by engine, bytes on the wire, the micro-batch; no GPU is asked",
    )
    _file_and_overrides(made)
    made.add_argument(
        "--gpu",
        default="h100",
        choices=("a100-40", "a100-80", "h100", "h200", "rtx4090", "rtx3090", "v100-32"),
    )
    made.add_argument("--nodes", type=int, default=1)
    made.add_argument("--ranks-per-node", type=int, default=8, help="GPUs of a node")
    made.add_argument(
        "--network",
        type=float,
        default=50.0,
        metavar="GB/s",
        help="in one direction between nodes, all adapters of a node together; default 50, one of 400 Gb/s",
    )
    made = verb("config", verbs.config, "print the whole configuration, defaults included")
    _file_and_overrides(made)
    made.add_argument(
        "--deepspeed", action="store_true", help="print the dictionary that DeepSpeed is given"
    )
    made.add_argument(
        "--ranks", type=int, default=1, help="number of processes that the dictionary is for"
    )

    _file_and_overrides(verb("train", verbs.train, "train a model, or go on where the run stopped"))

    made = verb("eval", verbs.evaluate, "score a trained model")
    _file_and_overrides(made, "run_path", "run directory (its best checkpoint) or a checkpoint")
    made.add_argument(
        "--split",
        action="append",
        help="split to score; may be given again; default: those of the config",
    )
    made.add_argument("--index", help="another shard directory to take the splits from")
    made.add_argument(
        "--protocol", choices=("ris-v1", "lavt", "cris", "all"), help="default: that of the config"
    )
    made.add_argument(
        "--sentences",
        choices=("each", "first", "concatenated", "all"),
        default="each",
        help="samples: each sentence of a ref (default), its first, or all of them joined as one text",
    )
    made.add_argument(
        "--language-blind",
        action="store_true",
        help="score again with the sentences shuffled among the samples",
    )
    made.add_argument(
        "--pictures",
        type=int,
        default=0,
        help="keep pictures: so many best, median, worst and random samples",
    )

    made = verb(
        "compare",
        verbs.compare,
        "two scored runs on the same samples: differences with intervals, and the samples that make them",
    )
    made.add_argument("run_a", help="run directory, or id or name of an MLflow run")
    made.add_argument("run_b", help="the same, of the run that may be better")
    made.add_argument("--split", default="val", help="default: val")
    made.add_argument(
        "--protocol", choices=("ris-v1", "lavt", "cris"), default="ris-v1", help="default: ris-v1"
    )
    made.add_argument(
        "--tracking-uri",
        help="MLflow server; default: MLFLOW_TRACKING_URI, else sqlite:///runs/mlflow.db",
    )

    made = verb("predict", verbs.predict, "segment what a sentence refers to")
    made.add_argument("checkpoint", type=Path, help="run directory or checkpoint")
    made.add_argument(
        "image",
        type=Path,
        help="image file, a folder of images, or a .csv or .jsonl file of image,sentence pairs",
    )
    made.add_argument("sentence", nargs="?", help="left out for a file of pairs")
    made.add_argument(
        "--out",
        type=Path,
        default=Path("predictions"),
        help="folder for masks, overlays and results.jsonl",
    )
    made.add_argument(
        "--batch", type=int, default=16, help="images that the model sees at a time; default 16"
    )
    made.add_argument("--device", help="cpu, cuda …; default: the GPU where there is one")

    made = verb(
        "reproduce",
        verbs.reproduce,
        "bring about the runs of a table of the paper, and print it beside ours",
    )
    made.add_argument(
        "table",
        help="table1, table2, table3, main, methods, additions, decoder (configs/tables/), or a YAML "
        "file of that kind",
    )
    made.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes of every run's configuration"
    )
    made.add_argument(
        "--data",
        choices=("real", "refshapes"),
        default="real",
        help="refshapes: the generated data, made where needed",
    )
    made.add_argument(
        "--scale",
        choices=("small", "tiny"),
        default="small",
        help="of refshapes: small takes minutes a run, tiny proves the path",
    )
    made.add_argument(
        "--seeds", type=int, default=1, help="runs of each row; a claim needs three or more"
    )
    made.add_argument("--jobs", type=int, default=1, help="runs at a time on this machine")
    made.add_argument(
        "--launcher",
        help="what starts a verb on all ranks, such as launch/deepspeed.sh; default: one process",
    )
    made.add_argument(
        "--slurm",
        metavar="OPTIONS",
        help="hand the runs to Slurm as arrays, with these options of sbatch, and return",
    )
    made.add_argument(
        "--only-print",
        action="store_true",
        help="start nothing: the table of the runs that there are",
    )

    verb(
        "report", verbs.report, "write the HTML page of a run: scores, curves, pictures"
    ).add_argument("run_path", type=Path)
    verb("track", verbs.track, "send what an MLflow server has not received yet").add_argument(
        "run_path", type=Path
    )
