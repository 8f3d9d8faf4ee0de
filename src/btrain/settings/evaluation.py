"""The settings of `btrain eval`, from its words; without torch, so that mistakes answer at once."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from btrain.errors import UserError
from btrain.settings import Config, hints, words
from btrain.settings.checks import gibibytes, pixels, positive, seed_in_range, whole
from btrain.settings.names import ANY, ENGINES

LOSSES = ("ce", "kl", "cw", "dlr")
INTERVAL_LOSSES = ("cw", "ce")
NORMS = ("linf", "l2")
PRECISIONS = ("float32", "bf16")


@dataclass(frozen=True)
class PgdSettings:
    """PGD's settings but for norm and ε.

    Attributes:
        step_size: in [0, 1] pixel units; None for that of the run's own evaluation, or ε/10.
    """

    steps: int
    restarts: int = 1
    loss: str = "ce"
    step_size: float | None = None
    last_iterate: bool = False

    @property
    def name(self) -> str:
        """Return the name of settings that are no preset, for their files: `pgd50x5-cw`."""
        size = "" if self.step_size is None else f"-step{self.step_size:.4g}"
        last = "-last" if self.last_iterate else ""
        return f"pgd{self.steps}x{self.restarts}-{self.loss}{size}{last}"


@dataclass(frozen=True)
class IntervalSettings:
    """MixTrain's interval attack's settings but for ε; lengths in [0, 1] pixel units.

    Attributes:
        steps: between two jumps, and after the last.
        step_size: None for ε/30.
        jumps: in each of the first two restarts; later ones take one.
        jump: their length; at 1 an image lands on a corner of the box.
        radius: of the first region around a point that is bounded.
    """

    steps: int = 40
    restarts: int = 1
    loss: str = "cw"
    step_size: float | None = None
    jumps: int = 3
    jump: float = 1.0
    radius: float = 0.01

    @property
    def name(self) -> str:
        """Return the name of settings that are no preset, for their files: `interval20x1-cw`."""
        changed = {key: getattr(self, key) for key in ("step_size", "jumps", "jump", "radius")
                   if getattr(self, key) != getattr(IntervalSettings, key)}  # fmt: skip
        others = "".join(f"-{key.replace('_size', '')}{v:.4g}" for key, v in changed.items())
        return f"interval{self.steps}x{self.restarts}-{self.loss}{others}"


def words_for(attack: str) -> str:
    """Return the words of `btrain eval` that make an attack of this name: `attack.steps=50`."""
    if (jumping := _OWN_INTERVAL.fullmatch(attack)) is not None:
        typed = [f"attack.{key}={value}" for key, value in jumping.groupdict().items() if value]
        return " ".join(["attack=interval", *typed])
    own = _OWN_PGD.fullmatch(attack)
    if own is None:
        return f"attack={attack}"
    usual = {"steps": "20", "restarts": "1", "loss": "ce", "step_size": None}
    changes = [f"attack.{key}={own[key]}" for key in usual if own[key] not in (usual[key], None)]
    preset = ["attack=pgd20"] if attack.endswith("-last") else []
    return " ".join([*preset, *changes]) or "attack=custom"


_OWN_PGD = re.compile(
    r"pgd(?P<steps>\d+)x(?P<restarts>\d+)-(?P<loss>[a-z]+)(-step(?P<step_size>[\d.e-]+))?(-last)?"
)
"""A name as `PgdSettings.name` makes it."""
_OWN_INTERVAL = re.compile(
    r"interval(?P<steps>\d+)x(?P<restarts>\d+)-(?P<loss>[a-z]+)(-step(?P<step_size>[\d.e-]+))?"
    r"(-jumps(?P<jumps>\d+))?(-jump(?P<jump>[\d.e-]+))?(-radius(?P<radius>[\d.e-]+))?"
)
"""A name as `IntervalSettings.name` makes it."""

PRESETS = {
    "pgd20": PgdSettings(20, last_iterate=True),  # as published with TRADES
    "pgd100x10": PgdSettings(100, restarts=10),
    "pgd1000x5": PgdSettings(1000, restarts=5),
}
CUSTOM = PgdSettings(20)
AUTOATTACKS = {"autoattack": "standard", "autoattack_rand": "rand"}

CHAIN = ("pgd20", "pgd100x10", "pgd1000x5", "autoattack")
"""The attacks of `attack=all`, the strongest last; each begins with what the one before left."""
VERIFIED = "verified-"
"""The beginning of the names of verified accuracies; the engine follows."""
INTERVAL_ATTACKS = {"interval": IntervalSettings(), "interval50": IntervalSettings(restarts=50)}
ATTACKS = (
    *("clean", *PRESETS, *AUTOATTACKS, *INTERVAL_ATTACKS),
    *("corruptions", "custom", "all"),
)


class _Changes:
    @property
    def given(self) -> dict[str, Any]:
        """Return what was typed, by name."""
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass
class PgdChanges(_Changes):
    """The settings of PGD, and of the interval attack, that were typed; others are None."""

    steps: int | None = None
    restarts: int | None = None
    loss: str | None = None
    step_size: float | None = None


@dataclass
class JumpChanges(_Changes):
    """The settings of the interval attack alone that were typed; others are None."""

    jumps: int | None = None
    jump: float | None = None
    radius: float | None = None


@dataclass
class EvalSettings:
    """The settings of one `btrain eval`.

    Attributes:
        attacks: names of `ATTACKS`; "all" stands alone.
        pgd: settings that change the PGD and interval attacks among them.
        jumping: settings that change the interval attacks alone.
        config: overrides of the run's `dataset` and `model`, key by key as they were typed.
        factories: own code in the place of that which the run names, by its group.
        trust_code: whether own code that the checkpoint names may be imported.
        norm, epsilon, seed: None for the run's.
        batch_size: examples in memory at once.
        verify: engines of `btrain.verify.bounds`, joined ones by +, or any; each by one name,
            whatever the order in which it was joined, unions behind their members.
        verify_epsilon: other radii at which each engine verifies, as they were typed.
        verify_memory: that bounds may take, in GiB; None for 2.
    """

    checkpoint: str = ""
    attacks: list[str] = field(default_factory=lambda: ["pgd20"])
    verify: list[str] = field(default_factory=list)
    verify_epsilon: list[str] = field(default_factory=list)
    verify_memory: float | None = None
    pgd: PgdChanges = field(default_factory=PgdChanges)
    jumping: JumpChanges = field(default_factory=JumpChanges)
    extra_corruptions: bool = False
    corruptions_root: str | None = None
    config: dict[str, str] = field(default_factory=dict)
    factories: dict[str, str] = field(default_factory=dict)
    trust_code: bool = False
    norm: str | None = None
    epsilon: float | None = None
    seed: int | None = None
    device: str = "auto"
    batch_size: int = 500
    precision: str = "float32"
    sanity: bool = True
    report: bool = False
    out: str | None = None

    def __post_init__(self) -> None:
        _check_attacks(self.attacks)
        self._check_bounds()
        if self.norm is not None:
            _one_of("norm", self.norm, NORMS)
        whole(1, "attack.steps", self.pgd.steps)
        whole(1, "attack.restarts", self.pgd.restarts)
        whole(1, "eval.batch_size", self.batch_size)
        _one_of("attack.loss", self.pgd.loss or "ce", LOSSES)
        _one_of("precision", self.precision, PRECISIONS)
        seed_in_range("seed", self.seed)
        self._check_changes()
        self._check_distinct()
        with_corruptions = {"corruptions", "all"} & set(self.attacks)
        if self.extra_corruptions and not with_corruptions:
            raise UserError("attack.extra_corruptions goes with attack=corruptions or all.")
        if "corruptions" in self.attacks and self.corruptions_root is None:
            raise UserError(
                "attack=corruptions needs dataset.corruptions_root, the folder that holds "
                "gaussian_noise.npy and the others."
            )

    @property
    def bounded(self) -> list[str]:
        """Return what needs bounds, as it was typed."""
        interval = [f"attack={name}" for name in self.attacks if name in INTERVAL_ATTACKS]
        return [f"verify={engine}" for engine in self.verify] + interval

    @property
    def results(self) -> list[str]:
        """Return the names of the results, but for the clean accuracy, which always is there."""
        return [self._result(name) for name in self.attacks if name != "clean"] + self.verified

    @property
    def verified(self) -> list[str]:
        """Return the names of the verified accuracies."""
        return [f"{VERIFIED}{engine.replace('+', '-')}" for engine in self.verify]

    @property
    def memory(self) -> int:
        """Return the bytes that bounds may take."""
        return gibibytes(2.0 if self.verify_memory is None else self.verify_memory)

    @property
    def radii(self) -> list[float]:
        """Return the other radii at which is verified, rising."""
        key = "verify.epsilon"
        return sorted({pixels(key, typed, "linf") for typed in self.verify_epsilon})

    def _check_changes(self) -> None:
        """Raise UserError for a setting that was typed and that no attack here has."""
        intervals = [name for name in self.attacks if name in INTERVAL_ATTACKS]
        of_pgd = [name for name in self.attacks if name in PRESETS or name == "custom"]
        for given, having, whose in (
            (self.pgd.given, of_pgd + intervals, "PGD and of the interval attack"),
            (self.jumping.given, intervals, "attack=interval and interval50"),
        ):
            if given and not having:
                raise UserError(
                    f"attack.{next(iter(given))} is a setting of {whose}; it does not go with "
                    f"attack={','.join(self.attacks)}."
                )
        if intervals and self.pgd.loss not in (None, *INTERVAL_LOSSES):
            raise UserError(
                f"attack.loss={self.pgd.loss} does not go with attack={intervals[0]}, which "
                f"ascends {' or '.join(INTERVAL_LOSSES)}."
            )
        whole(0, "attack.jumps", self.jumping.jumps)
        for key in ("jump", "radius"):
            if (length := getattr(self.jumping, key)) is not None:
                pixels(f"attack.{key}", length, "linf")

    def _check_bounds(self) -> None:
        if self.radii and not self.verify:
            raise UserError("verify.epsilon goes with verify=, which names the engines.")
        typed, engines = self.verify, [_canonical(engine) for engine in self.verify]
        self.verify = sorted(engines, key=lambda engine: len(_joined(engine)))
        if len(set(self.verify)) < len(self.verify):
            raise UserError(f"verify={','.join(typed)} must name each engine once.")
        if self.verify_memory is not None:
            positive("verify.memory", self.verify_memory)
            if not self.bounded:
                raise UserError("verify.memory goes with verify= or attack=interval, by bounds.")
        if self.bounded and self.precision != "float32":
            raise UserError(
                f"{self.bounded[0]} does not go with precision={self.precision}: bounds are those "
                "of float32."
            )

    def check_lengths(self, norm: str) -> None:
        """Raise UserError for an ε or a step size that no attack in this norm can mean."""
        if self.bounded and norm != "linf":
            raise UserError(
                f"{self.bounded[0]} does not go with norm={norm}: bounds are for an L∞ ball."
            )
        if self.epsilon is not None:
            pixels("epsilon", self.epsilon, norm)
        if self.pgd.step_size is not None:
            pixels("attack.step_size", self.pgd.step_size, norm, most=2)

    def pgd_attack(self, name: str) -> tuple[str, PgdSettings]:
        """Return a preset as the user has it, and its name then; a preset keeps its name."""
        settings = replace(PRESETS.get(name, CUSTOM), **self.pgd.given)
        names = [preset for preset, its in PRESETS.items() if its == settings]
        return (names[0] if names else settings.name), settings

    def interval_attack(self, name: str) -> tuple[str, IntervalSettings]:
        """Return an interval attack as the user has it, and its name then."""
        changes = self.pgd.given | self.jumping.given
        settings = replace(INTERVAL_ATTACKS[name], **changes)
        names = [preset for preset, its in INTERVAL_ATTACKS.items() if its == settings]
        return (names[0] if names else settings.name), settings

    def _result(self, attack: str) -> str:
        """Return the name of an attack's result."""
        if attack in INTERVAL_ATTACKS:
            return self.interval_attack(attack)[0]
        return self.pgd_attack(attack)[0] if attack in (*PRESETS, "custom") else attack

    def _check_distinct(self) -> None:
        """Raise UserError where changed presets come to one and the same attack."""
        seen: dict[str, str] = {}
        for attack in self.attacks:
            name = self._result(attack)
            if name in seen:
                given = self.pgd.given | self.jumping.given
                changes = " ".join(f"attack.{key}={value}" for key, value in given.items())
                raise UserError(
                    f"{seen[name]} and {attack} are one and the same attack with {changes}; "
                    "please leave one out."
                )
            seen[name] = attack


