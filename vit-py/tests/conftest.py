"""What all tests share: the small model, its images, and the program if it is built."""

import os
import shutil
from pathlib import Path

import pytest

import vit_rs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def samples() -> list[Path]:
    return sorted((ROOT / "weights/digits/samples").glob("*.png"))


@pytest.fixture(scope="session")
def model() -> vit_rs.Model:
    return vit_rs.Model("digits", threads=2)


@pytest.fixture(scope="session")
def program() -> str:
    """vit-cli: what VIT_CLI names, or what cargo built, or what is installed."""
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    for found in [os.environ.get("VIT_CLI"), target / "release/vit-cli", target / "debug/vit-cli", shutil.which("vit-cli")]:
        if found and Path(found).exists():
            return str(found)
    pytest.skip("vit-cli is not built; name it with VIT_CLI")
