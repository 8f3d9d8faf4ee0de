"""`btrain export`: its words, and what it does with them. Imports torch only to do it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from btrain.errors import UserError

FORMATS = ("robustbench", "safetensors", "onnx", "state_dict")

USAGE = """\
btrain export checkpoint=RUN format=FORMAT out=FILE    a trained network for other projects

  checkpoint=   a run folder, or a checkpoint of a run
  format=       robustbench   a state dict that loads into RobustBench's WideResNet classes
                safetensors   the weights by btrain's names; FILE ends in .safetensors
                onnx          the network, batches of any size; FILE ends in .onnx
                state_dict    the weights by btrain's names, for torch.load and load_state_dict
  out=          the file to write
  which=        last (default) or best, of a run folder
  sub_block1=   true adds TRADES' unused stage to format=robustbench (default: false)
  model.factory=  the run's own network, named again: FILE.py:NAME
  trust_code=   true imports the code that the run names (default: false)
  overwrite=    true replaces a file that is there already (default: false)

safetensors and onnx need their packages: pip install "btrain[export]".
"""

_FACTORY = "model.factory"
_SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx"}


@dataclass(frozen=True)
class Export:
    """The words of one call."""

    checkpoint: Path
    format: str
    out: Path
    which: Literal["last", "best"] = "last"
    sub_block1: bool = False
    overwrite: bool = False
    factory: str | None = None
    trust_code: bool = False


def parse(words: Sequence[str]) -> Export:
    """Reads key=value words.

    Raises:
        UserError: a key is unknown, missing or given twice, or a value is none of its choices.
    """
    given: dict[str, Any] = {}
    names = [field.name for field in dataclasses.fields(Export)]
    keys = [_FACTORY if name == "factory" else name for name in names]
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not value:
            raise UserError(f"{word} is not of the form key=value; see btrain export --help.")
        if key not in keys:
            close = difflib.get_close_matches(key, keys, n=1)
            hint = f"Did you mean {close[0]}?" if close else "btrain export --help lists them."
            raise UserError(f"There is no setting {key}. {hint}")
        if key in given:
            raise UserError(f"{key} is given twice.")
        given["factory" if key == _FACTORY else key] = _value(key, value)
    for key in ("checkpoint", "format", "out"):
        if key not in given:
            raise UserError(f"{key} is missing; please give {key}=…, see btrain export --help.")
    export = Export(**given)
    _check(export)
    return export


def _value(key: str, value: str) -> Path | str | bool:
    if key in ("checkpoint", "out"):
        return Path(value).expanduser()
    if key == _FACTORY:
        return value
    choices = {"format": FORMATS, "which": ("last", "best")}.get(key, ("true", "false"))
    if value not in choices:
        raise UserError(f"{key} must be one of {', '.join(choices)}, not {value}.")
    return value == "true" if choices == ("true", "false") else value


def _check(export: Export) -> None:
    if export.sub_block1 and export.format != "robustbench":
        raise UserError(f"sub_block1=true has no meaning with format={export.format}.")
    wanted, suffix = _SUFFIXES.get(export.format), export.out.suffix
    if wanted is not None and suffix != wanted:
        raise UserError(f"out={export.out} must end in {wanted} with format={export.format}.")
    if wanted is None and suffix in _SUFFIXES.values():
        raise UserError(f"out={export.out} must not end in {suffix} with format={export.format}.")


def run(words: Sequence[str]) -> None:
    """Does what `btrain export <words>` says, and tells what was written.

    Raises:
        UserError: a word, the run or the file to write is not right; nothing was written.
    """
    if {"-h", "--help"} & set(words):
        print(USAGE, end="")
        return
    export = parse(words)

    from btrain.exchange.from_run import read_run
    from btrain.exchange.write import write

    run = read_run(
        export.checkpoint,
        export.which,
        trust_code=export.trust_code,
        factories={} if export.factory is None else {"model": export.factory},
    )
    model, shape = run.network(), run.shape
    write(
        model,
        export.out,
        format=export.format,
        shape=shape,
        sub_block1=export.sub_block1,
        overwrite=export.overwrite,
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{export.out}: {run.config.model.name} with {parameters:,} parameters as {export.format}, "
        f"for {'×'.join(map(str, shape))} images in [0, 1]"
    )
