"""The command `btrain bench`: its settings and what it does, importing torch only to do it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from btrain.errors import UserError
from btrain.settings import compose as configs
from btrain.settings import hints
from btrain.settings.bench import BenchConfig, BenchRun
from btrain.terminal import overwrite, show

_HELP = """\
btrain bench [bench.option=value …] [option=value …]    how long a training step takes

Measured in turns in one process: TRADES as published (official), the plain defense (lean),
BulletTrain, and as a control BulletTrain by masks, which must be no faster than lean.
Settings without bench. are those of btrain train, the same for all.

btrain bench gpu [bench.seconds=240] [bench.out=FILE.json]
                    a fixed set for one CUDA device; writes results/gpu/<device>-<date>.json and .md

== Settings (key=value) ==
"""


def run(args: Sequence[str]) -> None:
    """Measure, print a table, write what was asked for.

    Raises:
        UserError: a setting is wrong, or a file cannot be read or written.
    """
    if {"-h", "--help"} & set(args):
        path = Path(configs.config_dir()) / "bench.yaml"
        show(_HELP + path.read_text(encoding="utf-8").split("\nbench:\n")[1].split("\nhydra:")[0])
        return
    if args[:1] == ["gpu"]:
        bench, _ = parse(args[1:])
        for argument in args[1:]:
            if not argument.startswith(("bench.seconds=", "bench.out=")):
                raise UserError(f"{argument}: bench gpu takes bench.seconds and bench.out alone.")
        from btrain.bench.gpu import run_gpu

        out = None if bench.out is None else Path(bench.out)
        path = run_gpu(_tell, limit=bench.seconds, out=out)
        show(path.with_suffix(".md").read_text(encoding="utf-8"), end="")
        return
    bench, settings = parse(args)
    if bench.seconds is not None:
        raise UserError("bench.seconds is a setting of btrain bench gpu alone.")
    from btrain.bench.measure import run_bench
    from btrain.bench.output import table

    run_bench(bench, settings, _tell, lambda found: show(table(found["rows"], found["details"])))


_OF_A_RUN = ("bench.defenses", "bench.models", "bench.fractions", "bench.boundary_fractions")


def parse(args: Sequence[str]) -> tuple[BenchConfig, list[str]]:
    """Return the bench's own settings, checked, and the others as they are.

    Raises:
        UserError: a setting of the bench is unknown, of another type or out of range.
    """
    keys = [f"bench.{item.name}" for item in fields(BenchConfig)]
    if split := hints.several_words(args):
        raise UserError(split)
    for position, argument in enumerate(args):
        key = argument.partition("=")[0]
        if argument.startswith("-"):
            raise UserError(hints.option(args[position:], keys, "btrain bench"))
        if "=" not in argument:
            raise UserError(f"{argument} is not of the form key=value; see btrain bench --help.")
        if f"bench.{key}" in keys and key != "trust_code":
            raise UserError(f"There is no setting {key}. Did you mean bench.{key}?")
    args = [configs.with_path_quoted(argument) for argument in args]
    args = [f"bench.{word}" if word.startswith("trust_code=") else word for word in args]
    own = [argument for argument in args if argument.lstrip("+~").startswith("bench.")]
    bench = compose(own)
    for argument in own if bench.checkpoint is not None else ():
        if argument.startswith(_OF_A_RUN):
            raise UserError(f"{argument}: with bench.checkpoint that is the run's.")
    return bench, [argument for argument in args if argument not in own]


def compose(overrides: Sequence[str] = ()) -> BenchConfig:
    """Return the settings of `btrain bench <overrides>`.

    Raises:
        UserError: as `parse`.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for override in overrides:
        if override.startswith(("+", "~")):
            raise UserError(f"{override} adds or removes a setting; please give key=value.")
    cfg: Any = configs.composed(overrides, "bench")
    try:
        found = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise configs.explain(error, overrides, "bench") from error
    assert isinstance(found, BenchRun)
    return found.bench


def _tell(message: str) -> None:
    """Say where the bench is, over the line before; nothing where nobody watches."""
    if sys.stderr.isatty():
        overwrite(message)
