"""The jobs of a sweep, as each tells of itself to the process that began it.

Whatever launches them: a job has nothing but a folder in which it leaves a file. One that runs on
a machine without that folder tells nothing.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from btrain.runs.json_fields import read_object


@dataclass
class Job:
    """One training of a sweep.

    Attributes:
        number: in the order of the sweep.
        overrides: all that the command line sets for it, `key=value`.
        folder: of its run; None where its settings were wrong.
        failed: the sentence that ended it; None where nothing did so far.
        looked_at: the words of a `btrain eval` that fit its run.
    """

    number: int
    overrides: list[str]
    folder: str | None = None
    failed: str | None = None
    looked_at: str = ""

    def tell(self, place: Path) -> None:
        """Leave word of how the job stands."""
        with suppress(OSError):
            (place / f"{self.number}.json").write_text(json.dumps(asdict(self)), encoding="utf-8")


def heard(place: Path) -> list[Job]:
    """Return the jobs that have told of themselves, in order."""
    told = [read_object(path) for path in place.glob("*.json")]
    return sorted((Job(**job) for job in told if job), key=lambda job: job.number)
