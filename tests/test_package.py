"""A wheel, installed into an empty environment, is the whole product."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_uv_and_pip_take_the_same_torch() -> None:
    pins = re.findall(r"^(torch\w*==[\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    of_uv = re.search(
        r"^constraint-dependencies = (.*)$", (ROOT / "pyproject.toml").read_text(), re.M
    )
    assert of_uv is not None
    assert json.loads(of_uv[1]) == pins != []


def test_a_wheel_in_an_empty_venv_finds_its_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)  # it would lend btrain itself
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path]
    run(*pip, *build, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("btrain-*.whl")
    environment = tmp_path / "venv"
    venv.create(environment)
    python = environment / "bin" / "python"
    run(*pip, "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=tmp_path)
    # The dependencies are lent by this environment; btrain itself is not (a .pth adds no .pth).
    site = Path(
        run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).strip()
    )
    (site / "lent.pth").write_text(sysconfig.get_paths()["purelib"])
    settings = run(
        environment / "bin" / "btrain", "train", "bt=uniform", "--cfg", "job", cwd=tmp_path
    )
    assert "n_b: ${with_views:${attack.augmix},1,${attack.steps}}" in settings
    pages = (
        "from btrain.pages.html import render;"
        "render('btrain.report', 'sample.html', label='', pictures=[], difference='', factor=1);"
        "page = render('btrain.paper', 'index.html', title='', table='');"
        "print(page.count('prefers-color-scheme'))"
    )
    assert int(run(python, "-c", pages, cwd=tmp_path)) > 0
    where = run(python, "-c", "import btrain; print(btrain.__file__)", cwd=tmp_path)
    assert where.startswith(str(environment))
