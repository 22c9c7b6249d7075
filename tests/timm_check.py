#!/usr/bin/env python3
"""Real sizes against timm: random weights at full size, the folder as timm pushes it, `vit-cli forward` over it.

    timm_check.py [--bin target/release] [--names NAME ...] [--huge]

Needs torch, timm, safetensors (made with torch 2.15.0, timm 1.0.31). Every parameter is random, embeddings small. The limit is
1e-4 relative to the largest value of an answer. `--huge` adds the giants, which need about 10 GB.
"""
import argparse
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

NAMES = ["vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224", "vit_so400m_patch14_siglip_224"]
HUGE = ["vit_giant_patch14_reg4_dinov2"]


def check(name, cli, folder):
    torch.manual_seed(1)
    model = timm.create_model(name).eval()
    size = model.pretrained_cfg["input_size"]
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.ndim == 1 and (n.endswith("weight") or n.endswith("gamma")):
                p.normal_(1.0, 0.2)
            elif p.ndim == 1 or "token" in n or "pos_embed" in n:
                p.normal_(0.0, 0.05)
            else:
                p.normal_(0.0, 1.0 / p[0].numel() ** 0.5)
        x = torch.randn(2, *size)
        features = model.forward_features(x)
        want = {"features": features, "pre_logits": model.forward_head(features, pre_logits=True)}
        if model.num_classes:
            want["logits"] = model.forward_head(features)
    save_for_hf(model, str(folder), safe_serialization=True)
    parameters = sum(p.numel() for p in model.parameters())
    del model
    save_file({"x": x}, folder / "x.safetensors")
    start = time.perf_counter()
    p = subprocess.run([cli, "forward", folder, "--input", folder / "x.safetensors", "--tensor", "x", "--output", folder / "y.safetensors"], capture_output=True, text=True)
    took = time.perf_counter() - start
    if p.returncode:
        print(f"FAIL {name}: {p.stderr.strip()[-400:]}", flush=True)
        return False
    have = load_file(folder / "y.safetensors")
    d = {k: float((have[k] - v).abs().max() / v.abs().max()) if k in have and have[k].shape == v.shape else float("inf") for k, v in want.items()}
    good = all(v <= 1e-4 for v in d.values())
    figures = ", ".join(f"{k} {v:.2g}" for k, v in d.items())
    print(f"{'ok  ' if good else 'FAIL'} {name}: {parameters:,} parameters, {figures}; load and two images {took:.1f} s", flush=True)
    return good


def main():
    ap = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    ap.add_argument("--bin", default="target/release", type=Path)
    ap.add_argument("--names", nargs="*", default=NAMES)
    ap.add_argument("--huge", action="store_true")
    args = ap.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    good = True
    for name in args.names + HUGE * args.huge:
        with tempfile.TemporaryDirectory() as tmp:
            good &= check(name, (args.bin / "vit-cli").resolve(), Path(tmp))
    print(f"largest child: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:.0f} MB")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
