"""What each verb of the command line does with its options. Imports are lazy, so that --help is quick.

A verb returns what `--json` prints, or (exit status, that).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coupalign.compat import garbage_collection_paused
from coupalign.errors import InputError

STOPPED = 75  # EX_TEMPFAIL: asked to stop, can go on; slurm/job.sh puts the job back into the queue


def synth(options: argparse.Namespace) -> Any:
    from coupalign.data.refshapes.generate import synth

    report = synth(
        options.out, options.images, options.seed, options.level, options.size, options.workers
    )
    print(report.table())
    return report.to_json()


def pack(options: argparse.Namespace) -> Any:
    from coupalign.data.packing.pack import inspect, pack
    from coupalign.data.packing.recipe import read_recipe

    recipe = read_recipe(options.recipe, options.overrides)
    out = options.out or recipe.out
    if options.dry_run:
        report = inspect(recipe)
        print(report.table())
        return (1 if report.missing_images or report.missing_annotations else 0), report.to_json()
    if out is None:
        raise InputError(
            f"{options.recipe}: `out` is empty: say where the shards go, there or with --out"
        )
    report = pack(recipe, out, options.workers, options.overwrite)
    print(report.table())
    return report.to_json()


def verify(options: argparse.Namespace) -> Any:
    from coupalign.data.packing.verify import verify

    if options.leaks:
        from coupalign.data.leak import overlaps
        from coupalign.data.shards import open_index

        found = overlaps([open_index(str(directory)) for directory in options.directories])
        print(found.table())
        return found.to_json()
    reports = [verify(directory) for directory in options.directories]
    print("\n\n".join(report.table() for report in reports))
    status = 0 if all(report.ok for report in reports) else 1
    return status, reports[0].to_json() if len(reports) == 1 else [
        report.to_json() for report in reports
    ]


def describe(options: argparse.Namespace) -> Any:
    from coupalign.config.load import read_config
    from coupalign.costs.describe import describe

    report = describe(read_config(options.config, options.overrides))
    print(report.table())
    return report.to_json()


def plan(options: argparse.Namespace) -> Any:
    from coupalign.config.load import read_config
    from coupalign.costs.plan import plan

    found = plan(
        read_config(options.config, options.overrides),
        options.gpu,
        options.nodes,
        options.ranks_per_node,
        options.network,
    )
    print(found.table())
    return found.to_json()


def config(options: argparse.Namespace) -> Any:
    from coupalign.config.load import dump, read_config

    config = read_config(options.config, options.overrides)
    if not options.deepspeed:
        print(dump(config), end="")
        return config.model_dump(mode="json")
    if config.engine.kind != "deepspeed":
        raise InputError(
            f"{options.config}: engine.kind is {config.engine.kind}; add engine.kind=deepspeed"
        )
    from coupalign.engine.zero import deepspeed_config

    derived = deepspeed_config(config, options.ranks)
    if not options.json:
        print(json.dumps(derived, indent=2))
    return derived


def train(options: argparse.Namespace) -> Any:
    from coupalign.distributed.stop import StopRequest

    with StopRequest() as stop:
        with garbage_collection_paused():
            from coupalign.config.load import read_config
            from coupalign.data.fork_server import fork_server

            config = read_config(options.config, options.overrides)
            if config.data.workers:
                fork_server()  # imports torch beside this process
            from coupalign.training.loop import train
        outcome = train(config, stop)
    status = 0 if outcome.finished else STOPPED
    if not outcome.is_main:
        return status, None
    for name, score in outcome.scores.items():
        print(f"\n{name}\n{score.table()}")
    if outcome.finished and outcome.scores:
        _write_page(config.directory)
    return status, {
        "run": str(config.directory),
        "finished": outcome.finished,
        **outcome.state.to_json(),
        "scores": {name: score.to_json() for name, score in outcome.scores.items()},
    }


def evaluate(options: argparse.Namespace) -> Any:
    from coupalign.distributed.stop import StopRequest

    with StopRequest() as stop:
        with garbage_collection_paused():
            from coupalign.engine.open_checkpoint import find_checkpoint
            from coupalign.evaluation.evaluator import Stopped
            from coupalign.scoring.checkpoint import run_directory, score_checkpoint

        try:
            scores = score_checkpoint(
                options.run_path,
                options.overrides,
                options.split or (),
                options.index,
                options.protocol,
                options.sentences,
                options.language_blind,
                options.pictures,
                stop,
            )
        except Stopped:
            print(
                f"coupalign: stopped by {stop.name or 'another rank'}; the same command scores anew",
                file=sys.stderr,
            )
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
        print(
            f"\n{split}\n{side_by_side(found) if len(found) > 1 else next(iter(found.values())).table()}"
        )
        several = [len(set(words)) > 1 for words in zip(*found)]
        for key, score in found.items():
            values[" ".join([split, *(word for word, tells in zip(key, several) if tells)])] = (
                score.to_json()
            )
    return values


def compare(options: argparse.Namespace) -> Any:
    from coupalign.report.compare import compare

    found = compare(
        options.run_a, options.run_b, options.split, options.protocol, options.tracking_uri
    )
    print(
        f"A  {options.run_a}\nB  {options.run_b}\n{options.split}, {options.protocol}: {found.table()}"
    )
    return {
        "a": options.run_a,
        "b": options.run_b,
        "split": options.split,
        "protocol": options.protocol,
        **found.to_json(),
    }


def predict(options: argparse.Namespace) -> Any:
    with garbage_collection_paused():
        from coupalign.predict.predictor import Predictor

    if options.batch < 1:
        raise InputError("--batch must be at least 1")
    if options.sentence is None and options.image.suffix.lower() not in (".csv", ".jsonl"):
        raise InputError(
            f"{options.image}: a sentence is expected after an image or a folder (a .csv or .jsonl file of pairs needs none)"
        )
    predictor = Predictor.from_checkpoint(options.checkpoint, options.device)
    if options.sentence is None:
        results = predictor.predict_file(options.image, options.out, options.batch)
    elif options.image.is_dir():
        results = predictor.predict_folder(
            options.image, options.sentence, options.out, options.batch
        )
    else:
        results = predictor.predict_to(options.image, options.sentence, options.out)
    if not options.json:
        print(json.dumps(results, ensure_ascii=False, indent=2))
    unreadable = isinstance(results, list) and any("error" in result for result in results)
    return (1 if unreadable else 0), results


def reproduce(options: argparse.Namespace) -> Any:
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
    if scale and not options.only_print:
        reproduce.make_shapes(scale)
    if options.slurm is not None:
        commands = reproduce.submit(runs, options.overrides, options.slurm, folder)
        print(
            f"{len(commands)} arrays submitted; when they are done: the same command with --only-print in place of --slurm"
        )
        return {"submitted": [shlex.join(command) for command in commands]}
    if not options.only_print:
        try:
            outcomes = reproduce.run_all(
                runs, options.overrides, shlex.split(options.launcher or ""), options.jobs
            )
        except KeyboardInterrupt:
            return STOPPED, None
        failed = [outcome for outcome in outcomes if outcome.status]
    results = reproduce.collect(planned, table, options.overrides)
    files = reproduce.publish(
        name,
        table,
        results,
        folder,
        read_config(runs[0].config, options.overrides),
        comparable=scale is None,
    )
    print("\n" + (folder / "table.txt").read_text(encoding="utf-8"))
    for outcome in failed:
        print(
            f"{outcome.run.directory}: ended with status {outcome.status}; see {outcome.log}",
            file=sys.stderr,
        )
    print(f"page: {folder / 'index.html'}")
    return (1 if failed else 0), {
        "files": [str(file) for file in files],
        "failed": [str(outcome.run.directory) for outcome in failed],
    }


def report(options: argparse.Namespace) -> Any:
    return {"page": str(_write_page(options.run_path))}


def _write_page(run: Path) -> Path:
    """Write the page of a run, and show it with scores and pictures in MLflow, where the run is tracked."""
    from coupalign.config.load import read_config
    from coupalign.report import report_run
    from coupalign.scoring.checkpoint import publish_scores

    page = report_run(run)
    print(f"page: {page}")
    if (run / "config.yaml").is_file():
        publish_scores(read_config(run / "config.yaml").model_copy(update={"run_dir": run}))
    return page


def track(options: argparse.Namespace) -> Any:
    from dataclasses import asdict

    from coupalign.tracking import sync

    sent = sync(options.run_path)
    print(
        f"{sent.uri}, run {sent.run_id}: {sent.rows} rows and {sent.artifacts} artifacts sent; "
        f"{sent.rows_left} rows and {sent.artifacts_left} artifacts left {sent.error or ''}"
    )
    return (1 if sent.error else 0), asdict(sent)


def bench(options: argparse.Namespace) -> Any:
    if any(batch < 1 for batch in options.batch or ()):
        raise InputError("--batch must be at least 1")
    needs = ("step", "loader", "eval", "startup", "traffic")
    if (options.what in needs) != bool(options.config):
        raise InputError(
            f"bench {', '.join(needs)} need a configuration, the other benches take none: "
            "coupalign bench step configs/demo.yaml"
        )
    return {
        "step": _bench_step,
        "loader": _bench_loader,
        "eval": _bench_eval,
        "startup": _bench_startup,
        "kernel": _bench_kernel,
        "registers": _bench_registers,
        "traffic": _bench_traffic,
        "order": _bench_order,
    }[options.what](options)


def _bench_step(options: argparse.Namespace) -> Any:
    from coupalign.bench.step import bench_step

    return _bench_on_ranks(
        options,
        lambda config, world: bench_step(
            config,
            world,
            options.steps,
            options.warmup,
            options.random_data,
            options.profile,
            options.beside,
        ),
    )


def _bench_eval(options: argparse.Namespace) -> Any:
    from coupalign.bench.evaluation import bench_eval

    return _bench_on_ranks(
        options, lambda config, world: bench_eval(config, world, options.steps, options.warmup)
    )


def _bench_loader(options: argparse.Namespace) -> Any:
    from coupalign.bench.loader import bench_loader

    return _bench_on_ranks(
        options, lambda config, _: bench_loader(config, options.steps, options.warmup, options.soak)
    )


def _bench_on_ranks(options: argparse.Namespace, measure: Callable[[Any, Any], Any]) -> Any:
    """`measure(configuration, world)`; what it is to be compared with is read before anything is timed."""
    from coupalign.bench.machine import describe_machine, read_result
    from coupalign.config.load import read_config
    from coupalign.distributed.world import rank_session

    if options.steps < 1 or options.warmup < 1 or options.soak < 0:
        raise InputError("--steps and --warmup must be at least 1, --soak not below 0")
    config = read_config(options.config, options.overrides)
    with rank_session() as world:
        before = options.against and read_result(
            options.against, describe_machine(world.device), options.what
        )
        bench = measure(config, world)
    return _show_bench(bench, before, options) if world.is_main else None


def _bench_startup(options: argparse.Namespace) -> Any:
    import torch

    from coupalign.bench.machine import describe_machine, read_result
    from coupalign.bench.startup import bench_startup

    before = options.against and read_result(
        options.against, describe_machine(torch.device("cpu")), "startup"
    )
    return _show_bench(bench_startup(options.config, options.overrides), before, options)


def _show_bench(
    bench: Any, before: dict[str, Any] | None, options: argparse.Namespace
) -> dict[str, Any]:
    """Print a result and its ratios to an earlier one, and keep it where asked for."""
    from coupalign.bench.machine import ratios
    from coupalign.files import write_json

    print(bench.table())
    result = bench.to_json()
    if before:
        result["against"] = ratios(bench.figures(), type(bench).from_json(before).figures())
        print(f"\nratios to {options.against}")
        print("\n".join(f"{name:<42}{ratio:>8.3f}" for name, ratio in result["against"].items()))
    if options.out:
        write_json(options.out, result)
    return result


def _bench_kernel(options: argparse.Namespace) -> Any:
    from coupalign.bench.kernel import bench_kernel, table

    bench = bench_kernel(options.batch)
    print(table(bench))
    return bench.to_json()


def _bench_registers(options: argparse.Namespace) -> Any:
    try:
        from coupalign.kernels.resources import everything, measure, table
    except ImportError as error:
        raise InputError(
            f"bench registers compiles with Triton, which is not installed ({error}): pip install triton"
        ) from error
    from tqdm import tqdm

    wanted = everything()
    results = list(tqdm(measure(wanted), total=len(wanted), unit="kernel", desc="compiling"))
    print(table(results))
    faults = [result for result in results if result.fault]
    print(
        f"\n{len(results)} kernels, {len(faults)} with a fault (shared memory exceeded, or registers spilled on sm_90)"
    )
    return (1 if faults else 0), [result.row() for result in results]


def _bench_traffic(options: argparse.Namespace) -> Any:
    from dataclasses import asdict

    from coupalign.config.load import read_config
    from coupalign.costs.traffic import step_traffic, traffic_table

    batch = (options.batch or [32])[-1]
    costs = step_traffic(read_config(options.config, options.overrides), batch)
    print(traffic_table(costs, batch))
    return {"batch": batch, "parts": {name: asdict(cost) for name, cost in costs.items()}}


def _bench_order(_: argparse.Namespace) -> Any:
    from coupalign.bench.order import bench_order, table

    bench = bench_order()
    print(table(bench))
    return (1 if bench.faults else 0), bench.to_json()


def doctor(options: argparse.Namespace) -> Any:
    if options.distributed is not None:
        return _doctor_of_a_job(options)
    from coupalign.doctor.installation import examine

    report = examine()
    width = max(map(len, report))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in report.items()))
    return report


def _doctor_of_a_job(options: argparse.Namespace) -> Any:
    import time

    from coupalign.distributed.world import rank_session
    from coupalign.doctor.job import examine_job, findings_table, to_json

    began = time.perf_counter()
    with rank_session(hang_minutes=2) as world:
        findings = examine_job(options.distributed, world, time.perf_counter() - began)
    status = 1 if any(finding.verdict == "FAIL" for finding in findings) else 0
    if not world.is_main:
        return status, None
    print(findings_table(findings))
    return status, to_json(findings)
