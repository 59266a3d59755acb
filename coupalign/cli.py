"""The command line: a verb, its file, `key=value` overrides, few flags. Imports are lazy, so that --help is quick."""
from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import coupalign
from coupalign.errors import InputError

STOPPED = 75      # EX_TEMPFAIL: asked to stop, can go on; slurm/job.sh puts the job back into the queue


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0, 1 (the answer is no), 2 (the input is wrong), 75 (stopped, can go on)."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for noisy in ("httpx", "urllib3", "botocore", "aiobotocore", "alembic", "mlflow.store"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        result = options.run(options)
    except InputError as error:
        print(f"coupalign: error: {error}", file=sys.stderr)
        return 2
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
    if rest and not (hasattr(options, "overrides") and all("=" in word and not word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="coupalign", description="Referring image segmentation: data to shards, training, scores.")
    parser.add_argument("--version", action="version", version=f"coupalign {coupalign.__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def verb(name: str, run: Callable[[argparse.Namespace], Any], summary: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=summary, description=summary)
        made.add_argument("--json", action="store_true", help="print one JSON object as the last line")
        made.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)       # the deepspeed launcher adds it
        made.set_defaults(run=run)
        return made

    _add_data_verbs(verb)
    _add_model_verbs(verb)
    made = verb("bench", _bench, "measure: the alignment kernels, what they ask of a GPU, the memory traffic of a step, or the data order")
    made.add_argument("what", choices=("kernel", "registers", "traffic", "order"),
                      help="kernel: time and bytes of word-pixel alignment, beside every other way to write it; registers: each kernel "
                           "compiled for each GPU, none is needed; traffic CONFIG: bytes and FLOPs of a training step by part; "
                           "order: 1e8 samples in order for 1,024 ranks, simulated; half a minute of one core, 2 GB")
    _file_and_overrides(made, "config", "YAML file, for traffic", optional=True)
    made.add_argument("--batch", type=int, action="append", help="images; kernel: may be given again, default 8 and 32 (2 on a CPU); "
                                                                  "traffic: default 32")
    made = verb("doctor", _doctor, "what this machine and this installation can do; --distributed: what a job on all its ranks can do")
    made.add_argument("--distributed", type=Path, nargs="?", const=Path("runs"), metavar="RUN_DIR",
                      help="started by a launcher on all ranks: do they meet, share RUN_DIR (runs), agree on clock and versions, how fast")
    return parser


def _file_and_overrides(made: argparse.ArgumentParser, name: str = "config", text: str = "YAML file, see configs/",
                        optional: bool = False) -> None:
    made.add_argument(name, type=Path, help=text, nargs="?" if optional else None)
    made.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the file, by dotted key")


def _add_data_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    made = verb("synth", _synth, "generate RefShapes: scenes and sentences in the layout of RefCOCO")
    made.add_argument("out", type=Path)
    made.add_argument("--images", type=int, default=6000)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--level", choices=("easy", "hard"), default="easy", help="easy: color, shape, size, place; hard: relations, order")
    made.add_argument("--size", type=int, default=96, help="side of the pictures, pixels")
    made.add_argument("--workers", type=int, default=2)

    made = verb("pack", _pack, "annotations and images -> WebDataset shards with an index")
    _file_and_overrides(made, "recipe", "YAML file, see shards/recipes/")
    made.add_argument("--out", type=Path, help="shard directory; wins over the recipe's")
    made.add_argument("--workers", type=int, default=4)
    made.add_argument("--overwrite", action="store_true", help="replace a shard set of other content")
    made.add_argument("--dry-run", action="store_true", help="read annotations, report counts and missing images, write nothing")

    made = verb("verify", _verify, "prove shard directories whole: sizes, sha256, every sample, counts")
    made.add_argument("directories", type=Path, nargs="+", metavar="directory")
    made.add_argument("--leaks", action="store_true", help="instead, count the photographs that their splits share: what may be trained "
                                                           "on when what is scored")


def _add_model_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    _file_and_overrides(verb("describe", _describe, "parameters and FLOPs by part, shapes at each stage"))
    made = verb("plan", _plan, "what a training will need: memory by engine, bytes on the wire, the micro-batch; no GPU is asked")
    _file_and_overrides(made)
    made.add_argument("--gpu", default="h100", choices=("a100-40", "a100-80", "h100", "h200", "rtx4090", "rtx3090", "v100-32"))
    made.add_argument("--nodes", type=int, default=1)
    made.add_argument("--ranks-per-node", type=int, default=8, help="GPUs of a node")
    made.add_argument("--network", type=float, default=50.0, metavar="GB/s",
                      help="in one direction between nodes, all adapters of a node together; default 50, one of 400 Gb/s")
    made = verb("config", _config, "print the whole configuration, defaults included")
    _file_and_overrides(made)
    made.add_argument("--deepspeed", action="store_true", help="print the dictionary that DeepSpeed is given")
    made.add_argument("--ranks", type=int, default=1, help="number of processes that the dictionary is for")

    _file_and_overrides(verb("train", _train, "train a model, or go on where the run stopped"))

    made = verb("eval", _eval, "score a trained model")
    _file_and_overrides(made, "run_path", "run directory (its best checkpoint) or a checkpoint")
    made.add_argument("--split", action="append", help="split to score; may be given again; default: those of the config")
    made.add_argument("--index", help="another shard directory to take the splits from")
    made.add_argument("--protocol", choices=("ris-v1", "lavt", "cris", "all"), help="default: that of the config")
    made.add_argument("--sentences", choices=("each", "first", "concatenated", "all"), default="each",
                      help="samples: each sentence of a ref (default), its first, or all of them joined as one text")
    made.add_argument("--language-blind", action="store_true", help="score again with the sentences shuffled among the samples")
    made.add_argument("--pictures", type=int, default=0, help="keep pictures: so many best, median, worst and random samples")

    made = verb("compare", _compare, "two scored runs on the same samples: differences with intervals, and the samples that make them")
    made.add_argument("run_a", help="run directory, or id or name of an MLflow run")
    made.add_argument("run_b", help="the same, of the run that may be better")
    made.add_argument("--split", default="val", help="default: val")
    made.add_argument("--protocol", choices=("ris-v1", "lavt", "cris"), default="ris-v1", help="default: ris-v1")
    made.add_argument("--tracking-uri", help="MLflow server; default: MLFLOW_TRACKING_URI, else sqlite:///runs/mlflow.db")

    made = verb("predict", _predict, "segment what a sentence refers to")
    made.add_argument("checkpoint", type=Path, help="run directory or checkpoint")
    made.add_argument("image", type=Path, help="image file, or a .csv or .jsonl file of image,sentence pairs")
    made.add_argument("sentence", nargs="?", help="left out for a file of pairs")
    made.add_argument("--out", type=Path, default=Path("predictions"), help="folder for masks, overlays and results.jsonl")
    made.add_argument("--batch", type=int, default=16)
    made.add_argument("--device", help="cpu, cuda …; default: the GPU where there is one")

    made = verb("reproduce", _reproduce, "bring about the runs of a table of the paper, and print it beside ours")
    made.add_argument("table", help="table1, table2, table3, main, methods, additions (configs/tables/), or a YAML file of that kind")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="changes of every run's configuration")
    made.add_argument("--data", choices=("real", "refshapes"), default="real", help="refshapes: the generated data, made where needed")
    made.add_argument("--scale", choices=("small", "tiny"), default="small", help="of refshapes: small takes minutes a run, tiny proves "
                                                                                  "the path")
    made.add_argument("--seeds", type=int, default=1, help="runs of each row; a claim needs three or more")
    made.add_argument("--jobs", type=int, default=1, help="runs at a time on this machine")
    made.add_argument("--launcher", help="what starts a verb on all ranks, such as launch/deepspeed.sh; default: one process")
    made.add_argument("--slurm", metavar="OPTIONS", help="hand the runs to Slurm as arrays, with these options of sbatch, and return")
    made.add_argument("--only-print", action="store_true", help="start nothing: the table of the runs that there are")

    verb("report", _report, "write the HTML page of a run: scores, curves, pictures").add_argument("run_path", type=Path)
    verb("track", _track, "send what an MLflow server has not received yet").add_argument("run_path", type=Path)


