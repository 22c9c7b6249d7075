#!/usr/bin/env python3
"""Full size: a ViT-B/16 with five classes, every parameter random, through vit-convert and vit-cli, against PyTorch.

    full_size.py [--bin target/release] [--keep FOLDER] [--runs 3]

Needs torch, timm, onnx, onnxscript, safetensors, numpy (made with torch 2.15.0, timm 1.0.31, onnx 1.23.2). It exports
the model twice (TorchScript exporter at opset 11, dynamo exporter at opset 18; 343 MB each) and checks for both:
the converted tensors are the state dict's, bit for bit; logits and features within 1e-4 of PyTorch's, relative to the
largest; private memory of a conversion without verification at most 64 MB; its time against `cp` + fsync of the same
file in the same run, and the time of one with verification, beyond that of the copy, in forward passes of one image (by
`vit-cli bench` with its defaults, and with candle's modules); both are printed, and conditions (1.5 copies, 6 passes) where
--strict-time is given: another load on the machine spoils them; `summary --style torchsummary` is tests/fixtures/torchsummary/base.txt to the letter; `predict --format seed` prints
five lines. Exit status: 0 all good, 1 not.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
FAILED = []


def check(what, good, figure=""):
    print(f"{'ok  ' if good else 'FAIL'} {what}{': ' if figure else ''}{figure}", flush=True)
    if not good:
        FAILED.append(what)


def make(folder):
    """Writes legacy11.onnx, dynamo18.onnx, state.safetensors and expect.safetensors, unless they are there."""
    import timm
    import torch
    from safetensors.torch import save_file

    if (folder / "expect.safetensors").exists():
        return
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(11)
    model = timm.create_model("vit_base_patch16_224", num_classes=5).eval()
    with torch.no_grad():  # nothing stays at its initial value: norms, biases and tokens are random too
        for name, p in model.named_parameters():
            p.normal_(1.0, 0.2) if "norm" in name and name.endswith("weight") else p.normal_(0.0, 0.03)
        x = torch.randn(2, 3, 224, 224)
        features = model.forward_features(x)
        logits = model.forward_head(features)
    save_file(model.state_dict(), folder / "state.safetensors")
    axes = {"x": {0: "batch"}, "logits": {0: "batch"}}
    names = dict(input_names=["x"], output_names=["logits"])
    timm.layers.set_fused_attn(False)  # opset 11 has no operator for it
    for block in model.blocks:
        block.attn.fused_attn = False
    torch.onnx.export(model, x[:1], folder / "legacy11.onnx", opset_version=11, dynamo=False, dynamic_axes=axes, **names)
    for block in model.blocks:
        block.attn.fused_attn = True
    batch = torch.export.Dim("batch")
    torch.onnx.export(model, (x,), folder / "dynamo18.onnx", opset_version=18, dynamo=True, external_data=False,
                      dynamic_shapes=({0: batch},), **names)
    save_file({"x": x, "logits": logits, "features": features}, folder / "expect.safetensors")


def peak_private(command):
    """Runs it; -> (exit status, seconds, largest RssAnon in MB, stderr)."""
    start = time.perf_counter()
    p = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = 0
    while p.poll() is None:
        try:
            for line in open(f"/proc/{p.pid}/status"):
                if line.startswith("RssAnon:"):
                    peak = max(peak, int(line.split()[1]))
        except OSError:
            pass
        time.sleep(0.002)
    return p.returncode, time.perf_counter() - start, peak / 1024, p.stderr.read()


def seconds(command):
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return time.perf_counter() - start


def forward(cli, model, *more):
    """Seconds of one image, as `vit-cli bench` has them."""
    command = [cli, "bench", model, "--batch", "1", "--threads", "2", "--iters", "5", "--json", *more]
    p = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(p.stdout.splitlines()[-1])["median_ms"] / 1000


def copy_and_sync(source, target):
    start = time.perf_counter()
    subprocess.run(["cp", source, target], check=True)
    fd = os.open(target, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    elapsed = time.perf_counter() - start
    os.unlink(target)
    return elapsed


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def judge(folder, name, programs, args):
    import torch
    from safetensors.torch import load_file

    convert, cli = programs
    onnx, out = folder / f"{name}.onnx", folder / f"{name}.safetensors"
    out.unlink(missing_ok=True)
    code, _, peak, err = peak_private([convert, onnx, out, "--no-verify"])
    check(f"{name}: converts", code == 0, err.strip()[-300:] if code else "")
    if code:
        return
    check(f"{name}: at most 64 MB of private memory", peak <= 64, f"{peak:.1f} MB")

    want, got = load_file(folder / "state.safetensors"), load_file(out)
    differ = [n for n in want.keys() | got.keys() if n not in want or n not in got or want[n].dtype != got[n].dtype or not torch.equal(want[n], got[n])]
    check(f"{name}: {len(want)} tensors are the state dict's", not differ, ", ".join(sorted(differ)[:6]))

    expect, y = load_file(folder / "expect.safetensors"), folder / "y.safetensors"
    p = subprocess.run([cli, "forward", out, "--input", folder / "expect.safetensors", "--tensor", "x", "--output", y], capture_output=True, text=True)
    check(f"{name}: forward", p.returncode == 0, p.stderr.strip()[-300:])
    if p.returncode == 0:
        have = load_file(y)
        for key in ["logits", "features"]:
            d = relative(have[key], expect[key])
            check(f"{name}: {key} within 1e-4", d <= 1e-4, f"{d:.2g}")

    copies, conversions = [], []
    for _ in range(args.runs):
        out.unlink(missing_ok=True)
        copies.append(copy_and_sync(onnx, folder / "copy.tmp"))
        conversions.append(seconds([convert, onnx, out, "--no-verify"]))
    ratio = statistics.median(conversions) / statistics.median(copies)
    check(f"{name}: converts in 1.5 times a copy", ratio <= 1.5 or not args.strict_time,
          f"{ratio:.2f} ({statistics.median(conversions):.2f} s, cp + fsync {statistics.median(copies):.2f} s)")

    if not args.no_verify:
        out.unlink(missing_ok=True)
        code, took, peak, err = peak_private([convert, onnx, out])
        check(f"{name}: verifies", code == 0, err.strip()[-300:] if code else f"{took:.1f} s")
        check(f"{name}: at most 1.2 GB of private memory with verification", peak <= 1200, f"{peak:.0f} MB")
        rounds = []
        for _ in range(args.runs):
            out.unlink(missing_ok=True)
            rounds.append((copy_and_sync(onnx, folder / "copy.tmp"), seconds([convert, onnx, out]),
                           forward(cli, out), forward(cli, out, "--modules")))
        copy, whole, passed, modules = (statistics.median(times) for times in zip(*rounds))
        passes = (whole - copy) / passed
        check(f"{name}: converts and verifies in a copy and 6 forward passes", passes <= 6 or not args.strict_time,
              f"a copy and {passes:.1f} passes, {(whole - copy) / modules:.1f} of candle's modules ({whole:.2f} s, cp + fsync "
              f"{copy:.2f} s, a pass {passed * 1000:.0f} ms, {modules * 1000:.0f} ms)")

    table = (HERE / "fixtures/torchsummary/base.txt").read_text()
    p = subprocess.run([cli, "summary", out, "--style", "torchsummary"], capture_output=True, text=True)
    check(f"{name}: torchsummary's table", p.returncode == 0 and p.stdout.startswith(table) and "85,802,501" in p.stdout[len(table):])

    from PIL import Image
    import numpy as np
    image = folder / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)).save(image)
    p = subprocess.run([cli, "predict", image, "--model", out, "--format", "seed"], capture_output=True, text=True)
    lines = [line for line in p.stdout.splitlines() if line.startswith("class: ")]
    check(f"{name}: predict --format seed prints five lines", p.returncode == 0 and len(lines) == 5, p.stderr.strip()[-300:] if p.returncode else "")


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.add_argument("--bin", default="target/release", type=Path)
    parser.add_argument("--keep", type=Path, help="make the files here and leave them")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each")
    parser.add_argument("--strict-time", action="store_true", help="the time ratio is a condition, not only a figure")
    parser.add_argument("--no-verify", action="store_true", help="skip the run with verification")
    parser.add_argument("--make-only", action="store_true")
    args = parser.parse_args()
    programs = [args.bin.resolve() / "vit-convert", args.bin.resolve() / "vit-cli"]
    with tempfile.TemporaryDirectory() as tmp:
        folder = args.keep or Path(tmp)
        folder.mkdir(parents=True, exist_ok=True)
        make(folder)
        if not args.make_only:
            for name in ["legacy11", "dynamo18"]:
                judge(folder, name, programs, args)
    sys.exit(1 if FAILED else 0)


if __name__ == "__main__":
    main()
