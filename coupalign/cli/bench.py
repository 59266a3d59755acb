"""The verb that measures: bench, with one function per kind."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coupalign.cli.options import Answer, add_file_and_overrides, add_verb, ok_or_no
from coupalign.errors import InputError

if TYPE_CHECKING:
    from coupalign.bench.result import Result
    from coupalign.config.schema import Config
    from coupalign.distributed.world import World

_KINDS = {
    "step": "CONFIG: samples per second, and where time and memory of a training step go",
    "loader": "CONFIG: samples that one core reads per second, compared with decoding alone",
    "eval": "CONFIG: samples per second of scoring",
    "startup": "CONFIG: seconds to the first step",
    "kernel": "time and bytes of word-pixel alignment, compared with other ways to write it",
    "registers": "resources of each kernel, compiled for each GPU; needs none of them",
    "traffic": "CONFIG: bytes and FLOPs of each part of a training step",
    "order": "simulated data order of 1e8 samples and 1,024 ranks; half a minute on one core, 2 GB",
}
_KINDS_WITH_CONFIG = ("step", "loader", "eval", "startup", "traffic")

# Which kinds a flag is for.
_KINDS_OF_FLAG = {
    "batch": ("kernel", "traffic"),
    "steps": ("step", "loader", "eval"),
    "warmup": ("step", "loader", "eval"),
    "random_data": ("step",),
    "profile": ("step",),
    "beside": ("step",),
    "soak": ("loader",),
    "out": ("step", "loader", "eval", "startup"),
    "against": ("step", "loader", "eval", "startup"),
}
_DEFAULTS = {"steps": 20, "warmup": 5, "soak": 0, "beside": []}


def add_bench(verbs: argparse._SubParsersAction) -> None:
    parser = add_verb(
        verbs,
        "bench",
        run_bench,
        "measure a training step, the loader, scoring, the start, kernels, traffic or data order",
    )
    # What to measure.
    parser.add_argument(
        "what",
        choices=tuple(_KINDS),
        help="; ".join(f"{name} {text}" for name, text in _KINDS.items()),
    )
    add_file_and_overrides(
        parser,
        "config",
        "YAML file, for step, loader, eval, startup and traffic",
        optional=True,
    )

    # How to measure it. Each flag is for some kinds only.
    parser.add_argument(
        "--batch",
        type=int,
        action="append",
        help="images; kernel: repeat it for several, default 8 and 32 (2 on a CPU); "
        "traffic: default 32",
    )
    parser.add_argument("--steps", type=int, help="step, loader, eval: steps to time; default 20")
    parser.add_argument(
        "--warmup",
        type=int,
        help="step, loader, eval: steps before timing starts; default 5",
    )
    parser.add_argument(
        "--random-data",
        action="store_true",
        help="step: use random samples; data.train need not exist",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="step: write a profiler trace of three steps, for ui.perfetto.dev",
    )
    parser.add_argument(
        "--beside",
        action="append",
        metavar="KEY=VALUE",
        help="step: also measure the configuration with this change, taking turns step by step; "
        "repeat it for several changes",
    )
    parser.add_argument(
        "--soak",
        type=int,
        metavar="SAMPLES",
        help="loader: measure the memory of the workers while they read this many samples",
    )

    # What to do with the result.
    parser.add_argument(
        "--out", type=Path, help="step, loader, eval, startup: write the result as JSON"
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FILE",
        help="step, loader, eval, startup: print ratios to an earlier --out of the same machine",
    )


def run_bench(options: argparse.Namespace) -> Answer:
    _refuse_flags_of_other_kinds(options)
    for name, value in _DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if any(batch < 1 for batch in options.batch or ()):
        raise InputError("--batch must be at least 1")
    # Before the measurement. And root could replace a device, such as /dev/null, by a file.
    if options.out is not None and options.out.exists() and not options.out.is_file():
        raise InputError(f"--out {options.out}: is no file; name one for the result")
    if (options.what in _KINDS_WITH_CONFIG) != bool(options.config):
        raise InputError(
            f"bench {', '.join(_KINDS_WITH_CONFIG)} need a configuration, the other benches take "
            "none: coupalign bench step configs/demo.yaml"
        )

    match options.what:
        case "step":
            return _bench_step(options)
        case "loader":
            return _bench_loader(options)
        case "eval":
            return _bench_eval(options)
        case "startup":
            return _bench_startup(options)
        case "kernel":
            return _bench_kernel(options)
        case "registers":
            return _bench_registers()
        case "traffic":
            return _bench_traffic(options)
        case "order":
            return _bench_order()
    raise AssertionError(f"argparse let an unknown kind pass: {options.what}")


def _refuse_flags_of_other_kinds(options: argparse.Namespace) -> None:
    for name, kinds in _KINDS_OF_FLAG.items():
        is_given = getattr(options, name) not in (None, False)
        if is_given and options.what not in kinds:
            flag = "--" + name.replace("_", "-")
            raise InputError(
                f"{flag} is for bench {', '.join(kinds)}; bench {options.what} does not use it: "
                "leave it out"
            )


def _bench_step(options: argparse.Namespace) -> Answer:
    from coupalign.bench.step import bench_step

    def measure(config: Config, world: World) -> Result:
        return bench_step(
            config,
            world,
            options.steps,
            warmup=options.warmup,
            random_data=options.random_data,
            trace=options.profile,
            beside=options.beside,
        )

    return _bench_on_ranks(options, measure)


def _bench_eval(options: argparse.Namespace) -> Answer:
    from coupalign.bench.evaluation import bench_eval

    def measure(config: Config, world: World) -> Result:
        return bench_eval(config, world, options.steps, warmup=options.warmup)

    return _bench_on_ranks(options, measure)


def _bench_loader(options: argparse.Namespace) -> Answer:
    from coupalign.bench.loader import bench_loader

    def measure(config: Config, world: World) -> Result:
        return bench_loader(config, options.steps, options.warmup, soak=options.soak)

    return _bench_on_ranks(options, measure)


def _bench_on_ranks(
    options: argparse.Namespace, measure: Callable[[Config, World], Result]
) -> Answer:
    """Measure on all ranks that a launcher started, and print the result on the first."""
    from coupalign.bench.machine import describe_machine
    from coupalign.bench.result import read_result
    from coupalign.config.load import read_config
    from coupalign.distributed.world import rank_session

    if options.steps < 1 or options.warmup < 1 or options.soak < 0:
        raise InputError("--steps and --warmup must be at least 1, --soak at least 0")
    config = read_config(options.config, options.overrides)

    with rank_session() as world:
        # Read the earlier result before anything is timed: it may be unusable.
        earlier = None
        if options.against:
            earlier = read_result(options.against, describe_machine(world.device), options.what)
        result = measure(config, world)

    if not world.is_main:
        return Answer()
    return _show_result(result, earlier, options)


def _bench_startup(options: argparse.Namespace) -> Answer:
    import torch

    from coupalign.bench.machine import describe_machine
    from coupalign.bench.result import read_result
    from coupalign.bench.startup import bench_startup

    earlier = None
    if options.against:
        machine = describe_machine(torch.device("cpu"))
        earlier = read_result(options.against, machine, options.what)
    result = bench_startup(options.config, options.overrides)
    return _show_result(result, earlier, options)


def _show_result(
    result: Result, earlier: dict[str, Any] | None, options: argparse.Namespace
) -> Answer:
    """Print a result and its ratios to an earlier one; write it where --out says."""
    from tabulate import tabulate

    from coupalign.bench.result import ratios
    from coupalign.files import write_json

    print(result.table())
    value = result.to_json()

    if earlier:
        earlier_figures = type(result).from_json(earlier).figures()
        value["against"] = ratios(result.figures(), earlier_figures)
        print(f"\nratios to {options.against}")
        print(tabulate(value["against"].items(), tablefmt="plain", floatfmt=".3f"))

    if options.out:
        write_json(options.out, value)
    return Answer(value)


def _bench_kernel(options: argparse.Namespace) -> Answer:
    from coupalign.bench.kernel import bench_kernel, table

    bench = bench_kernel(options.batch)
    print(table(bench))
    return Answer(bench.to_json())


def _bench_registers() -> Answer:
    try:
        from coupalign.kernels.resources import all_cases, measure, table
    except ImportError as error:
        raise InputError(
            f"bench registers compiles with Triton, which is not installed ({error}): "
            "pip install triton"
        ) from error
    from tqdm import tqdm

    cases = all_cases()
    results = list(tqdm(measure(cases), total=len(cases), unit="kernel", desc="compiling"))
    print(table(results))

    faults = [result for result in results if result.fault]
    print(
        f"\n{len(results)} kernels, {len(faults)} with a fault "
        "(shared memory exceeded, or registers spilled on sm_90)"
    )
    rows = [result.row() for result in results]
    return Answer(rows, ok_or_no(not faults))


def _bench_traffic(options: argparse.Namespace) -> Answer:
    from dataclasses import asdict

    from coupalign.config.load import read_config
    from coupalign.costs.traffic import step_traffic, traffic_table

    batch = (options.batch or [32])[-1]
    costs = step_traffic(read_config(options.config, options.overrides), batch)
    print(traffic_table(costs, batch))
    return Answer({"batch": batch, "parts": {name: asdict(cost) for name, cost in costs.items()}})


def _bench_order() -> Answer:
    from coupalign.bench.order import bench_order, table

    bench = bench_order()
    print(table(bench))
    return Answer(bench.to_json(), ok_or_no(not bench.faults))