# ------------------------------------------------------------------------------------------- verbs, one function each


def _synth(options: argparse.Namespace) -> Any:
    from coupalign.data.synthetic import synth

    report = synth(options.out, options.images, options.seed, options.level, options.size, options.workers)
    print(report.table())
    return report.to_json()


def _pack(options: argparse.Namespace) -> Any:
    from coupalign.data.pack import inspect, pack
    from coupalign.data.recipe import read_recipe

    recipe = read_recipe(options.recipe, options.overrides)
    out = options.out or recipe.out
    if options.dry_run:
        report = inspect(recipe)
        print(report.table())
        return (1 if report.missing_images or report.missing_annotations else 0), report.to_json()
    if out is None:
        raise InputError(f"{options.recipe}: `out` is empty: say where the shards go, there or with --out")
    report = pack(recipe, out, options.workers, options.overwrite)
    print(report.table())
    return report.to_json()


def _verify(options: argparse.Namespace) -> Any:
    from coupalign.data.index import verify

    if options.leaks:
        from coupalign.data.leak import overlaps
        from coupalign.data.shards import open_index

        found = overlaps([open_index(str(directory)) for directory in options.directories])
        print(found.table())
        return found.to_json()
    reports = [verify(directory) for directory in options.directories]
    print("\n\n".join(report.table() for report in reports))
    status = 0 if all(report.ok for report in reports) else 1
    return status, reports[0].to_json() if len(reports) == 1 else [report.to_json() for report in reports]


