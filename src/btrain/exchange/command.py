"""The words of `btrain export`, and the work; torch is imported only for the work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btrain.errors import UserError
from btrain.settings import words
from btrain.settings.checks import require
from btrain.settings.evaluation import FACTORIES
from btrain.terminal import say, show

if TYPE_CHECKING:
    from btrain.exchange.from_run import SavedRun

FORMATS = ("robustbench", "safetensors", "onnx", "state_dict", "checkpoint", "compact")

USAGE = """\
btrain export checkpoint=RUN format=FORMAT out=FILE    a trained network for other projects

  checkpoint=   a run folder, or a checkpoint of a run
  format=       robustbench   a state dict that loads into RobustBench's WideResNet classes
                safetensors   the weights by btrain's names; FILE ends in .safetensors
                onnx          the network, batches of any size; FILE ends in .onnx
                state_dict    the weights by btrain's names, for torch.load and load_state_dict
                checkpoint    for btrain: network, data and weights, without what training needs
                compact       the same without channels that nothing reads
  out=          the file to write
  which=        last (default) or best, of a run folder
  sub_block1=   true adds TRADES' unused stage to format=robustbench (default: false)
  trust_code=   true imports code that the run names; or name it: model.factory=FILE.py:NAME
  model_card=   true writes FILE.md, what it is and how good, and FILE.sha256, which is checked
                whenever the file is read (default: false)
  overwrite=    true replaces a file that is there already (default: false)

safetensors and onnx need their packages: pip install "btrain[export]".
"""

_WHICH = ("last", "best")
_SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx"}


@dataclass
class Export:
    """The settings of one `btrain export`.

    Attributes:
        trust_code: whether own code that the checkpoint names may be imported.
        factories: own code that the user names, by the group that it stands for.
    """

    checkpoint: str = ""
    format: str = ""
    out: str = ""
    which: str = "last"
    sub_block1: bool = False
    overwrite: bool = False
    model_card: bool = False
    trust_code: bool = False
    factories: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, value, options in (
            ("format", self.format, FORMATS),
            ("which", self.which, _WHICH),
        ):
            require(value in ("", *options), key, f"one of {', '.join(options)}", value)
        for key in ("checkpoint", "format", "out"):
            if not getattr(self, key):
                raise UserError(f"{key} is missing; please give {key}=…, see btrain export --help.")
        if self.sub_block1 and self.format != "robustbench":
            raise UserError(f"sub_block1=true has no meaning with format={self.format}.")
        wanted, suffix = _SUFFIXES.get(self.format), Path(self.out).suffix
        if wanted is not None and suffix != wanted:
            raise UserError(f"out={self.out} must end in {wanted} with format={self.format}.")
        if wanted is None and suffix in _SUFFIXES.values():
            raise UserError(f"out={self.out} must not end in {suffix} with format={self.format}.")


KNOWN = (*(item.name for item in fields(Export) if item.name != "factories"), *FACTORIES)
"""The words of `btrain export`."""


def parse(arguments: Sequence[str]) -> Export:
    """Return the settings that a command line asks for.

    Raises:
        UserError: a key is unknown, missing or given twice, or a value is none of its choices.
    """
    paths = ("checkpoint", "out", *FACTORIES)
    try:
        pairs = words.parse(arguments, paths, KNOWN, "btrain export")
    except UserError as error:
        raise UserError(f"{str(error).removesuffix('.')}; see btrain export --help.") from error
    given = words.once(pairs, KNOWN, "btrain export")
    values: dict[str, Any] = {"factories": {}}
    for key, text in given.items():
        value = os.path.expanduser(text) if key in paths else text  # noqa: PTH111
        if key in FACTORIES:
            values["factories"][key.removesuffix(".factory")] = value
        else:
            values[key] = value
    return words.filled(Export, values, {})


def run(arguments: Sequence[str]) -> tuple[Export, SavedRun, int] | None:
    """Write the file that the arguments of `btrain export` ask for, and say what was written.

    Returns:
        What was asked for, the run, and how many parameters the file has; None where it was help.

    Raises:
        UserError: a word, the run or the file to write is not right; nothing was written.
    """
    if {"-h", "--help"} & set(arguments):
        show(USAGE, end="")
        return None
    export = parse(arguments)

    from btrain.exchange.from_run import read_run
    from btrain.exchange.write import write

    saved = read_run(
        Path(export.checkpoint),
        "best" if export.which == "best" else "last",
        trust_code=export.trust_code,
        factories=export.factories,
    )
    model, shape = saved.network(), saved.shape
    parameters = write(
        model,
        Path(export.out),
        format=export.format,
        shape=shape,
        sub_block1=export.sub_block1,
        overwrite=export.overwrite,
        config=saved.config,
        classes=saved.classes,
    )
    whole = sum(parameter.numel() for parameter in model.parameters())
    count = f"{parameters:,} of its {whole:,}" if parameters < whole else f"{parameters:,}"
    say(
        f"{export.out}: {saved.config.model.name} with {count} parameters as "
        f"{export.format}, for {'×'.join(map(str, shape))} images in [0, 1]"
    )
    if unfinished := saved.unfinished():
        say(unfinished)
    if export.format == "compact" and parameters == whole:
        say("Nothing could be left out: all channels are read. Single weights that are 0 stay.")
    return export, saved, parameters
