"""The verbs about runs: train, eval, compare, predict, reproduce, report, track."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coupalign.cli.options import Answer, add_file_and_overrides, add_overrides, add_verb, ok_or_no
from coupalign.compat import garbage_collection_paused
from coupalign.errors import ExitStatus, InputError

if TYPE_CHECKING:
    from coupalign.evaluation.metrics import Score

# The names in `schema.EvalConfig.protocol` and `data.table.Rule`; a test holds them together.
PROTOCOLS = ("ris-v1", "lavt", "cris", "coupalign-author")
SENTENCE_RULES = ("each", "first", "concatenated")


def add_train(verbs: argparse._SubParsersAction) -> None:
    parser = add_verb(
        verbs, "train", run_train, "train a model, or resume the run from its newest checkpoint"
    )
    add_file_and_overrides(parser)


def run_train(options: argparse.Namespace) -> Answer:
    from coupalign.distributed.parent import stop_with_launcher
    from coupalign.distributed.stop import StopRequest

    # Listen for a stop from the first moment on: the imports take seconds.
    with StopRequest() as stop:
        stop_with_launcher()
        with garbage_collection_paused():
            from coupalign.config.load import read_config
            from coupalign.data.fork_server import fork_server

            config = read_config(options.config, options.overrides)
            if config.data.workers:
                # The server of the workers imports torch while this process does.
                fork_server()
            from coupalign.training.loop import train
        outcome = train(config, stop)

    status = ExitStatus.OK if outcome.finished else ExitStatus.STOPPED
    if not outcome.is_main:
        return Answer(status=status)

    for name, score in outcome.scores.items():
        print(f"\n{name}\n{score.table()}")
    if outcome.finished and outcome.scores:
        from coupalign.scoring.publish import publish_scores

        _write_page(config.directory)
        publish_scores(config)

    value = {
        "run": str(config.directory),
        "finished": outcome.finished,
        **outcome.state.to_json(),
        "scores": {name: score.to_json() for name, score in outcome.scores.items()},
    }
    return Answer(value, status)


def add_eval(verbs: argparse._SubParsersAction) -> None:
    parser = add_verb(verbs, "eval", run_eval, "score a trained model")
    # What to score.
    add_file_and_overrides(
        parser, "run_path", "run directory (its best checkpoint is taken) or a checkpoint"
    )
    parser.add_argument(
        "--split",
        action="append",
        help="split to score; repeat it for several; default: those of the configuration",
    )
    parser.add_argument("--index", help="another shard directory to take the splits from")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for scores, rows, pictures and the page; default: the run directory",
    )

    # How to score it.
    parser.add_argument(
        "--protocol",
        choices=(*PROTOCOLS, "all"),
        help="default: the protocol of the configuration",
    )
    parser.add_argument(
        "--sentences",
        choices=(*SENTENCE_RULES, "all"),
        help="what one sample is: each sentence of a ref, its first, or all of them joined as one "
        "text; default: what the authors of the protocol score, which is each for all but "
        "coupalign-author",
    )
    parser.add_argument(
        "--language-blind",
        action="store_true",
        help="score a second time with the sentences shuffled among the samples",
    )
    parser.add_argument(
        "--pictures",
        type=int,
        default=0,
        help="pictures to keep of each kind: best, median, worst and random samples; default 0",
    )


def run_eval(options: argparse.Namespace) -> Answer:
    from coupalign.distributed.stop import StopRequest

    with StopRequest() as stop:
        with garbage_collection_paused():
            from coupalign.engine.open_checkpoint import find_checkpoint
            from coupalign.evaluation.evaluator import Stopped
            from coupalign.scoring.checkpoint import run_directory, score_checkpoint
            from coupalign.scoring.publish import publish_scores_of
            from coupalign.scoring.splits import ScoreRequest

        try:
            scores = score_checkpoint(
                options.run_path,
                options.overrides,
                splits=options.split or (),
                index=options.index,
                out=options.out,
                request=ScoreRequest.from_names(
                    options.protocol,
                    options.sentences,
                    language_blind=options.language_blind,
                    pictures=options.pictures,
                ),
                stop=stop,
                announce=_print_scores,
            )
        except Stopped:
            stopper = stop.name or "another rank"
            print(
                f"coupalign: stopped by {stopper}; the same command starts the scoring again",
                file=sys.stderr,
            )
            return Answer(status=ExitStatus.STOPPED)

    # Scores are empty on all ranks but the first.
    if not scores:
        return Answer()
    run = run_directory(find_checkpoint(options.run_path))
    _write_page(options.out or run)
    if options.out is None:
        publish_scores_of(run, options.overrides)
    return Answer(_scores_to_json(scores))


def _print_scores(name: str, scores: Mapping[tuple[str, str], Score]) -> None:
    """Print the scores of one set, by (protocol, sentence rule), next to each other."""
    from coupalign.evaluation.metrics import side_by_side

    first = next(iter(scores.values()))
    table = side_by_side(scores) if len(scores) > 1 else first.table()
    print(f"\n{name}\n{table}", flush=True)


def _scores_to_json(scores: Mapping[str, Mapping[tuple[str, str], Score]]) -> dict[str, Any]:
    """Return the scores of all sets as JSON, by "<name> <protocol> <sentence rule>".

    Protocol and rule are left out where all scores of a set have the same.
    """
    values: dict[str, Any] = {}
    for split, by_column in scores.items():
        protocols, rules = ({*names} for names in zip(*by_column))
        for (protocol, rule), score in by_column.items():
            name = split
            if len(protocols) > 1:
                name += f" {protocol}"
            if len(rules) > 1:
                name += f" {rule}"
            values[name] = score.to_json()
    return values


def add_compare(verbs: argparse._SubParsersAction) -> None:
    parser = add_verb(
        verbs,
        "compare",
        run_compare,
        "compare two scored runs on the same samples: differences with confidence intervals, and "
        "the samples that make them",
    )
    parser.add_argument("run_a", help="run directory, or id or name of an MLflow run")
    parser.add_argument("run_b", help="the same, for the run that may be better")
    parser.add_argument("--split", default="val", help="default val")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="ris-v1", help="default ris-v1")
    parser.add_argument(
        "--tracking-uri",
        help="MLflow server; default: $MLFLOW_TRACKING_URI, else sqlite:///runs/mlflow.db",
    )


def run_compare(options: argparse.Namespace) -> Answer:
    from coupalign.report.compare import compare

    comparison = compare(
        options.run_a,
        options.run_b,
        options.split,
        protocol=options.protocol,
        tracking_uri=options.tracking_uri,
    )
    print(f"A  {options.run_a}\nB  {options.run_b}")
    print(f"{options.split}, {options.protocol}: {comparison.table()}")

    value = {
        "a": options.run_a,
        "b": options.run_b,
        "split": options.split,
        "protocol": options.protocol,
        **comparison.to_json(),
    }
    return Answer(value)


def add_predict(verbs: argparse._SubParsersAction) -> None:
    parser = add_verb(verbs, "predict", run_predict, "segment what a sentence refers to")
    parser.add_argument("checkpoint", type=Path, help="run directory or checkpoint")
    parser.add_argument(
        "image",
        type=Path,
        help="image file, folder of images, or a .csv or .jsonl file of image,sentence pairs",
    )
    parser.add_argument("sentence", nargs="?", help="omit it for a file of pairs")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("predictions"),
        help="folder for masks, overlays and results.jsonl; default predictions",
    )
    parser.add_argument("--batch", type=int, default=16, help="images per forward pass; default 16")
    parser.add_argument("--device", help="cpu, cuda …; default: the GPU if there is one")


def run_predict(options: argparse.Namespace) -> Answer:
    with garbage_collection_paused():
        from coupalign.predict.predictor import Predictor

    if options.batch < 1:
        raise InputError("--batch must be at least 1")
    if options.sentence is None and options.image.suffix.lower() not in (
        ".csv",
        ".jsonl",
        ".ndjson",
    ):
        raise InputError(
            f"{options.image}: a sentence is expected after an image or a folder. "
            "Only a .csv or .jsonl file of image,sentence pairs has its own"
        )

    predictor = Predictor.from_checkpoint(options.checkpoint, options.device)
    if options.sentence is None:
        results = predictor.predict_file(options.image, options.out, options.batch)
    elif options.image.is_dir():
        results = predictor.predict_folder(
            options.image, options.sentence, options.out, batch=options.batch
        )
    else:
        results = predictor.predict_to(options.image, options.sentence, options.out)

    if not options.json:
        print(json.dumps(results, ensure_ascii=False, indent=2))
    # A file or folder may hold unreadable images; a single one raises an InputError.
    has_unreadable = isinstance(results, list) and any("error" in result for result in results)
    return Answer(results, ok_or_no(not has_unreadable))


def add_reproduce(verbs: argparse._SubParsersAction) -> None:
    parser = add_verb(
        verbs,
        "reproduce",
        run_reproduce,
        "train and score every run of a paper table, then print our numbers next to the published "
        "ones",
    )
    # What to run.
    parser.add_argument(
        "table",
        help="table1, table2, table3, main, methods, additions or decoder, see configs/tables/; "
        "or a YAML file of that form",
    )
    add_overrides(parser, "settings to change in every run's configuration, by dotted key")
    parser.add_argument(
        "--data",
        choices=("real", "refshapes"),
        default="real",
        help="refshapes: use generated data, which is made first if needed; default real",
    )
    parser.add_argument(
        "--scale",
        choices=("small", "tiny"),
        help="of refshapes: small (default) takes minutes per run, tiny only tests that all works",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        help="runs per row; use three or more to claim anything; default 1",
    )

    # How to run it.
    parser.add_argument("--jobs", type=int, help="runs at the same time on this machine; default 1")
    parser.add_argument(
        "--launcher",
        help="script that starts a verb on all ranks, such as launch/deepspeed.sh; "
        "default: one process",
    )
    parser.add_argument(
        "--slurm",
        metavar="OPTIONS",
        help="submit the runs to Slurm as arrays, with these options for sbatch, and return",
    )
    parser.add_argument(
        "--only-print",
        action="store_true",
        help="start nothing; print the table of the runs that exist",
    )


def run_reproduce(options: argparse.Namespace) -> Answer:
    import shlex

    from coupalign import reproduce
    from coupalign.config.load import read_config

    _refuse_flags_without_use(options)
    jobs = 1 if options.jobs is None else options.jobs
    if options.seeds < 1 or jobs < 1:
        raise InputError("--seeds and --jobs must be at least 1")

    # Plan.
    scale = (options.scale or "small") if options.data == "refshapes" else None
    table = reproduce.read_table(options.table)
    planned = reproduce.plan_runs(table, scale, options.seeds)
    runs = [run for _, runs_of_row in planned for run in runs_of_row]
    name = f"reproduce-{Path(options.table).stem}"
    if scale:
        name += f"-{scale}"
    folder = Path("runs") / name
    if scale and not options.only_print:
        reproduce.make_shapes(scale)

    # Run, now or by Slurm.
    if options.slurm is not None:
        commands = reproduce.submit(runs, options.overrides, options.slurm, folder=folder)
        print(
            f"{len(commands)} arrays submitted. When they are done, run the same command with "
            "--only-print instead of --slurm"
        )
        return Answer({"submitted": [shlex.join(command) for command in commands]})

    failed: list[Any] = []
    if not options.only_print:
        launcher = shlex.split(options.launcher or "")
        try:
            outcomes = reproduce.run_all(runs, options.overrides, launcher, jobs=jobs)
        except KeyboardInterrupt:
            return Answer(status=ExitStatus.STOPPED)
        failed = [outcome for outcome in outcomes if outcome.status]

    # Print.
    results = reproduce.collect(planned, table, options.overrides)
    files = reproduce.publish(
        name,
        table,
        results,
        folder=folder,
        config=read_config(runs[0].config, options.overrides),
        comparable=scale is None,
    )
    print("\n" + (folder / "table.txt").read_text(encoding="utf-8"))
    for outcome in failed:
        print(
            f"{outcome.run.directory}: ended with status {outcome.status}; see {outcome.log}",
            file=sys.stderr,
        )
    print(f"page: {folder / 'index.html'}")

    value = {
        "files": [str(file) for file in files],
        "failed": [str(outcome.run.directory) for outcome in failed],
    }
    return Answer(value, ok_or_no(not failed))


def _refuse_flags_without_use(options: argparse.Namespace) -> None:
    """Refuse flags of `reproduce` that another flag leaves without an effect."""
    if options.scale and options.data != "refshapes":
        raise InputError("--scale is of --data refshapes; real data has no scale: leave it out")

    if options.slurm is None:
        return
    if options.only_print:
        raise InputError("--only-print starts nothing, and --slurm submits jobs: leave one out")
    for name in ("jobs", "launcher"):
        if getattr(options, name) is not None:
            raise InputError(
                f"--{name} is for runs on this machine, and --slurm submits them: leave it out. "
                "slurm/sweep.sbatch starts each run on all ranks of its job"
            )


def add_report(verbs: argparse._SubParsersAction) -> None:
    parser = add_verb(
        verbs, "report", run_report, "write the HTML page of a run: scores, curves, pictures"
    )
    parser.add_argument("run_path", type=Path, help="run directory")
    parser.add_argument(
        "--out", type=Path, help="file of the page; default: report.html in the run directory"
    )


def run_report(options: argparse.Namespace) -> Answer:
    from coupalign.report import report_run
    from coupalign.scoring.publish import note_results

    page = report_run(options.run_path, options.out)
    print(f"page: {page}")
    if options.out is None:
        note_results(options.run_path)
    return Answer({"page": str(page)})


def _write_page(run: Path) -> Path:
    """Write the page of a run. Nothing is sent."""
    from coupalign.report import report_run

    page = report_run(run)
    print(f"page: {page}")
    return page


def add_track(verbs: argparse._SubParsersAction) -> None:
    parser = add_verb(
        verbs, "track", run_track, "send an MLflow server what it has not received from a run yet"
    )
    parser.add_argument("run_path", type=Path, help="run directory")
    parser.add_argument(
        "--tracking-uri",
        help="MLflow server; default: $MLFLOW_TRACKING_URI, else mlflow.db next to the run",
    )


def run_track(options: argparse.Namespace) -> Answer:
    from dataclasses import asdict

    from coupalign.tracking import sync

    result = sync(options.run_path, options.tracking_uri)
    print(
        f"{result.uri}, run {result.run_id}: "
        f"{result.rows} rows and {result.artifacts} artifacts sent; "
        f"{result.rows_left} rows and {result.artifacts_left} artifacts left {result.error or ''}"
    )
    return Answer(asdict(result), ok_or_no(not result.error))
