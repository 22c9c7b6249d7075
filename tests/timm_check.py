#!/usr/bin/env python3
"""timm's names against timm: real sizes with random weights, and all 179 names shrunk.

    timm_check.py [--bin target/release] [--names NAME ...] [--huge]
    timm_check.py [--bin target/release] --all [--names NAME ...]

Needs torch, timm, safetensors (made with torch 2.15.0, timm 1.0.31). Every parameter is random; a folder is written as timm
pushes it to the Hub, and `vit-cli forward` runs over it. The limit is 1e-4 relative to the largest value of an answer.

Without `--all`: a few names at full size. `--huge` adds the giants, which need about 10 GB.

With `--all`: every name of timm's vision_transformer.py and deit.py. Names and shapes of all tensors at full size (timm's model
on the meta device, ours by `vit-cli summary`), and the answers of the same architecture made small: two blocks, 48 channels,
3 x 3 patches, tokens so faint that another epsilon in a norm shows.
"""
import argparse
import json
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
FILES = ("timm.models.vision_transformer", "timm.models.deit")
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}


def every_name():
    return [name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__ in FILES]


def randomise(model, faint):
    """Random parameters; `faint` scales what the first norm sees."""
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.ndim == 1 and (n.endswith("weight") or n.endswith("gamma")):
                p.normal_(1.0, 0.2)
            elif "token" in n or "pos_embed" in n:
                p.normal_(0.0, 0.05 * faint)
            elif p.ndim == 1:
                p.normal_(0.0, 0.05 * (faint if n.startswith("patch_embed") else 1.0))
            else:
                p.normal_(0.0, 1.0 / p[0].numel() ** 0.5 * (faint if n.startswith("patch_embed") else 1.0))


def answers(model, cli, folder, args):
    """timm's answers, ours, and how long ours took: {name: relative difference}, seconds; or what our program complained of."""
    size = (3, *model.patch_embed.img_size)
    x = torch.randn(2, *size)
    with torch.no_grad():
        features = model.forward_features(x)
        want = {"features": features, "pre_logits": model.forward_head(features, pre_logits=True)}
        if model.num_classes:
            want["logits"] = model.forward_head(features)
    save_for_hf(model, str(folder), model_args=args, safe_serialization=True)
    del model
    save_file({"x": x}, folder / "x.safetensors")
    start = time.perf_counter()
    p = subprocess.run([cli, "forward", folder, "--input", folder / "x.safetensors", "--tensor", "x", "--output", folder / "y.safetensors"], capture_output=True, text=True)
    took = time.perf_counter() - start
    if p.returncode:
        return p.stderr.strip()[-400:], took
    have = load_file(folder / "y.safetensors")
    far = lambda k, v: float((have[k] - v).abs().max() / v.abs().max()) if k in have and have[k].shape == v.shape else float("inf")
    return {k: far(k, v) for k, v in want.items()}, took


def check(name, cli, folder):
    """Full size."""
    torch.manual_seed(1)
    model = timm.create_model(name).eval()
    randomise(model, 1.0)
    parameters = sum(p.numel() for p in model.parameters())
    d, took = answers(model, cli, folder, None)
    good = isinstance(d, dict) and all(v <= 1e-4 for v in d.values())
    figures = ", ".join(f"{k} {v:.2g}" for k, v in d.items()) if isinstance(d, dict) else d
    print(f"{'ok  ' if good else 'FAIL'} {name}: {parameters:,} parameters, {figures}; load and two images {took:.1f} s", flush=True)
    return good


def tensors(module, found):
    """Every tensor of a module of `summary --style json`."""
    found.update({k: tuple(v) for k, v in module["tensors"].items()})
    for child in module["modules"]:
        tensors(child, found)
    return found


def check_small(name, cli, folder):
    """Names and shapes at full size, answers shrunk. An empty list where all is well, and the largest difference."""
    with torch.device("meta"):
        full = timm.create_model(name)
    want = {k: tuple(v.shape) for k, v in full.state_dict().items()}
    p = subprocess.run([cli, "summary", name, "--style", "json"], capture_output=True, text=True)
    if p.returncode:
        return [p.stderr.strip()[-400:]], float("inf")
    summary = json.loads(p.stdout)
    have = tensors(summary["modules"], {})
    wrong = [f"{k}: timm {want.get(k)}, here {have.get(k)}" for k in sorted(want.keys() | have.keys()) if want.get(k) != have.get(k)]
    (ph, pw) = full.patch_embed.patch_size
    if summary["config"]["img_size"] != list(full.patch_embed.img_size) or summary["config"]["num_classes"] != full.num_classes:
        wrong.append(f"size and classes: timm {full.patch_embed.img_size}, {full.num_classes}")
    torch.manual_seed(1)
    args = {**SMALL, "img_size": [3 * ph, 3 * pw]}
    model = timm.create_model(name, **args).eval()
    randomise(model, 0.02)
    d, _ = answers(model, cli, folder, args)
    if not isinstance(d, dict):
        return wrong + [d], float("inf")
    wrong += [f"{k} differs by {v:.2g}" for k, v in d.items() if not v <= 1e-4]
    return wrong, max(d.values())


def main():
    ap = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    ap.add_argument("--bin", default="target/release", type=Path)
    ap.add_argument("--names", nargs="*")
    ap.add_argument("--huge", action="store_true")
    ap.add_argument("--all", action="store_true")
    args = ap.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    cli = (args.bin / "vit-cli").resolve()
    good = True
    if args.all:
        names, failed, worst = args.names or every_name(), 0, (0.0, "")
        for name in names:
            with tempfile.TemporaryDirectory() as tmp:
                wrong, far = check_small(name, cli, Path(tmp))
            worst, failed = max(worst, (far, name)), failed + bool(wrong)
            if wrong:
                print(f"FAIL {name}: " + "; ".join(wrong[:5]), flush=True)
        print(f"{len(names) - failed} of {len(names)} names are timm's {timm.__version__}; largest difference {worst[0]:.2g} ({worst[1]})")
        sys.exit(1 if failed else 0)
    for name in (args.names or NAMES) + HUGE * args.huge:
        with tempfile.TemporaryDirectory() as tmp:
            good &= check(name, cli, Path(tmp))
    print(f"largest child: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:.0f} MB")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