HELP = f"""\
usage: btrain eval checkpoint=RUN|FILE [option=value …]
       btrain eval compare A B [attack=pgd20]

checkpoint=RUN             a run folder (its last checkpoint), or a checkpoint file
attack=NAME[,NAME …]       {" ".join(ATTACKS)} (default pgd20)
attack.steps= attack.restarts= attack.step_size= attack.loss={"|".join(LOSSES)}
                           PGD of your own; also changes a preset, and attack=interval
attack.jumps= attack.jump= attack.radius=
                           attack=interval's jumps, their length, the first bounded region
verify=ENGINE[,ENGINE …]   {" ".join(ENGINES)}, several joined by +, or any:
                           which images no attack within epsilon (L∞) can break
verify.epsilon=E[,E …]     the same at other radii, for the page's curves
verify.memory=GIB          that bounds may take (default 2)
attack.extra_corruptions=true
                           the 4 extra corruptions, too; they are no part of the mean
dataset.corruptions_root=  the folder of gaussian_noise.npy … labels.npy
dataset= dataset.root= dataset.test_examples= model= …
                           other than the run's; needed with another project's file
norm={"|".join(NORMS)}               the threat model; default: as trained
epsilon=                   radius in [0, 1] pixel units, 8/255 works; default: as trained
seed= device=auto|cpu|cuda precision=float32|bf16 eval.batch_size=500
model.factory= dataset.factory= … FILE.py:NAME, or trust_code=true
                           for a run with code of its own: which, or that it may be imported
sanity=false               leaves out the sanity checks
report=true                writes a page with curves and images, index.html
out=DIR                    default: RUN/eval, or eval/<name of the file>

compare tests two evaluations example by example (McNemar); A and B are run folders or the folders
of evaluations.
"""


