"""The command `btrain <command> …`: picks the task and hands the rest to Hydra.

Imports no torch before the configuration is known to be right, so that help and mistakes answer
at once.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NoReturn
from uuid import uuid4

from btrain import __version__, own
from btrain.errors import Interrupted, UserError
from btrain.processes.launched import (
    by_torchrun,
    check_alone,
    check_variables,
    first_complains,
    is_first,
    processes,
)
from btrain.processes.parent import not_outliving, watched_workers
from btrain.terminal import complain, say, show, spell_out, tell

if TYPE_CHECKING:
    from btrain.settings.compose import Task

USAGE = """\
usage: btrain <command> …

commands:
  train [option=value …]           train a robust network, evaluate it, leave a run folder
  plan [option=value …]            what that training will take: steps, time, memory, disk
  eval checkpoint=RUN|FILE …       attack a trained network, check that the numbers can be believed
  eval compare A B                 a paired test of two evaluations
  data corrupt [option=value …]    make the corrupted test set of a data set
  paper TARGET [option=value …]    the paper's tables and figures: train, evaluate, report
  report RUN [RUN …]               finished runs side by side; the first is the baseline
  report [--watch] FOLDER          the paper's tables and figures from a folder of plans and runs
  export checkpoint=RUN …          a trained network as a file for other projects
  bench [option=value …]           how long a training step takes, beside what arithmetic allows

to begin, with images that come with btrain:
  btrain train dataset=digits model=small_cnn attack.epsilon=0.1 recipe.lr=0.1 train.epochs=10

`btrain <command> --help` tells more, `btrain --version` the version;
`eval "$(btrain --completion bash)"`, or zsh or fish, completes these words at Tab.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        show(USAGE, end="")
        return 0 if args else 2
    if args[0] == "--version":
        show(f"btrain {__version__}")
        return 0
    if args[0] == "--complete":  # as the shells' scripts ask
        from btrain.completion import candidates

        show("".join(f"{word}\n" for word in candidates(args[1:])), end="")
        return 0
    if args[0] == "--completion":
        return _completion(args[1:])
    if args[0] not in COMMANDS:
        from btrain.settings.hints import meant

        close = meant(args[0], COMMANDS)
        hint = f"Did you mean {close}?" if close else "btrain --help lists them."
        complain(f"there is no command {args[0]}. {hint}")
        return 2
    try:
        check_variables()
        if args[0] != "train":
            check_alone(f"btrain {args[0]}")
        with not_outliving(os.getppid()) if by_torchrun() else nullcontext():
            COMMANDS[args[0]](args[1:])
    except UserError as error:
        complain(error)
        return 1
    except BrokenPipeError:  # `btrain train --help | head`
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        complain(f"{where}{error.strerror or error}.")
        return 1
    except SystemExit as end:  # how Hydra's help and a job with a mistake end
        return end.code if isinstance(end.code, int) else 1
    except Interrupted as stop:
        if is_first():
            complain(stop)
        return 128 + stop.number
    except KeyboardInterrupt:
        if is_first():
            hint = "; the same command goes on from what is done" if args[0] in _GO_ON else ""
            complain(f"interrupted{hint}.")
        return 130
    return 0


def run_command() -> NoReturn:
    """Run the command of this process, and end the process."""
    spell_out()
    status = main()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is left to be told
    if status and processes() > 1:
        # gloo's threads are left running, for they could not be waited for: another process may
        # have failed. In an interpreter that takes itself apart they now and then abort.
        with suppress(OSError):  # `torchrun … | head`
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _completion(args: list[str]) -> int:
    """Show what makes a shell complete the words of btrain."""
    from btrain.completion import script

    try:
        show(script(" ".join(args)), end="")
    except UserError as error:
        complain(error)
        return 1
    return 0


def _train(args: list[str]) -> None:
    """Run `btrain.training.train`, once a job."""
    from btrain.settings import compose as configs

    as_typed = {configs.with_path_quoted(word): word for word in args}

    def run(config: Any) -> float | None:
        from btrain.training import train

        typed = [as_typed.get(word, word) for word in configs.words_of_job()]
        summary = train(config, jobs=configs.jobs_at_once(), overrides=typed)
        if is_first() and not configs.is_sweep():
            from btrain.training.lines import in_words

            if (words := in_words(config, summary)) is not None:
                say(words)
            run = shlex.quote(config.run.dir)
            _say_next(
                [f"btrain eval checkpoint={run} {_looked_at(config)}", f"btrain report {run}"]
            )
        return summary.get("best_val_acc")  # what a sweeper that searches goes by

    args = configs.arranged(args)
    with _table_at_the_end(args) as place:
        _run_with_hydra("train", args, run, place)


@contextmanager
def _table_at_the_end(args: list[str]) -> Iterator[Path | None]:
    """Give the jobs of a sweep a folder to tell of themselves in, and show a table of them.

    None without a sweep. Whoever interrupts one sees none.
    """
    from btrain.settings.compose import is_sweep_asked_for

    if not is_sweep_asked_for(args):
        yield None
        return
    with TemporaryDirectory(prefix="btrain-") as folder:
        place = Path(folder)
        try:
            yield place
        except (Exception, SystemExit):
            with suppress(OSError, UserError):  # which would hide what ended the sweep
                _show_sweep(place)
            raise
        _show_sweep(place)


