"""The package: its profiles, its types, its documentation."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import vit_rs

HERE = Path(__file__).parent


def test_profiles_are_the_main_workspaces():
    tomllib = pytest.importorskip("tomllib")
    ours, main = (tomllib.loads((HERE / name / "Cargo.toml").read_text()) for name in ("..", "../.."))
    for name in ("dev", "release"):
        ours_, main_ = dict(ours["profile"][name]), dict(main["profile"][name])
        packages, all_packages = ours_.pop("package"), main_.pop("package")
        assert ours_ == main_
        # the wheel has no completions for a shell
        assert packages == {name: all_packages[name] for name in packages}
        assert set(all_packages) - set(packages) <= {"clap_complete"}


@pytest.mark.parametrize("checker", [["mypy", "--strict"], ["pyright"]])
def test_a_typed_program(checker):
    found = shutil.which(checker[0], path=str(Path(sys.executable).parent)) or shutil.which(checker[0])
    if not found:
        pytest.skip(f"{checker[0]} is not installed")
    command = [found, *checker[1:], "sample.py"]
    if checker[0] == "pyright":
        command += ["--pythonpath", sys.executable]
    else:
        command += ["--python-executable", sys.executable]
    out = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    # pyarrow has no types of its own
    errors = [line for line in out.stdout.splitlines() if "error" in line and "pyarrow" not in line and "Found" not in line and "0 errors" not in line]
    assert not errors, out.stdout


def test_the_program_runs():
    subprocess.run([sys.executable, HERE / "sample.py"], check=True, capture_output=True)


def test_everything_is_documented():
    for name in vit_rs.__all__:
        thing = getattr(vit_rs, name)
        assert name == "__version__" or (thing.__doc__ or "").strip(), name
    for name in ("embed", "classify", "attention", "embed_arrow"):
        assert "Returns:" in getattr(vit_rs.Model, name).__doc__
    assert "precision" in (vit_rs.Model.__doc__ or "")