# Word -> field of EvalSettings, where it is another.
_FIELDS = {
    "attack": "attacks",
    **{f"attack.{key}": f"pgd.{key}" for key in PgdChanges.__annotations__},
    "attack.extra_corruptions": "extra_corruptions",
    **{f"attack.{key}": f"jumping.{key}" for key in JumpChanges.__annotations__},
    "verify.epsilon": "verify_epsilon",
    "verify.memory": "verify_memory",
    "dataset.corruptions_root": "corruptions_root",
    "eval.batch_size": "batch_size",
}
_WORDS = (
    *("checkpoint", "norm", "epsilon", "seed", "device", "precision", "sanity", "report", "out"),
    *("trust_code", "verify", *_FIELDS),
)
_LISTS = ("attack", "verify", "verify.epsilon")
# Words that go to the configuration: what decides test images and network.
_CONFIG = (
    *("dataset", "dataset.root", "dataset.download", "dataset.image_size"),
    *("dataset.test_examples", "model", "model.width", "model.depth", "model.activation"),
    *("model.mean", "model.std", "model.shortcut"),
)
_FREE = re.compile(r"(dataset|model)\.settings\.[\w.]+")  # settings of own code
FACTORIES = tuple(f"{group}.factory" for group in ("model", "dataset", "defense", "attack", "bt"))
KNOWN = (*_WORDS, *_CONFIG, *FACTORIES)
"""The words of `btrain eval`, besides the settings of own code."""
_PATHS = ("checkpoint", "out", "dataset.root", "dataset.corruptions_root", *FACTORIES)