def _describe(options: argparse.Namespace) -> Any:
    from coupalign.config.load import read_config
    from coupalign.describe import describe

    report = describe(read_config(options.config, options.overrides))
    print(report.table())
    return report.to_json()


def _plan(options: argparse.Namespace) -> Any:
    from coupalign.config.load import read_config
    from coupalign.plan import plan

    found = plan(read_config(options.config, options.overrides), options.gpu, options.nodes, options.ranks_per_node, options.network)
    print(found.table())
    return found.to_json()


def _config(options: argparse.Namespace) -> Any:
    from coupalign.config.load import dump, read_config

    config = read_config(options.config, options.overrides)
    if not options.deepspeed:
        print(dump(config), end="")
        return config.model_dump(mode="json")
    if config.engine.kind != "deepspeed":
        raise InputError(f"{options.config}: engine.kind is {config.engine.kind}; add engine.kind=deepspeed")
    from coupalign.engine.zero import deepspeed_config

    derived = deepspeed_config(config, options.ranks)
    if not options.json:
        print(json.dumps(derived, indent=2))
    return derived


def _train(options: argparse.Namespace) -> Any:
    from coupalign.engine.stop import StopRequest

    with StopRequest() as stop:
        from coupalign.config.load import read_config
        from coupalign.training.loop import train

        config = read_config(options.config, options.overrides)
        outcome = train(config, stop)
    status = 0 if outcome.finished else STOPPED
    if not outcome.is_main:
        return status, None
    for name, score in outcome.scores.items():
        print(f"\n{name}\n{score.table()}")
    if outcome.finished and outcome.scores:
        _write_page(config.directory)
    return status, {"run": str(config.directory), "finished": outcome.finished, **outcome.state.to_json(),
                    "scores": {name: score.to_json() for name, score in outcome.scores.items()}}


