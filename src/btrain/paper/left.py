"""Which runs of a sweep are not finished: those that are need no launch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from btrain.errors import UserError
from btrain.paper.job import Job, config_of
from btrain.paper.target import Sweep, row_name, run_name
from btrain.runs.folder import RunFolder
from btrain.settings import Config


def unfinished(job: Job, sweep: Sweep) -> tuple[Sweep, list[int]] | None:
    """The smallest sweep with its seeds that makes all the runs that are left; None without any.

    As a sweep is every experiment with every value and seed, it may hold finished runs as well.
    A finished run of other settings counts as left, so that `btrain train` says what is wrong.

    Raises:
        UserError: an experiment does not take its settings.
    """
    left: list[tuple[str, dict[str, str], int]] = []
    for experiment in sweep.experiments:
        for swept in (swept for name, swept in sweep.rows() if name == experiment):
            folders = {
                seed: job.out / run_name(row_name(experiment, swept), seed)
                for seed in job.profile.seeds
            }
            ended = [seed for seed in folders if (folders[seed] / "summary.json").is_file()]
            config = config_of(job, experiment, swept) if ended else None
            left += [
                (experiment, swept, seed)
                for seed, folder in folders.items()
                if config is None or seed not in ended or not _is_finished(folder, config, seed)
            ]
    if not left:
        return None
    seeds = [seed for seed in job.profile.seeds if any(seed == s for _, _, s in left)]
    values = {
        key: [value for value in some if any(value == swept[key] for _, swept, _ in left)]
        for key, some in sweep.values.items()
    }
    experiments = [name for name in sweep.experiments if any(name == e for e, _, _ in left)]
    return replace(sweep, experiments=experiments, values=values), seeds


def _is_finished(folder: Path, config: Config, seed: int) -> bool:
    """Whether a run of this configuration has done all its epochs and was evaluated."""
    run = RunFolder(folder)
    try:
        run.check_owner(replace(config, seed=seed, run=replace(config.run, dir=str(folder))))
        summary = run.summary()
    except UserError:
        return False
    return summary is not None and summary.get("epochs") == config.train.epochs
