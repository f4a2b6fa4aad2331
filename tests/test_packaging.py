"""The wheel, the entry points, and that `kernels` and `eval` shadow nothing."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "eval")

ENTRY_POINTS = {
    "console_scripts": {"sglang-pic": "sglang_pic.cli:main"},
    "sglang.srt.plugins": {"sglang_pic": "sglang_pic.plugin:register"},
    "sglang.srt.platforms": {"sglang_pic_cpu": "sglang_pic.platforms.cpu:activate"},
}


def files_of(folder: str) -> list[Path]:
    """Files below a folder of the top level, relative to the repository's root."""
    return sorted(
        path.relative_to(ROOT)
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    )


def run_python(*arguments: str, cwd: Path, pythonpath: Path | None = None) -> str:
    """Standard output of this interpreter in ``cwd``; fails the test if it fails."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if pythonpath is not None:
        env["PYTHONPATH"] = str(pythonpath)
    outcome = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the working tree, built offline from a copy free of old build output."""
    source = tmp_path_factory.mktemp("source")
    for name in ("sglang_pic", *FOLDERS):
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skip)
    for path in ROOT.iterdir():
        if path.name in ("pyproject.toml", "LICENSE", "README.md"):
            shutil.copy(path, source)
    target = tmp_path_factory.mktemp("wheel")
    run_python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), cwd=source)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH that holds the wheel as installed."""
    target = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_links_are_relative() -> None:
    for folder in FOLDERS:
        assert os.readlink(ROOT / "sglang_pic" / folder) == f"../{folder}"


def test_wheel_holds_every_file_once(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    assert {name.split("/")[0] for name in names} == {
        "sglang_pic",
        f"{wheel.name.removesuffix('-py3-none-any.whl')}.dist-info",
    }
    for folder in FOLDERS:
        files = files_of(folder)
        assert any(path.suffix == ".py" for path in files)
        assert {f"sglang_pic/{path.as_posix()}" for path in files} <= set(names)


def test_entry_points_lead_into_the_wheel(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (record,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
    parser = configparser.ConfigParser(delimiters="=")
    parser.read_string(archive.read(record).decode())
    assert {section: dict(parser[section]) for section in parser.sections()} == ENTRY_POINTS
    for target in (value for group in ENTRY_POINTS.values() for value in group.values()):
        module, function = target.split(":")
        source = archive.read(module.replace(".", "/") + ".py").decode()
        assert f"def {function}(" in source


def test_wheel_is_importable_elsewhere(installed: Path, tmp_path: Path) -> None:
    names = [
        ".".join(("sglang_pic", *path.with_suffix("").parts))
        for folder in FOLDERS
        for path in files_of(folder)
        if path.suffix == ".py" and path.stem != "__init__"
    ]
    script = (
        "import sys, importlib.util, sglang_pic\n"
        "print(sglang_pic.__file__)\n"
        "for name in sys.argv[1:]: print(importlib.util.find_spec(name).origin)\n"
    )
    origins = run_python("-c", script, *names, cwd=tmp_path, pythonpath=installed).splitlines()
    assert len(origins) == 1 + len(names)
    assert all(Path(origin).is_relative_to(installed) for origin in origins)


def test_wheel_adds_no_name_beside_its_own(installed: Path, tmp_path: Path) -> None:
    script = "import importlib.util as u; print(u.find_spec('eval'), u.find_spec('kernels').origin)"
    eval_spec, kernels_file = run_python("-c", script, cwd=tmp_path, pythonpath=installed).split(
        " ", 1
    )
    assert eval_spec == "None"
    assert "site-packages" in kernels_file


def test_root_does_not_shadow_the_pypi_package_kernels() -> None:
    for folder in FOLDERS:
        assert not (ROOT / folder / "__init__.py").exists()
    for pythonpath in (None, ROOT):
        file = run_python(
            "-c", "import kernels; print(kernels.__file__)", cwd=ROOT, pythonpath=pythonpath
        )
        assert "site-packages" in file


def test_root_offers_eval_as_programs() -> None:
    for module in ("eval.models.smollm2", "sglang_pic.eval.models.smollm2"):
        assert "--out" in run_python("-m", module, "--help", cwd=ROOT)
