"""The verbs that only look: describe, plan, config, doctor."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from coupalign.cli.options import Answer, add_file_and_overrides, add_verb, ok_or_no
from coupalign.errors import InputError

# The keys of `costs.plan.GPUS`, which imports torch; a test holds the two together.
GPUS = ("a100-40", "a100-80", "h100", "h200", "rtx4090", "rtx3090", "v100-32")


def add_describe(verbs: argparse._SubParsersAction) -> None:
    parser = add_verb(
        verbs,
        "describe",
        run_describe,
        "print parameters and FLOPs of each part of the model, and the shapes at each stage",
    )
    add_file_and_overrides(parser)


def run_describe(options: argparse.Namespace) -> Answer:
    from coupalign.config.load import read_config
    from coupalign.costs.describe import describe

    report = describe(read_config(options.config, options.overrides))
    print(report.table())
    return Answer(report.to_json())


def add_plan(verbs: argparse._SubParsersAction) -> None:
    parser = add_verb(
        verbs,
        "plan",
        run_plan,
        "print what a training will need: memory per engine, bytes sent, micro-batch; needs no GPU",
    )
    add_file_and_overrides(parser)
    parser.add_argument("--gpu", default="h100", choices=GPUS, help="default h100")
    parser.add_argument("--nodes", type=int, default=1, help="default 1")
    parser.add_argument("--ranks-per-node", type=int, default=8, help="GPUs per node; default 8")
    parser.add_argument(
        "--network",
        type=float,
        default=50.0,
        metavar="GB/s",
        help="bandwidth between nodes in one direction, all adapters of a node together; "
        "default 50, which is one adapter of 400 Gb/s",
    )


def run_plan(options: argparse.Namespace) -> Answer:
    from coupalign.config.load import read_config
    from coupalign.costs.plan import plan

    needs = plan(
        read_config(options.config, options.overrides),
        options.gpu,
        options.nodes,
        ranks_per_node=options.ranks_per_node,
        network=options.network,
    )
    print(needs.table())
    return Answer(needs.to_json())


def add_config(verbs: argparse._SubParsersAction) -> None:
    parser = add_verb(
        verbs, "config", run_config, "print the whole configuration, defaults included"
    )
    add_file_and_overrides(parser)
    parser.add_argument(
        "--deepspeed", action="store_true", help="print the configuration given to DeepSpeed"
    )
    parser.add_argument(
        "--ranks", type=int, default=1, help="with --deepspeed: number of ranks; default 1"
    )


def run_config(options: argparse.Namespace) -> Answer:
    from coupalign.config.load import dump, read_config
    from coupalign.config.schema import DeepSpeedEngine

    config = read_config(options.config, options.overrides)
    if not options.deepspeed:
        print(dump(config), end="")
        return Answer(config.model_dump(mode="json"))

    # What DeepSpeed is given is derived from the configuration.
    if not isinstance(config.engine, DeepSpeedEngine):
        raise InputError(
            f"{options.config}: engine.kind is {config.engine.kind}; add engine.kind=deepspeed"
        )
    from coupalign.engine.zero import deepspeed_config

    derived = deepspeed_config(config, options.ranks)
    if not options.json:
        print(json.dumps(derived, indent=2))
    return Answer(derived)


def add_doctor(verbs: argparse._SubParsersAction) -> None:
    parser = add_verb(
        verbs, "doctor", run_doctor, "check what this machine, or a job on many, is able to do"
    )
    parser.add_argument(
        "--distributed",
        type=Path,
        nargs="?",
        const=Path("runs"),
        metavar="RUN_DIR",
        help="check a job, started by a launcher on all ranks: whether they meet, share RUN_DIR "
        "(default runs), agree on clock and versions, and how fast they are",
    )


def run_doctor(options: argparse.Namespace) -> Answer:
    if options.distributed is not None:
        return _examine_job(options.distributed)
    from tabulate import tabulate

    from coupalign.doctor.installation import examine

    report = examine()
    print(tabulate(report.items(), tablefmt="plain", disable_numparse=True))
    return Answer(report)


def _examine_job(run_dir: Path) -> Answer:
    import time

    from coupalign.distributed.world import rank_session
    from coupalign.doctor.job import examine_job, findings_table, to_json

    began = time.perf_counter()
    with rank_session(hang_minutes=2) as world:
        seconds_to_join = time.perf_counter() - began
        findings = examine_job(run_dir, world, seconds_to_join)

    # All ranks end with the same status; the first one reports.
    status = ok_or_no(all(finding.verdict != "FAIL" for finding in findings))
    if not world.is_main:
        return Answer(status=status)
    print(findings_table(findings))
    return Answer(to_json(findings), status)
