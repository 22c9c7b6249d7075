#!/usr/bin/env bash
# Builds the wheel with the profile `dev` (or the one that VIT_PY_PROFILE names), installs it into a new environment and tests it there.
set -euo pipefail
cd "$(dirname "$0")"
# what the main workspace has built with the same versions and features is used again
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/../target}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet maturin pytest pillow pyarrow mypy
"$work/venv/bin/maturin" build --quiet --profile "${VIT_PY_PROFILE:-dev}" --out "$work"
"$work/venv/bin/pip" install --quiet "$work"/vit_rs-*.whl
cd "$work" && venv/bin/python -c 'from vit_rs import Model; print(Model("digits"))'
cd "$OLDPWD" && exec "$work/venv/bin/pytest" -q -p no:cacheprovider
