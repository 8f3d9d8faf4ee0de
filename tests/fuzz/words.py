"""Command lines and the files of `--config-dir`."""

from __future__ import annotations

from pathlib import Path
from random import Random

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from btrain.errors import UserError
from btrain.exchange import command as export
from btrain.settings import Config, evaluation, user_files
from btrain.settings import compose as configs
from fuzz import texts
from fuzz.mutations import damaged, number


class OwnOptions:
    """A YAML file of a user's own option."""

    def __init__(self, folder: Path) -> None:
        configs.register()
        self._file, self._canary = folder / "mine.yaml", str(folder / "canary")
        self._source = user_files.FileConfigSource("command-line", str(folder))
        files = sorted(Path(configs.config_dir()).glob("[!p]*/*.yaml"))
        self._seeds = [file.read_text(encoding="utf-8") for file in files]

    def write(self, rng: Random) -> None:
        text = rng.choice(self._seeds)
        for _ in range(rng.choice((0, 1, 1, 3))):
            lines = text.split("\n")
            at = rng.randrange(len(lines))
            word = rng.choice(texts.WORDS).replace("{canary}", self._canary)
            lines[at] = f"{lines[at].partition(':')[0]}: {word}" if rng.random() < 0.7 else word
            text = "\n".join(lines)
        if rng.random() < 0.1:
            text = texts.explosion(rng) + text
        content = text.encode("utf-8", "surrogatepass")
        self._file.write_bytes(damaged(content, rng) if rng.random() < 0.4 else content)

    def read(self) -> None:
        self._source.load_config("mine")


_VALUES = (
    *("", "null", "true", "1e308", "nan", "-inf", "0", "1/0", "8/255", "1/3/4", "[]", "[[1]]"),
    *("{a:1}", "${seed}", "${nope}", "${x:}", "${oc.env:X}", "${", "'a b'", "a,b", "range(3)"),
    *("choice(1,2)", "glob(*)", "sort(3,1)", "json_str([1])", "ä", "\u202e", "\0", "\n", "a\\"),
    *("???", "@x", "uniform", "pgd20", "custom", "pgd5x1-ce", "onnx", "/dev/zero", "~", "0x10"),
)


class CommandLines:
    """The words behind a command, up to the point where YAML files are read for them."""

    def __init__(self, folder: Path) -> None:
        self._keys = [*configs.keys_of(Config), *evaluation.KNOWN, *export.KNOWN]
        self._words: list[str] = []

    def write(self, rng: Random) -> None:
        self._words = [self._word(rng) for _ in range(rng.randrange(1, 5))]

    def _word(self, rng: Random) -> str:
        key = rng.choice(self._keys)
        if rng.random() < 0.2:
            key = damaged(key.encode(), rng).decode("utf-8", "surrogateescape")
        before = rng.choice(("", "", "", "", "+", "++", "~", "-", "--"))
        between = rng.choice(("=", "=", "=", "=", "", "==", "@p=", " = ", "=,"))
        value = rng.choice((*_VALUES, str(number(rng)), rng.choice("[{(1") * rng.randrange(3000)))
        return f"{before}{key}{between}{value}"

    def read(self) -> None:
        """The last of these that refuses them is what counts."""
        refused = None
        for parse in (self._of_a_run, evaluation.parse, export.parse):
            try:
                parse(self._words)
            except UserError as error:
                refused = error
                continue
            return
        if refused is not None:
            raise refused

    @staticmethod
    def _of_a_run(words: list[str]) -> None:
        words = configs.arranged(words)
        configs.check_words(words, "train")
        settings = [word for word in words if not word.startswith("-")]
        try:
            OverridesParser.create().parse_overrides(settings)
        except (HydraException, RecursionError, ValueError) as error:
            raise configs.explain(error, settings) from error
