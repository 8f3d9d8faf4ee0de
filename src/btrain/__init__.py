"""Robust training of neural networks at a fraction of its cost.

`btrain train` is the command line and `train` the same from Python; `load` brings back the network
of a run. `btrain.allocation`, `btrain.attacks` and `btrain.defenses` are BulletTrain as pure
functions, for other people's training loops. A module is imported when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from btrain import lazy

if TYPE_CHECKING:  # torch takes seconds to import, which help and mistakes do not wait for
    from torch import nn

    from btrain import (
        allocation,
        attacks,
        corruptions,
        data,
        defenses,
        errors,
        evaluation,
        exchange,
        models,
        verify,
    )

__all__ = [
    "allocation",
    "attacks",
    "corruptions",
    "data",
    "defenses",
    "errors",
    "evaluation",
    "exchange",
    "load",
    "models",
    "train",
    "verify",
]

__version__ = "0.1.0"

__getattr__, __dir__ = lazy.attributes(
    __name__, [name for name in __all__ if name not in ("load", "train")]
)


def train(overrides: Sequence[str] = (), *, model: Any = None, data: Any = None) -> dict[str, Any]:
    """Do what `btrain train <overrides>` does and return the summary of the run.

    Args:
        overrides: the words of the command line, `key=value`.
        model: an own network in the place of `model=`: a torch.nn.Module, of which a copy is
            trained, or what makes one, called with what it takes of `classes`, `shape` and
            `model.settings`.
        data: own data in the place of `dataset=`: (x, y, x_test, y_test), two torch data sets, or a
            function that returns one of these.

    Raises:
        btrain.errors.UserError: a word, the network or the data are not right, or training had to
            stop.
    """
    from btrain import own
    from btrain.errors import UserError
    from btrain.settings import compose as configs
    from btrain.training import train as run

    if isinstance(overrides, str):
        raise UserError(
            f"overrides must be a list of words like {overrides.split()[:3]}, not one text."
        )
    words = [configs.with_path_quoted(word) for word in overrides]
    for group, thing in (("model", model), ("dataset", data)):
        if thing is not None:
            words += [f"{group}=own", f"{group}.factory={configs.quoted(own.give(thing, group))}"]
    return run(configs.compose(words))


def load(
    run: str | Path,
    which: Literal["last", "best"] = "last",
    *,
    trust_code: bool = False,
    factories: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Return the network that a run has trained, on the CPU, in eval mode: images to logits.

    Images are (m, C, H, W) in [0, 1], logits (m, K); a normalisation is inside.

    Args:
        run: a run folder, or one of its checkpoint files.
        which: of a folder, the last checkpoint or that of the best held-out epoch.
        trust_code: whether own code that the run names may be imported.
        factories: own code in the place of that which it names, by its group: `{"model": Net}`.

    Raises:
        btrain.errors.UserError: there is no such run, it is damaged, or it needs code that is not
            named here.
    """
    from btrain.exchange.from_run import load_run

    _, network = load_run(Path(run), which, trust_code=trust_code, factories=factories)
    return network
