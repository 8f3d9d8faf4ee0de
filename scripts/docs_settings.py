"""A hook of mkdocs: the page of all settings, made of what `--help` tells of each group."""

from __future__ import annotations

import os
from typing import Any

from mkdocs.structure.files import File, Files

from btrain.settings.help import groups_of, help_text

_HEAD = """\
# All settings

What `btrain train --help GROUP` tells, with the defaults of `btrain train` alone: TRADES with BulletTrain on CIFAR-10. `key=value` on the command line changes one; other options of a group may have settings of their own, `btrain train --help bt bt=early_exit`.
"""  # noqa: E501


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the page."""
    os.environ["COLUMNS"] = "84"
    parts = [_HEAD]
    for group in (*groups_of("train"), "train", "eval", "run"):
        text = help_text([group]).rpartition("\n\n")[0].strip("\n")
        parts.append(f"## {group}\n\n```text\n{text}\n```\n")
    files.append(File.generated(config, "all_settings.md", content="\n".join(parts)))
    return files
