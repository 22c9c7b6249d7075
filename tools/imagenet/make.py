#!/usr/bin/env python3
"""Writes vit-model/imagenet/synsets.gz: the synsets of ImageNet's subsets that timm's models know, and their words.

    pip install timm
    python tools/imagenet/make.py

A line for each synset, sorted: its number, the subsets that contain it (a hexadecimal sum: 1 = 1k, 2 = 12k, 4 = 22k,
8 = 22k as Microsoft orders it, 16 = 21k of Google, 32 = 21k of MIIL's fall 2011, 64 = its winter 2021), and its first word.
In a subset, classes have the order of the synsets' numbers; in Microsoft's 22k, the classes of 1k come first.
"""
import csv
import gzip
from importlib.resources import files
from pathlib import Path

SUBSETS = ["imagenet", "imagenet12k", "imagenet22k", "imagenet22k_ms", "imagenet21k_goog", "imagenet21k_miil", "imagenet21k_miil_w21"]

info = files("timm.data") / "_info"
read = lambda name: (info / name).read_text(encoding="utf-8").splitlines()
members = [[line for line in read(f"{name}_synsets.txt") if line] for name in SUBSETS]
for name, synsets in zip(SUBSETS, members):
    expected = sorted(synsets)
    if name == "imagenet22k_ms":
        expected = members[0] + [synset for synset in expected if synset not in set(members[0])]
    assert synsets == expected, f"{name} has another order than the reader assumes"
words = dict(csv.reader(read("imagenet_synset_to_lemma.txt"), delimiter="\t"))
lines = []
for synset in sorted(set().union(*members)):
    subsets = sum(1 << bit for bit, synsets in enumerate(map(set, members)) if synset in synsets)
    word = words[synset].split(",")[0].strip()
    assert word and "\t" not in word
    lines.append(f"{synset}\t{subsets:x}\t{word}\n")
output = Path(__file__).parent / "../../vit-model/imagenet/synsets.gz"
output.parent.mkdir(exist_ok=True)
with open(output, "wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
    packed.write("".join(lines).encode())
print(len(lines), "synsets,", output.stat().st_size, "bytes")
