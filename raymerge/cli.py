"""The command line: thin, lazy (``raymerge --help`` imports no torch), one line per error."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from raymerge.errors import RaymergeError

if TYPE_CHECKING:
    from raymerge.config import Config
    from raymerge.evaluation import TaskScore

_EPILOG = "Exit codes: 0 done, 1 the run failed, 2 the input is wrong, 130 interrupted."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Results go to stdout, all else to stderr."""
    for stream in (sys.stdout, sys.stderr):  # λ on a Latin-1 terminal is no reason to fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    args = _parser().parse_args(argv)
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING, format="raymerge: %(message)s"
    )
    # `ray job stop` and schedulers send SIGTERM: end as Ctrl-C does, with the state kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except RaymergeError as error:
        return _fail(error, error.exit_code)
    except KeyboardInterrupt:
        print("raymerge: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `raymerge inspect … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        return _fail("out of memory; use fewer workers, more cluster.shards or a micro_batch", 1)
    except Exception as error:
        if args.verbose:
            raise
        hint = "run again with --verbose for the traceback"
        return _fail(f"{type(error).__name__}: {_first_line(error)}; {hint}", 1)
    return code


def _fail(message: object, code: int) -> int:
    print(f"raymerge: error: {' '.join(str(message).splitlines())}", file=sys.stderr)
    return code


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


class _Parser(argparse.ArgumentParser):
    """A wrong command line is one line, as every other error is."""

    def error(self, message: str) -> NoReturn:
        sys.exit(_fail(f"{message}; see `{self.prog} --help`", 2))


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(
        prog="raymerge",
        description="Merge fine-tuned models into one, with coefficients learned from unlabeled "
        "images, on one machine or a Ray cluster.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.set_defaults(run=_version_or_help, verbose=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_demo(commands)
    _add_plan(commands)
    _add_merge(commands)
    _add_eval(commands)
    _add_experiment(commands)
    _add_finetune(commands)
    _add_inspect(commands)
    _add_report(commands)
    for command in commands.choices.values():
        command.add_argument(
            "-v", "--verbose", action="store_true", help="log more, show tracebacks"
        )
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser("demo", help="build a small zoo of models and merge it every way")
    demo.add_argument("--output", default="runs/demo", help="folder to write (default: runs/demo)")
    demo.add_argument("--zoo", help="folder of the zoo (default: a cache in the home directory)")
    demo.add_argument("--seed", type=int, default=0, help="seed of the zoo and the merges")
    demo.set_defaults(run=_demo)


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plan = commands.add_parser("plan", help="check a config and its files; estimate what it takes")
    _add_config(plan)
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan.set_defaults(run=_plan)


def _add_merge(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    merge = commands.add_parser("merge", help="merge, evaluate, write the output folder")
    _add_config(merge)
    merge.add_argument("--output", help="folder to write (default: the config's output)")
    how = merge.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="continue the run in the output folder")
    how.add_argument(
        "--overwrite", action="store_true", help="replace the run in the output folder"
    )
    merge.set_defaults(run=_merge)


def _add_eval(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    evaluate = commands.add_parser("eval", help="score a model on the config's test images")
    _add_config(evaluate)
    evaluate.add_argument(
        "--model", help="an output folder or a checkpoint, or `individual` (default: pretrained)"
    )
    evaluate.add_argument("--json", action="store_true", help="print the scores as JSON")
    evaluate.set_defaults(run=_eval)


def _add_experiment(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    experiment = commands.add_parser("experiment", help="run one of the papers' experiments")
    _add_config(experiment)
    experiment.add_argument("--output", help="folder to write (default: the config's output)")
    experiment.add_argument(
        "--overwrite", action="store_true", help="replace the experiment in the output folder"
    )
    experiment.set_defaults(run=_experiment)


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    inspect = commands.add_parser("inspect", help="what is in this checkpoint")
    inspect.add_argument("checkpoint")
    inspect.add_argument("--json", action="store_true", help="print as JSON")
    inspect.set_defaults(run=_inspect)


def _add_finetune(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    finetune = commands.add_parser(
        "finetune", help="train experts, and the joint multi-task reference"
    )
    _add_config(finetune)
    finetune.add_argument("--output", help="folder to write (default: the config's output)")
    finetune.add_argument(
        "--resume", action="store_true", help="continue the training in the output folder"
    )
    finetune.set_defaults(run=_finetune)


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    report = commands.add_parser("report", help="draw the report of a run or a demo again")
    report.add_argument("folder")
    report.set_defaults(run=_report)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file")
    parser.add_argument(
        "-o", dest="overrides", action="append", default=[], metavar="KEY.PATH=VALUE",
        help="override a config value, e.g. -o optimizer.steps=50",
    )  # fmt: skip


# --- commands: each imports what it needs when it runs ------------------------------------------


def _version_or_help(args: argparse.Namespace) -> int:
    if args.version:
        from raymerge import __version__

        print(f"raymerge {__version__}")
        return 0
    _parser().print_help()
    return 0


def _config(args: argparse.Namespace) -> Config:
    from raymerge.config import load_config

    return load_config(args.config, args.overrides)


def _plan(args: argparse.Namespace) -> int:
    config = _config(args)
    from raymerge.plan import check, plan_text
    from raymerge.session import known_resources

    plan, problems = check(config, known_resources(config), probe=True)
    for problem in problems:
        _fail(problem, 2)
    if plan is not None and not problems:
        print(json.dumps(plan.to_json(), indent=2) if args.json else plan_text(plan))
    return 2 if problems else 0


def _merge(args: argparse.Namespace) -> int:
    config = _config(args)
    if args.output is not None:
        config = config.model_copy(update={"output": str(Path(args.output).absolute())})
    from raymerge.checkpoints.digests import hash_ahead

    hash_ahead([config.model.reference, *(str(task.checkpoint) for task in config.models)])
    from raymerge.merging.registry import describe
    from raymerge.session import merge

    result = merge(config, resume=args.resume, overwrite=args.overwrite)
    if result.scores:
        _print_scores(describe(config.method), result.scores)
    print(f"written to {result.output}")
    return 0


def _eval(args: argparse.Namespace) -> int:
    config = _config(args)
    from raymerge.evaluation import results_json
    from raymerge.session import evaluate

    name = args.model or "pretrained"
    scores = evaluate(config, args.model)
    if args.json:
        print(json.dumps(results_json(name, scores), indent=2))
    else:
        _print_scores(name, scores)
    return 0


def _experiment(args: argparse.Namespace) -> int:
    from raymerge.config.experiments import load_experiment

    config = load_experiment(args.config, args.overrides, args.output)
    from raymerge.experiments.run import run_experiment

    print(run_experiment(config, overwrite=args.overwrite))
    return 0


def _finetune(args: argparse.Namespace) -> int:
    config = _config(args)
    if args.output is not None:
        config = config.model_copy(update={"output": str(Path(args.output).absolute())})
    from raymerge.finetune.run import finetune

    result = finetune(config, resume=args.resume)
    for title, scores in (("experts", result.experts), ("joint", result.joint)):
        if scores:
            _print_scores(title, scores)
    print(f"written to {result.output}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from raymerge.checkpoints.inspect import inspect_checkpoint, inspection_text

    inspection = inspect_checkpoint(args.checkpoint)
    print(json.dumps(inspection, indent=2) if args.json else inspection_text(inspection))
    return 0


def _report(args: argparse.Namespace) -> int:
    from raymerge.report import write_plots, write_report

    write_plots(Path(args.folder))
    print(write_report(Path(args.folder)))
    return 0


def _demo(args: argparse.Namespace) -> int:
    from raymerge.demo import run_demo

    print(run_demo(Path(args.output), None if args.zoo is None else Path(args.zoo), args.seed))
    return 0


def _print_scores(title: str, scores: Mapping[str, TaskScore]) -> None:
    width = max(len(name) for name in [*scores, "mean"])
    print(title)
    for name, score in scores.items():
        print(f"  {name:<{width}}  {score.top1:7.2%}  of {score.examples}")
    mean = sum(score.top1 for score in scores.values()) / len(scores)
    print(f"  {'mean':<{width}}  {mean:7.2%}")


if __name__ == "__main__":
    sys.exit(main())
