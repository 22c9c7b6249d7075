#!/usr/bin/env bash
# Unpacks the archive of vit-model and builds new crates outside the workspace that depend on it, as a user's crate would: one with
# default features that runs the programs of tools/depend/, and one without default features.
#
#   cargo package --workspace --locked && tools/depend.sh
#
# CARGO_TARGET_DIR is honoured for where the archives are.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
target=${CARGO_TARGET_DIR:-target}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tar -xzf "$target/package/vit-model-$version.crate" -C "$work"

crate() { # name, what follows the path in the dependency, the folder of its programs
    mkdir -p "$work/$1/src/bin"
    cat > "$work/$1/Cargo.toml" <<TOML
[package]
name = "$1"
edition = "2024"
[dependencies]
vit-model = { path = "../vit-model-$version"$2 }
[profile.dev.package."*"]
opt-level = 1
TOML
    cp Cargo.lock "$work/$1/Cargo.lock" # the versions that this workspace is tested with
    cp "$3"/*.rs "$work/$1/src/bin/"
    # one target folder for both, so that what they share is built once
    CARGO_TARGET_DIR=$(realpath -m "$target/depend") cargo build --manifest-path "$work/$1/Cargo.toml"
    for program in "$work/$1"/src/bin/*.rs; do
        name=$(basename "$program" .rs)
        echo "== $1: $name"
        (cd "$root" && "$(realpath "$target/depend")/debug/$name")
    done
}

crate with-defaults '' tools/depend/defaults
crate without-defaults ', default-features = false' tools/depend/bare
