#!/usr/bin/env python3
"""Runs vit-convert and vit-cli over a folder of cases (fixtures/README.md says what a case is) and judges each of them.

    judge_zoo.py FOLDER [--bin target/release] [--only GLOB ...]

Standard library only. Fails where a case that must convert doesn't, or with another configuration, other tensors or other
logits; where one that must be refused converts; where any answer is wrong; and where a refusal is not clean.
"""
import argparse
import fnmatch
import hashlib
import json
import math
import struct
import subprocess
import sys
import tempfile
from array import array
from pathlib import Path


def read_safetensors(path):
    """-> {name: (shape, bytes)}, metadata"""
    blob = path.read_bytes()
    (n,) = struct.unpack("<Q", blob[:8])
    header = json.loads(blob[8:8 + n])
    meta = header.pop("__metadata__", {})
    assert all(t["dtype"] == "F32" for t in header.values()), "not f32"
    return {k: (t["shape"], blob[8 + n + t["data_offsets"][0]:8 + n + t["data_offsets"][1]]) for k, t in header.items()}, meta


def run(*command):
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)


def clean(p):
    return 0 < p.returncode < 126 and p.returncode != 101 and "panicked" not in p.stderr and p.stderr.strip()


def compare_configs(want, have):
    for key, value in want.items():
        other = have.get(key)
        same = math.isclose(value, other, rel_tol=2e-2) if key == "ln_eps" and other else other == value
        if not same and not (key == "head_bias" and want["num_classes"] == 0):
            yield f"{key} is {other}, not {value}"


def same_function(want, have, got):
    """A norm after one token was selected may be called `norm` or `fc_norm`: the same function, and the file cannot tell."""
    if want.get("global_pool") == have.get("global_pool") == "token" and want["fc_norm"] != have["fc_norm"]:
        old, new = ("fc_norm.", "norm.") if have["fc_norm"] else ("norm.", "fc_norm.")
        got = {new + n[len(old):] if n.startswith(old) else n: t for n, t in got.items()}
        have = {**have, "fc_norm": want["fc_norm"], "final_norm": want["final_norm"]}
    return have, got


def judge(case, bin):
    """-> what is wrong, or None; converted or refused"""
    doc = json.loads((case / "config.json").read_text())
    with tempfile.TemporaryDirectory() as tmp:
        out, y = Path(tmp, "out.safetensors"), Path(tmp, "y.safetensors")
        p = run(bin / "vit-convert", case / "model.onnx", out)
        if p.returncode:
            if not clean(p) or any(Path(tmp).iterdir()):
                return f"not a clean refusal: {p.returncode}: {p.stderr.strip()[:300]}", "refused"
            return (f"refused: {p.stderr.strip()[-300:]}" if doc["expect"] == "ok" else None), "refused"
        if doc["expect"] == "refuse":
            return "converted what must be refused", "converted"
        got, meta = read_safetensors(out)
        bad = []
        if doc["expect"] == "ok":
            have, got = same_function(doc["model"], json.loads(meta["config"])["model"], got)
            bad += compare_configs(doc["model"], have)
        if doc.get("weights_exact") and (case / "truth.json").exists():
            truth = json.loads((case / "truth.json").read_text())
            bad += [f"`{n}` missing" for n in truth.keys() - got.keys()] + [f"`{n}` left over" for n in got.keys() - truth.keys()]
            bad += [f"`{n}` differs" for n in truth.keys() & got.keys()
                    if truth[n]["shape"] != got[n][0] or truth[n]["sha256"] != hashlib.sha256(got[n][1]).hexdigest()]
        if (case / "io.safetensors").exists():
            p = run(bin / "vit-cli", "forward", out, "--input", case / "io.safetensors", "--tensor", "x", "--output", y)
            if p.returncode:
                return f"forward: {p.stderr.strip()[-300:]}", "converted"
            want, answer = read_safetensors(case / "io.safetensors")[0]["logits"], read_safetensors(y)[0]
            # a model without a head answers with what its head would read
            name = "logits" if "logits" in answer else "pre_logits"
            if answer[name][0] != want[0]:
                bad.append(f"{name} is {answer[name][0]}, not {want[0]}")
            else:
                d = max(abs(a - b) if a == a else math.inf for a, b in zip(array("f", answer[name][1]), array("f", want[1])))
                if not d <= doc["tolerance"]:
                    bad.append(f"{name} differs by {d:.2g}")
        return "; ".join(bad[:6]) or None, "converted"


def main():
    ap = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    ap.add_argument("folder", type=Path)
    ap.add_argument("--bin", default="target/release", type=Path)
    ap.add_argument("--only", nargs="*", default=["*"])
    args = ap.parse_args()
    tally, failed = {}, 0
    for case in sorted(args.folder.iterdir()):
        if not (case / "config.json").exists() or not any(fnmatch.fnmatch(case.name, g) for g in args.only):
            continue
        expect = json.loads((case / "config.json").read_text())["expect"]
        try:
            why, outcome = judge(case, args.bin.resolve())
        except subprocess.TimeoutExpired:
            why, outcome = "over 60 s", "hung"
        tally[f"{expect}: {outcome}"] = tally.get(f"{expect}: {outcome}", 0) + 1
        if why:
            failed += 1
            print(f"FAIL {case.name}: {why}", flush=True)
    print(", ".join(f"{k} {n}" for k, n in sorted(tally.items())) or "no case", f"- {failed} failed")
    sys.exit(1 if failed or not tally else 0)


main()
