"""The command line: one line per error, results on stdout.

Each command imports the libraries it needs when it runs, so ``raymerge --help`` is instant.
"""

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

from raymerge.errors import (
    RaymergeError,
    UserError,
    escape_unprintable,
    one_line,
    printable_lines,
    shorten,
    unknown_name,
)
from raymerge.files.urls import redact

if TYPE_CHECKING:
    from raymerge.apps.peers.job import Job
    from raymerge.config import Config
    from raymerge.engine.scores import TaskScore

_EPILOG = "Exit codes: 0 done, 1 the run failed, 2 the input is wrong, 130 interrupted."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Results go to stdout, the rest to stderr."""
    for stream in (sys.stdout, sys.stderr):  # a Latin-1 terminal cannot show λ
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    args = _parser().parse_args(argv)
    handler = logging.StreamHandler()
    handler.setFormatter(_Redacting("raymerge: %(message)s"))
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, handlers=[handler])
    # `ray job stop` and schedulers send SIGTERM: end as Ctrl-C does, with the state kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except RaymergeError as error:
        return _fail(error, error.exit_code)
    except KeyboardInterrupt:
        hint = "; --resume continues it" if getattr(args, "resume", None) is not None else ""
        print(f"raymerge: interrupted{hint}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `raymerge inspect … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        return _fail("out of memory; use fewer workers, more cluster.shards or a micro_batch", 1)
    except Exception as error:
        if args.verbose:
            raise
        reason = one_line(error) if str(error) else "no message"
        hint = "run again with --verbose for the traceback"
        return _fail(f"{type(error).__name__}: {reason}; {hint}", 1)
    return code


class _Redacting(logging.Formatter):
    """Remove credentials from log lines: libraries log URLs with their signatures."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(redact(super().format(record)))


def _fail(message: object, code: int) -> int:
    text = shorten(escape_unprintable(redact(str(message))))
    print(f"raymerge: error: {text}", file=sys.stderr)
    return code


def _say(text: object) -> None:
    """Print a result: names from files may hold codes that move a terminal's cursor."""
    print(printable_lines(str(text)))


class _Parser(argparse.ArgumentParser):
    """Report a wrong command line in one line, as every other error."""

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
    # One function per command, in the order of --help.
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_demo(commands)
    _add_plan(commands)
    _add_merge(commands)
    _add_submit(commands)
    _add_eval(commands)
    _add_experiment(commands)
    _add_finetune(commands)
    _add_inspect(commands)
    _add_convert(commands)
    _add_report(commands)
    _add_data(commands)
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
    merge.add_argument(
        "--also", action="append", default=[], choices=["hf", "state_dict"],
        help="write the merged model as Hugging Face's too (OUTPUT/hf), or as a plain state dict "
        "(OUTPUT/state_dict.pt)",
    )  # fmt: skip
    merge.add_argument(
        "--push-to-hub", metavar="ORG/NAME", help="publish the merged model on Hugging Face's hub"
    )
    merge.add_argument("--private", action="store_true", help="where only you see it")
    merge.set_defaults(run=_merge)


