#!/usr/bin/env bash
# Builds the programs twice, from two folders with two target folders and two names of cargo's home, and compares every byte.
#
#   tools/reproducible.sh [FOLDER]      the last commit; FOLDER (default: a temporary one) keeps both builds
#
# What a build would take from its machine is where things lie: panic messages and line tables name source files. Every such
# path is rewritten, as must be done by whoever wants to make the same binary again:
#
#   RUSTFLAGS="--remap-path-prefix=<checkout>=/vit-rs --remap-path-prefix=<target>=/target --remap-path-prefix=<cargo home>=/cargo"
#   CFLAGS="-ffile-prefix-map=<cargo home>=/cargo -ffile-prefix-map=<target>=/target"
#
#   CARGO_PROFILE_RELEASE_STRIP=symbols     names of local symbols carry hashes of what the optimiser held in between
#
# The compiler, the linker and the target must be the same; rustc --version --verbose is printed with the digests.
#
# Seen with rustc 1.95: vit-convert the same; vit-cli differs in some 500 bytes of code, all in fast_image_resize's vertical
# convolutions in f32, where the optimiser gave the same registers other turns. Where address randomisation can be switched off
# (`setarch -R`), it is, as the order in which an optimiser walks its tables may come from addresses.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
work=${1:-$(mktemp -d)}
mkdir -p "$work"
work=$(cd "$work" && pwd)
home=${CARGO_HOME:-$HOME/.cargo}
programs=(vit-cli vit-convert)
still=()
setarch -R true 2>/dev/null && still=(setarch -R)

build() { # name of the checkout's folder, of the target folder, of cargo's home
    local source=$work/$1 target=$work/$2 cargo=$work/$3
    mkdir -p "$source"
    git -C "$root" archive HEAD | tar -x -C "$source"
    ln -sfn "$home" "$cargo"
    (
        cd "$source"
        export CARGO_HOME=$cargo CARGO_TARGET_DIR=$target
        # the longest prefix last: the last that fits is taken
        RUSTFLAGS="--remap-path-prefix=$cargo=/cargo --remap-path-prefix=$source=/vit-rs --remap-path-prefix=$target=/target" \
            CFLAGS="-ffile-prefix-map=$cargo=/cargo -ffile-prefix-map=$source=/vit-rs -ffile-prefix-map=$target=/target" \
            CARGO_PROFILE_RELEASE_STRIP=symbols "${still[@]}" cargo build --release --locked -p vit-cli -p vit-convert
    )
}

build one target-one cargo-one
build another/checkout target-of-the-other cargo-of-the-other

rustc --version --verbose
differ=0
for program in "${programs[@]}"; do
    a=$work/target-one/release/$program b=$work/target-of-the-other/release/$program
    sha256sum "$a" "$b"
    if ! cmp "$a" "$b"; then
        differ=1
        echo "$program differs; sections:"
        diff <(readelf -SW "$a" 2>/dev/null) <(readelf -SW "$b" 2>/dev/null) | head -40 || true
    fi
    # not a byte of either folder's name may be left
    if LC_ALL=C grep -aoF -m5 "$work" "$a" | sort | uniq -c; then
        differ=1
        echo "$program still holds the path $work"
    fi
done
[ "$differ" = 0 ] && echo "two builds, one binary"
exit "$differ"