def _eval(options: argparse.Namespace) -> Any:
    from coupalign.engine.stop import StopRequest

    with StopRequest() as stop:
        from coupalign.engine.restore import find_checkpoint
        from coupalign.evaluation.evaluator import Stopped
        from coupalign.training.rescore import rescore, run_directory

        try:
            scores = rescore(options.run_path, options.overrides, options.split or (), options.index, options.protocol,
                             options.sentences, options.language_blind, options.pictures, stop)
        except Stopped:
            print(f"coupalign: stopped by {stop.name or 'another rank'}; the same command scores anew", file=sys.stderr)
            return STOPPED, None
    values = _print_scores(scores)
    if scores:
        _write_page(run_directory(find_checkpoint(options.run_path)))
    return values or None


def _print_scores(scores: dict[str, dict[tuple[str, str], Any]]) -> dict[str, Any]:
    """Print the scores, side by side where a split has several; as JSON by "<split> <protocol> <sentences>", the shortest that tells."""
    from coupalign.evaluation.metrics import side_by_side

    values: dict[str, Any] = {}
    for split, found in scores.items():
        print(f"\n{split}\n{side_by_side(found) if len(found) > 1 else next(iter(found.values())).table()}")
        several = [len(set(words)) > 1 for words in zip(*found)]
        for key, score in found.items():
            values[" ".join([split, *(word for word, tells in zip(key, several) if tells)])] = score.to_json()
    return values


def _compare(options: argparse.Namespace) -> Any:
    from coupalign.compare import compare

    found = compare(options.run_a, options.run_b, options.split, options.protocol, options.tracking_uri)
    print(f"A  {options.run_a}\nB  {options.run_b}\n{options.split}, {options.protocol}: {found.table()}")
    return {"a": options.run_a, "b": options.run_b, "split": options.split, "protocol": options.protocol, **found.to_json()}


def _predict(options: argparse.Namespace) -> Any:
    from coupalign.predict import Predictor

    predictor = Predictor.from_checkpoint(options.checkpoint, options.device)
    if options.sentence is None and options.image.suffix.lower() not in (".csv", ".jsonl"):
        raise InputError(f"{options.image}: a sentence is expected after an image (a .csv or .jsonl file of pairs needs none)")
    if options.sentence is None:
        results = predictor.predict_file(options.image, options.out, options.batch)
    else:
        results = predictor.predict_to(options.image, options.sentence, options.out)
    if not options.json:
        print(json.dumps(results, ensure_ascii=False, indent=2))
    return results


def _reproduce(options: argparse.Namespace) -> Any:
    import shlex

    from coupalign import reproduce
    from coupalign.config.load import read_config

    if options.seeds < 1 or options.jobs < 1:
        raise InputError("--seeds and --jobs must be at least 1")
    scale = options.scale if options.data == "refshapes" else None
    table = reproduce.read_table(options.table)
    planned = reproduce.plan_runs(table, scale, options.seeds)
    runs = [run for _, of_row in planned for run in of_row]
    name = "-".join(["reproduce", Path(options.table).stem, *([scale] if scale else [])])
    folder = Path("runs") / name
    failed: list[Any] = []
    if options.slurm is not None:
        commands = reproduce.submit(runs, options.overrides, options.slurm, folder)
        print(f"{len(commands)} arrays submitted; when they are done: the same command with --only-print in place of --slurm")
        return {"submitted": [shlex.join(command) for command in commands]}
    if not options.only_print:
        if scale:
            reproduce.make_shapes(scale)
        try:
            outcomes = reproduce.run_all(runs, options.overrides, shlex.split(options.launcher or ""), options.jobs)
        except KeyboardInterrupt:
            return STOPPED, None
        failed = [outcome for outcome in outcomes if outcome.status]
    results = reproduce.collect(planned, table, options.overrides)
    files = reproduce.publish(name, table, results, folder, read_config(runs[0].config, options.overrides), comparable=scale is None)
    print("\n" + (folder / "table.txt").read_text(encoding="utf-8"))
    for outcome in failed:
        print(f"{outcome.run.directory}: ended with status {outcome.status}; see {outcome.log}", file=sys.stderr)
    print(f"page: {folder / 'index.html'}")
    return (1 if failed else 0), {"files": [str(file) for file in files], "failed": [str(outcome.run.directory) for outcome in failed]}


