"""The settings of older runs by today's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def translated(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run as today's btrain names them, whatever version wrote them.

    What an older version wrote for parts that did not read it is left out.

    Args:
        saved: plain containers from a file; anything may stand there.
    """
    today = {key: dict(node) if isinstance(node, Mapping) else node for key, node in saved.items()}
    model, dataset = today.get("model"), today.get("dataset")
    if isinstance(model, dict) and model.get("depth", 0) is None:
        del model["depth"]
    if isinstance(dataset, dict):
        if dataset.get("image_size", 0) is None:
            del dataset["image_size"]
        if dataset.get("name") == "digits":
            dataset.pop("root", None)
        if dataset.get("name") in ("digits", "imagefolder"):
            dataset.pop("download", None)
    return today
