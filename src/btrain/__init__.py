"""BulletTrain: robust training that spends the attack steps near the decision boundary.

`btrain train` is the command line and `train` the same from Python; `btrain.allocation`,
`btrain.attacks` and `btrain.defenses` are the algorithm as pure functions, for other people's
training loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__version__ = "0.1.0"


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