def parse(arguments: Sequence[str]) -> EvalSettings:
    """Return the settings that a command line asks for.

    Raises:
        UserError: an argument is no key=value, a key is unknown, or a value wrong.
    """
    if arguments and not any("=" in word or word.startswith("-") for word in arguments):
        raise UserError(f"{arguments[-1]} is no setting; did you mean checkpoint={arguments[-1]}?")
    pairs = words.parse(arguments, _PATHS, KNOWN, "btrain eval")
    given = words.once(pairs, KNOWN, "btrain eval", free=_FREE)
    if "checkpoint" not in given:
        raise UserError("eval needs checkpoint=, a run folder or a file; see btrain eval --help.")
    values: dict[str, Any] = {"config": {}, "factories": {}}
    for key, text in given.items():
        value = os.path.expanduser(text) if key in _PATHS else text  # noqa: PTH111
        group = key.partition(".")[0]
        another = group in ("model", "dataset") and group in given  # attack= is no part of a run
        if key in FACTORIES and not another:
            values["factories"][group] = value
        elif key in _CONFIG or key in FACTORIES or _FREE.fullmatch(key):
            values["config"][key] = value
        else:
            values[key] = words.names(text) if key in _LISTS else value
    if "attack" not in given and any(_FIELDS.get(key, "").startswith("pgd.") for key in given):
        values["attack"] = ["custom"]
    return words.filled(EvalSettings, values, _FIELDS)


