"""Hooks of mkdocs: the page of all settings, and pictures that follow the site's own theme.

The page is made of what `--help` tells of each group. A `<picture>` in a page, which GitHub shows
in the reader's colours, becomes two images of which the theme shows one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mkdocs.structure.files import File, Files

from btrain.settings.help import group_of, groups_of

_HEAD = """\
# All settings

What `btrain train --help GROUP` tells, with the defaults of `btrain train` alone: TRADES with BulletTrain on CIFAR-10. `key=value` on the command line changes one; other options of a group may have settings of their own, `btrain train --help bt bt=early_exit`.
"""  # noqa: E501


_PICTURE = re.compile(
    r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="(?P<dark>[^"]+)">\s*'
    r'<img alt="(?P<alt>[^"]+)" src="(?P<light>[^"]+)">\s*</picture>'
)


def _cell(text: str) -> str:
    """Return a text for a cell of a Markdown table, in which nothing is markup."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return escaped.replace("*", "\\*").replace("_", "\\_").replace("`", "\\`")


def _lines(key: str) -> Iterator[str]:
    """Yield the page's lines on a group: a table of its options, and one of its settings."""
    group = group_of(key)
    yield f"## {key}\n"
    if group.options:
        yield "| option | meaning |\n|---|---|"
        yield from (f"| `{key}={name}` | {_cell(meaning)} |" for name, meaning in group.options)
        yield ""
    if group.settings:
        yield "| setting | default | meaning |\n|---|---|---|"
        yield from (
            f"| `{name}` | `{value}` | {_cell(meaning)} |"
            for name, value, meaning in group.settings
        )
        yield ""


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the page."""
    lines = [line for key in (*groups_of("train"), "train", "eval", "run") for line in _lines(key)]
    files.append(File.generated(config, "all_settings.md", content="\n".join([_HEAD, *lines])))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page whose pictures are a light and a dark image, of which the theme shows one."""
    images = r"![\g<alt>](\g<light>#only-light)\n![\g<alt>](\g<dark>#only-dark)"
    return _PICTURE.sub(images, markdown)