def _show_sweep(place: Path) -> None:
    from btrain.report.sweep import next_commands, sweep_table
    from btrain.runs.sweep import heard

    if jobs := heard(place):
        show(f"\n{sweep_table(jobs)}\n")
        _say_next(next_commands(jobs))


def _looked_at(config: Any) -> str:
    """Return what an evaluation of a run is given: attacks that fit, bounds, its own code."""
    from btrain.settings.method import VerifiedConfig

    words = ["attack=clean,pgd20" if config.attack.name.name == "own" else "attack=all"]
    if isinstance(config.defense, VerifiedConfig):
        words.append(f"verify={config.defense.engine}")
    words += [
        f"{group}.factory={shlex.quote(factory)}"
        for group, (factory, _) in own.parts(config).items()
        if group in ("model", "dataset", "attack")
    ]
    return " ".join([*words, "report=true"])


def _say_next(commands: Sequence[str]) -> None:
    """Say what to type next."""
    for number, command in enumerate(commands):
        say(f"{'      ' if number else 'Next: '}{command}")


def _plan(args: list[str]) -> None:
    """Run `btrain.training.foresee.foresee`, once a job; tell the sum of a sweep."""
    from btrain.settings import compose as configs

    args = configs.arranged(args)
    summary = "tell what that training will take: steps, time, memory, disk; train nothing"
    told = replace(configs.TASKS["train"], command="plan", summary=summary)
    with TemporaryDirectory(prefix="btrain-") as folder:  # jobs may be processes of their own
        place = Path(folder)

        def run(config: Any) -> None:
            from btrain.training.foresee import foresee

            found = foresee(config)
            show(found.sentences())
            with suppress(OSError):
                (place / f"{uuid4()}.json").write_text(json.dumps(asdict(found)))

        # Hydra would leave a file of a sweep in runs/; submitit's jobs write into its folder.
        is_sweep = configs.is_sweep_asked_for(args)
        if is_sweep and not any("submitit" in word for word in args):
            args = [word for word in args if not word.lstrip("+").startswith("hydra.sweep.dir=")]
            args.append(f"hydra.sweep.dir={configs.quoted(str(place))}")
        _run_with_hydra("train", args, run, told=told)
        if len(files := [*place.glob("*.json")]) > 1:
            from btrain.training.foresee import Foreseen, in_all

            show(f"\n{in_all([Foreseen(**json.loads(file.read_text())) for file in files])}")


def _data(args: list[str]) -> None:
    """Run `btrain.corruptions.generate.corrupt_dataset`, once a job."""
    if args and args[0] in ("-h", "--help"):
        show("usage: btrain data corrupt [option=value …]; see btrain data corrupt --help.")
        return
    if not args or args[0] != "corrupt":
        raise UserError("data needs to know what to do: btrain data corrupt [option=value …].")

    def run(config: Any) -> None:
        from btrain.corruptions.generate import corrupt_dataset

        corrupt_dataset(config)

    from btrain.settings.compose import arranged

    _run_with_hydra("corrupt", arranged(args[1:]), run)