def _report(options: argparse.Namespace) -> Any:
    return {"page": str(_write_page(options.run_path))}


def _write_page(run: Path) -> Path:
    """Write the page of a run, and show it with scores and pictures in MLflow, where the run is tracked."""
    from coupalign.config.load import read_config
    from coupalign.report import report_run
    from coupalign.training.rescore import publish_scores

    page = report_run(run)
    print(f"page: {page}")
    if (run / "config.yaml").is_file():
        publish_scores(read_config(run / "config.yaml").model_copy(update={"run_dir": run}))
    return page


def _track(options: argparse.Namespace) -> Any:
    from dataclasses import asdict

    from coupalign.tracking import sync

    sent = sync(options.run_path)
    print(f"{sent.uri}, run {sent.run_id}: {sent.rows} rows and {sent.artifacts} artifacts sent; "
          f"{sent.rows_left} rows and {sent.artifacts_left} artifacts left {sent.error or ''}")
    return (1 if sent.error else 0), asdict(sent)


def _bench(options: argparse.Namespace) -> Any:
    if any(batch < 1 for batch in options.batch or ()):
        raise InputError("--batch must be at least 1")
    if (options.what == "traffic") != bool(options.config):
        raise InputError("bench traffic needs a configuration, the other benches take none: coupalign bench traffic configs/demo.yaml")
    return {"kernel": _bench_kernel, "registers": _bench_registers, "traffic": _bench_traffic,
            "order": _bench_order}[options.what](options)


def _bench_kernel(options: argparse.Namespace) -> Any:
    from coupalign.bench.kernel import bench_kernel, table

    bench = bench_kernel(options.batch)
    print(table(bench))
    return bench.to_json()


def _bench_registers(options: argparse.Namespace) -> Any:
    try:
        from coupalign.kernels.resources import everything, measure, table
    except ImportError as error:
        raise InputError(f"bench registers compiles with Triton, which is not installed ({error}): pip install triton") from error
    from tqdm import tqdm

    wanted = everything()
    results = list(tqdm(measure(wanted), total=len(wanted), unit="kernel", desc="compiling"))
    print(table(results))
    faults = [result for result in results if result.fault]
    print(f"\n{len(results)} kernels, {len(faults)} with a fault (shared memory exceeded, or registers spilled on sm_90)")
    return (1 if faults else 0), [result.row() for result in results]


def _bench_traffic(options: argparse.Namespace) -> Any:
    from dataclasses import asdict

    from coupalign.bench.traffic import step_traffic, traffic_table
    from coupalign.config.load import read_config

    batch = (options.batch or [32])[-1]
    costs = step_traffic(read_config(options.config, options.overrides), batch)
    print(traffic_table(costs, batch))
    return {"batch": batch, "parts": {name: asdict(cost) for name, cost in costs.items()}}


def _bench_order(_: argparse.Namespace) -> Any:
    from coupalign.bench.order import bench_order, table

    bench = bench_order()
    print(table(bench))
    return (1 if bench.faults else 0), bench.to_json()


def _doctor(options: argparse.Namespace) -> Any:
    if options.distributed is not None:
        return _doctor_of_a_job(options)
    from coupalign.doctor import examine

    report = examine()
    width = max(map(len, report))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in report.items()))
    return report


def _doctor_of_a_job(options: argparse.Namespace) -> Any:
    import time

    from coupalign import dist
    from coupalign.preflight import examine_job, findings_table, to_json

    began = time.perf_counter()
    with dist.session(hang_minutes=2) as world:
        findings = examine_job(options.distributed, world, time.perf_counter() - began)
    status = 1 if any(finding.verdict == "FAIL" for finding in findings) else 0
    if not world.is_main:
        return status, None
    print(findings_table(findings))
    return status, to_json(findings)