def _add_submit(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    submit = commands.add_parser("submit", help="merge as a job of a running Ray cluster")
    _add_config(submit)
    submit.add_argument(
        "--address", help="its dashboard's URL, http://HEAD:8265 (default: $RAY_ADDRESS)"
    )
    submit.add_argument("--output", help="folder to write, on the cluster's shared storage")
    submit.add_argument(
        "--root", metavar="DIR", help="the cluster's folder that relative paths start from"
    )
    submit.add_argument(
        "--no-wait", action="store_true", help="print the job's id and leave it running"
    )
    submit.set_defaults(run=_submit)


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
    inspect = commands.add_parser("inspect", help="show what is in a checkpoint")
    inspect.add_argument("checkpoint")
    inspect.add_argument("--json", action="store_true", help="print as JSON")
    inspect.set_defaults(run=_inspect)


def _add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    convert = commands.add_parser("convert", help="write a whole model in another format")
    convert.add_argument("checkpoint", help="a folder, a file or a hub id (hf-hub:ORG/NAME)")
    convert.add_argument("destination", help="folder to write")
    convert.add_argument("--to", required=True, choices=["open_clip", "hf"])
    convert.add_argument(
        "--arch",
        help="an open_clip architecture or a config JSON, where no config is beside the weights",
    )
    convert.add_argument(
        "--no-verify", action="store_true",
        help="do not compare open_clip's and transformers' outputs, where both are installed",
    )  # fmt: skip
    convert.set_defaults(run=_convert)


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


def _add_data(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    data = commands.add_parser("data", help="get the data sets of the literature's suites")
    verbs = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    prepare = verbs.add_parser("prepare", help="fetch a suite's data sets, check and lay them out")
    prepare.add_argument(
        "--suite", default="vit-8", help="vit-8, vit-14, vit-20, … (default: vit-8)"
    )
    prepare.add_argument("--only", nargs="+", metavar="TASK", help="some of its data sets")
    prepare.add_argument("--root", default="data", help="folder to write into (default: data)")
    prepare.add_argument("--json", action="store_true", help="print the result as JSON")
    prepare.add_argument("-v", "--verbose", action="store_true", help="log more, show tracebacks")
    prepare.set_defaults(run=_prepare)


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
    from raymerge.config import Config

    config = _config_or_job(args)
    if not isinstance(config, Config):
        raise UserError(
            f"config {args.config}: a {config.tool} file of state dicts, for merge and plan only"
        )
    return config


def _config_or_job(args: argparse.Namespace) -> Config | Job:
    """Return the file's config, or the job that a mergekit or fusion_bench file describes."""
    from raymerge.apps.peers import open_foreign
    from raymerge.config import load_config

    return open_foreign(args.config, args.overrides) or load_config(args.config, args.overrides)


def _plan_job(job: Job, args: argparse.Namespace) -> int:
    _say(json.dumps(job.to_json(), indent=2) if args.json else job.text_plan())
    return 0


def _merge_job(job: Job, args: argparse.Namespace) -> int:
    if args.resume:
        raise UserError("--resume: a merge of state dicts has no steps to resume; run it again")
    if args.also:
        raise UserError(
            "--also: a merge of state dicts is written as its config says; leave it out"
        )
    if args.push_to_hub is not None:
        raise UserError("--push-to-hub: not for a merge of state dicts; use `hf upload`")
    _say(f"written to {job.run(args.output, overwrite=args.overwrite)}")
    return 0


def _plan(args: argparse.Namespace) -> int:
    from raymerge.config import Config

    config = _config_or_job(args)
    if not isinstance(config, Config):
        return _plan_job(config, args)
    from raymerge.runs.plan.make import check_headers
    from raymerge.runs.plan.plan import plan_text
    from raymerge.runs.workers import known_resources

    plan, problems = check_headers(config, known_resources(config), probe=True)
    for problem in problems:
        _fail(problem, 2)
    if plan is not None and not problems:
        _say(json.dumps(plan.to_json(), indent=2) if args.json else plan_text(plan))
    return 2 if problems else 0


def _merge(args: argparse.Namespace) -> int:
    from raymerge.config import Config

    config = _config_or_job(args)
    if not isinstance(config, Config):
        return _merge_job(config, args)
    if args.output is not None:
        config = config.model_copy(update={"output": str(Path(args.output).absolute())})
    if args.push_to_hub is not None:
        _require_target(config, args.push_to_hub)
    from raymerge.models.checkpoints.digests import hash_ahead

    hash_ahead([config.model.reference, *(str(task.checkpoint) for task in config.models)])
    from raymerge.merging.registry import describe
    from raymerge.runs.merge import merge

    result = merge(config, resume=args.resume, overwrite=args.overwrite, also=args.also)
    if result.scores:
        _print_scores(describe(config.method), result.scores)
    _say(f"written to {result.output}")
    if args.push_to_hub is not None and result.output is not None:
        from raymerge.runs.publish import push

        _say(f"published as {push(result.output, args.push_to_hub, private=args.private)}")
    return 0


def _submit(args: argparse.Namespace) -> int:
    from raymerge.apps.submit import dashboard_address, prepare

    address = dashboard_address(args.address)
    submission = prepare(args.config, args.overrides, root=args.root, output=args.output)
    from raymerge.distributed.jobs import submit

    def log(line: str) -> None:
        print(redact(f"raymerge: {line}"), file=sys.stderr)

    return submit(address, submission, wait=not args.no_wait, log=log)


def _require_target(config: Config, repository: str) -> None:
    from raymerge.merging.registry import method_of
    from raymerge.runs.publish import require_target

    if not method_of(config.method).merges:
        raise UserError(
            f"--push-to-hub: method {config.method.name} writes no model to publish; drop it"
        )
    require_target(repository)


def _eval(args: argparse.Namespace) -> int:
    config = _config(args)
    from raymerge.engine.scores import results_json
    from raymerge.runs.merge import evaluate

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
    from raymerge.apps.experiments.run import run_experiment

    _say(run_experiment(config, overwrite=args.overwrite))
    return 0


def _finetune(args: argparse.Namespace) -> int:
    config = _config(args)
    if args.output is not None:
        config = config.model_copy(update={"output": str(Path(args.output).absolute())})
    from raymerge.apps.finetune.run import finetune

    result = finetune(config, resume=args.resume)
    for title, scores in (("experts", result.experts), ("joint", result.joint)):
        if scores:
            _print_scores(title, scores)
    _say(f"written to {result.output}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from raymerge.models.checkpoints.inspect import inspect_checkpoint, inspection_text

    inspection = inspect_checkpoint(args.checkpoint)
    _say(json.dumps(inspection, indent=2) if args.json else inspection_text(inspection))
    return 0


def _convert(args: argparse.Namespace) -> int:
    from raymerge.models.convert import convert

    destination = Path(args.destination)
    difference = convert(
        args.checkpoint, destination, args.to, args.arch, verify=not args.no_verify
    )
    if difference is not None:
        print(f"cosines of open_clip and transformers agree to {difference:.1e}")
    _say(f"written to {destination}")
    return 0


def _prepare(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from raymerge.config.suites import load_suite
    from raymerge.data.prepare import from_hub, prepare, results_text

    name = f"vit-{args.suite}" if args.suite.isdigit() else args.suite
    suite = load_suite(name)
    members = [data_set.name for data_set in suite.data_sets]
    for member in args.only or ():
        if member not in members:
            raise UserError(f"--only: {unknown_name(member, members)}")
    data_sets = [each for each in suite.data_sets if each.name in (args.only or members)]
    done = prepare(data_sets, Path(args.root), from_hub, lambda line: print(line, file=sys.stderr))
    if args.json:
        print(json.dumps([asdict(each) for each in done], indent=2))
    else:
        _say(results_text(done, name, Path(args.root)))
    return 0 if all(each.ready for each in done) else 1


def _report(args: argparse.Namespace) -> int:
    from raymerge.report import write_plots, write_report

    write_plots(Path(args.folder))
    _say(write_report(Path(args.folder)))
    return 0


def _demo(args: argparse.Namespace) -> int:
    from raymerge.apps.demo import run_demo

    _say(run_demo(Path(args.output), None if args.zoo is None else Path(args.zoo), args.seed))
    return 0


def _print_scores(title: str, scores: Mapping[str, TaskScore]) -> None:
    width = max(len(name) for name in [*scores, "mean"])
    _say(title)
    for name, score in scores.items():
        _say(f"  {name:<{width}}  {score.top1:7.2%}  of {score.examples}")
    mean = sum(score.top1 for score in scores.values()) / len(scores)
    print(f"  {'mean':<{width}}  {mean:7.2%}")


if __name__ == "__main__":
    sys.exit(main())