def _run_with_hydra(
    task: str,
    args: list[str],
    run: Callable[[Any], object],
    place: Path | None = None,
    told: Task | None = None,
) -> None:
    """Compose the task's configuration with Hydra and run it, once a job.

    Args:
        args: arranged.
        place: the folder in which the jobs of a sweep tell of themselves.
        told: the command and its summary for `--help`, where they are not the task's own.
    """
    from btrain.settings import compose as configs

    if configs.is_sweep_asked_for(args):
        check_alone("--multirun")
    if "--help" in args:
        from btrain.settings.help import help_text

        show(help_text(args, task, told), end="")
        return
    configs.check_words(args, task)
    folder = configs.user_folder(args)

    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from btrain.runs.sweep import Job

    before, argv = os.environ.get("HYDRA_FULL_ERROR"), sys.argv
    full_error, sweep = before == "1", os.getpid()
    failed: list[int] = []  # jobs of a sweep within this process

    def job(cfg: Any) -> object:
        """Run one job, and return what it came to.

        By joblib's or submitit's launcher it is pickled, and runs in a process of its own.
        """
        spell_out()
        configs.register()
        hydra_config = HydraConfig.get()
        told = None if place is None else Job(hydra_config.job.num, [])
        try:
            if hydra_config.mode is not RunMode.RUN:
                check_alone("a sweep")
            overrides = configs.resolved(hydra_config.overrides.task)
            if told is not None:
                told.overrides = overrides
            with first_complains():
                cfg, notes = configs.without_replaced(cfg, overrides)
                config = configs.from_hydra(cfg, overrides, folder)
            for note in notes if is_first() else ():
                tell(note)
            if told is not None and place is not None:
                told.folder, told.looked_at = config.run.dir, _looked_at(config)
                told.tell(place)
            own.allow_parts(config)
            configs.check_search(config, hydra_config)
            of_joblib = hydra_config.runtime.choices["hydra/launcher"] == "joblib"
            alone = not of_joblib or os.getpid() == sweep
            with nullcontext() if alone else not_outliving(sweep):
                return run(config)
        except Exception as error:
            if told is not None and place is not None:
                told.failed = str(error) if isinstance(error, UserError) else repr(error)
                told.tell(place)
            vars(error)[_OF_A_JOB] = hydra_config.runtime.choices["hydra/launcher"]
            if full_error or not isinstance(error, UserError):
                raise
            complain(error)
            if hydra_config.mode is RunMode.RUN or processes() > 1:
                sys.exit(1)
            choices = hydra_config.runtime.choices
            if (choices["hydra/launcher"], choices["hydra/sweeper"]) == ("basic", "basic"):
                failed.append(hydra_config.job.num)
                return None
            raise  # Hydra goes on with the sweep and raises this again at its end

    configs.register()
    configs.loosen(args)
    of_joblib = "hydra/launcher=joblib" in args and find_spec("joblib") is not None
    watched = watched_workers(sweep) if of_joblib else nullcontext()
    main = hydra.main(version_base="1.3", config_path=configs.config_dir(), config_name=task)(job)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise its errors instead of printing them
    sys.argv = [f"btrain {configs.TASKS[task].command}", *args]
    try:
        with _interrupted_by_sigterm(), watched:
            main()
        if failed:
            sys.exit(1)
    except Exception as error:
        of_a_job = vars(error).get(_OF_A_JOB)
        # A folder that cannot be written has an errno; Hydra's errors of files have none.
        if full_error or (isinstance(error, OSError) and error.errno is not None):
            raise
        if type(error).__name__ in _NO_RESULT:
            raise UserError(
                "a job of the sweep ended without a result, killed perhaps; the same command goes "
                "on from what is done."
            ) from None
        if of_a_job is None:
            with first_complains():
                raise configs.explain(error, args, task) from None
        # Jobs of submitit write to files of their own: their complaints were not heard here.
        if isinstance(error, UserError) and not str(of_a_job).startswith("submitit"):
            sys.exit(1)
        raise
    finally:
        sys.argv = argv
        del os.environ["HYDRA_FULL_ERROR"]
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


_OF_A_JOB = "btrain_launcher"
"""The attribute of an exception that came out of a job, not out of Hydra: the job's launcher."""


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM raise, as SIGINT does, so that joblib's launcher ends its processes as well.

    A training has a handler of its own.
    """

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted(number)

    of_main_thread = threading.current_thread() is threading.main_thread()
    if not of_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


_NO_RESULT = ("TerminatedWorkerError", "UncompletedJobError")
"""The errors that joblib's and submitit's launcher raise when a job's process is gone."""


def _report(args: list[str]) -> None:
    """Show runs side by side, or write or watch the sheets of a folder of plans."""
    from btrain.report import command

    if {"-h", "--help"} & set(args):
        show(command.HELP, end="")
        return
    wanted = command.parse(args)
    from btrain.paper.plan import holds_plans

    if not wanted.are_of_plans and not any(map(holds_plans, wanted.folders)):
        from btrain.report import compare

        show(compare(wanted.folders, merge_seeds=wanted.merge_seeds))
        return
    folder = wanted.folder_of_plans()
    if wanted.watch:
        from btrain.paper.sheets.watch import watch

        watch(folder, wanted.targets)
        return
    from btrain.paper.sheets.files import show_sheets

    show_sheets(folder, wanted.out or folder / "report", wanted.targets)


def _eval(args: list[str]) -> None:
    """Evaluate a checkpoint, or compare two evaluations."""
    from btrain.settings import evaluation as words

    if {"-h", "--help"} & set(args):
        show(words.HELP, end="")
        return
    if args[:1] == ["compare"]:
        folder_a, folder_b, attack = words.parse_compare(args[1:])
        from btrain.evaluation.compare import compare_folders

        say(compare_folders(folder_a, folder_b, attack).sentence())
        return
    settings = words.parse(args)
    from btrain.evaluation.run import evaluate_checkpoint
    from btrain.report.evaluation import describe, write_page

    found = evaluate_checkpoint(settings)
    page = write_page(found.folder) if settings.report else None
    show(describe(found, page))


def _export(args: list[str]) -> None:
    """Write a trained network in another project's format."""
    from btrain.exchange.command import run

    made = run(args)
    if made is not None and made[0].model_card:
        from btrain.report.card import write_card

        export, saved, parameters = made
        for path in write_card(Path(export.out), saved, export.format, parameters):
            say(f"Written to {path}.")


def _bench(args: list[str]) -> None:
    """Measure training steps."""
    from btrain.bench.command import run

    run(args)


def _paper(args: list[str]) -> None:
    """Make tables and figures of the paper."""
    from btrain.paper.command import run

    run(args, main)


COMMANDS = {
    "train": _train,
    "plan": _plan,
    "eval": _eval,
    "data": _data,
    "paper": _paper,
    "report": _report,
    "export": _export,
    "bench": _bench,
}

_GO_ON = ("train", "eval", "data", "paper")
"""Commands that do not begin anew what an interrupted one has done."""
