#!/usr/bin/env bash
# The fixtures as seeds: fuzz/corpus/<target>.
set -euo pipefail
cd "$(dirname "$0")/.."
for target in onnx safetensors config image pickle; do mkdir -p "fuzz/corpus/$target"; done
for file in tests/fixtures/zoo/*/model.onnx; do cp "$file" "fuzz/corpus/onnx/$(basename "$(dirname "$file")")"; done
cp weights/digits/model.safetensors fuzz/corpus/safetensors/digits
# what is broken in a file without checksums goes further
for file in tests/fixtures/parity/*/*/model.safetensors; do cp "$file" "fuzz/corpus/safetensors/$(basename "$(dirname "$file")")"; done
cp tests/fixtures/containers/plain/*.p* tests/fixtures/containers/plain/*.ckpt tests/fixtures/containers/fp8/*.pth fuzz/corpus/pickle/
# the first byte says what the text is
with() { printf "\\x0$1" | cat - "$2" >"fuzz/corpus/config/$1-$3"; }
for file in tests/fixtures/parity/timm/*/config.json; do with 0 "$file" "$(basename "$(dirname "$file")")"; done
for file in tests/fixtures/parity/hf/*/config.json; do with 1 "$file" "$(basename "$(dirname "$file")")"; done
for file in tests/fixtures/parity/hf/*/preprocessor_config.json; do with 2 "$file" "$(basename "$(dirname "$file")")"; done
printf '\x03{"metadata":{},"weight_map":{"cls_token":"weights.safetensors"}}' >fuzz/corpus/config/3-index
with 4 weights/digits/labels.txt labels
printf '\x04{"0":"daisy","1":"dandelion"}' >fuzz/corpus/config/4-indices
printf '\x04["daisy","dandelion"]' >fuzz/corpus/config/4-list
cp weights/digits/samples/*.png tests/fixtures/images/*.* tests/fixtures/preprocess/images/*.png fuzz/corpus/image/