def parse_compare(arguments: Sequence[str]) -> tuple[Path, Path, str]:
    """Return the two folders and the attack of `btrain eval compare`.

    Raises:
        UserError: there are not two folders, or there is another setting.
    """
    for argument in arguments:
        key = argument.partition("=")[0].lstrip("-")
        typo = key != "attack" and hints.meant(key, ["attack"]) and not Path(argument).exists()
        if argument.startswith("-") or typo:
            raise UserError(
                f"{argument} is no folder, and the one setting of compare is attack=NAME."
            )
    folders = [argument for argument in arguments if not argument.startswith("attack=")]
    attack = [argument.removeprefix("attack=") for argument in arguments if argument not in folders]
    if len(folders) != 2 or len(attack) > 1:
        raise UserError("compare needs two folders: btrain eval compare A B [attack=pgd20].")
    if attack and attack[0] in ("all", "custom"):
        raise UserError(
            f"attack={attack[0]} names no result; compare takes the name of its file in RUN/eval, "
            "like pgd20 or pgd50x1-ce."
        )
    return Path(folders[0]), Path(folders[1]), attack[0] if attack else "pgd20"


def apply(config: Config, overrides: Mapping[str, str]) -> Config:
    """Return a run's configuration with another data set, or other settings of its own.

    Raises:
        UserError: an option or a value is wrong.
    """
    for group in ("dataset", "model"):
        own = {key: value for key, value in overrides.items() if key.startswith(f"{group}.")}
        if group in overrides:
            part = getattr(compose({group: overrides[group], **own}), group)
        elif own:
            part = _merged(getattr(config, group), group, own)
        else:
            continue
        config = dataclasses.replace(config, **{group: part})
    return config


def compose(overrides: Mapping[str, str]) -> Config:
    """Return the configuration of what is no run of ours, from `dataset=`, `model=` and the like.

    Raises:
        UserError: an option or a value is wrong.
    """
    from btrain.settings import compose as configs

    quoted = [configs.with_path_quoted(f"{key}={value}") for key, value in overrides.items()]
    config: Config = configs.compose(quoted)
    return config


def _merged(node: Any, group: str, overrides: Mapping[str, str]) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from btrain.settings import compose as configs

    try:
        settings = OmegaConf.structured(node)
        for key, value in overrides.items():
            leaf = key.removeprefix(f"{group}.")
            typed = {leaf: value} if leaf == "root" else OmegaConf.from_dotlist([f"{leaf}={value}"])
            settings = OmegaConf.merge(settings, typed)
        return OmegaConf.to_object(settings)
    except OmegaConfBaseException as error:
        explained = str(configs.explain(error, ()))
        raise UserError(f"{group}.{explained}") from error


def _canonical(typed: str) -> str:
    """Return an engine's name, joined ones in one order and each once; all joined are `any`.

    Raises:
        UserError: there is no such engine, or any is joined to another.
    """
    names = typed.split("+")
    for name in names:
        _one_of("verify", name, (*ENGINES, ANY))
    if ANY in names and len(names) > 1:
        raise UserError(f"verify={typed}: {ANY} stands alone; it joins all engines.")
    joined = [engine for engine in ENGINES if engine in names]
    return ANY if len(joined) in (0, len(ENGINES)) else "+".join(joined)


def _joined(engine: str) -> tuple[str, ...]:
    return ENGINES if engine == ANY else tuple(engine.split("+"))


def _check_attacks(names: Sequence[str]) -> None:
    for name in names:
        _one_of("attack", name, ATTACKS)
    if "all" in names and len(names) > 1:
        raise UserError("attack=all stands alone; it includes the others.")
    if len(set(names)) < len(names) or not names:
        raise UserError(f"attack={','.join(names)} must name each attack once.")


def _one_of(key: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        if key == "attack" and _OWN_PGD.fullmatch(value):
            raise UserError(f"attack={value} is the name of a result; write {words_for(value)}.")
        close = hints.meant(value, options)
        meant = f" Did you mean {close}?" if close else ""
        raise UserError(f"{key}={value} is no option; there are: {', '.join(options)}.{meant}")
