#!/usr/bin/env python3
"""An NVIDIA GPU: vit-cli built with `--features cuda` against timm, transformers and PyTorch, in f32, f16 and bf16.

    gpu_check.py [--bin target/release] [--pack FOLDER] [--only GLOB ...] [--jobs 6] [--precisions f32 f16 bf16] [--bench] [--compile] [--json FILE]

Which device runs: `--device cuda` takes the GPU, is refused with exit status 2 where CUDA_VISIBLE_DEVICES hides it, and `auto`
then says that it runs on the CPU. The embedded model: the classes of every held-out image and PyTorch's probabilities, the
attention picture, the ONNX file against the converted one. A pack of small model folders (`FOLDER/*/CASE/meta.json`; by default
the ones of tests/fixtures/parity): each case's input through `vit-cli forward`, compared with the answers that lie beside it.

Limits, relative to the largest value that is expected (at most 1 in f32):
  f32   1e-4   candle's matrix products are IEEE single here, not TF32: sums in another order are off by about 1e-6, a wrong
               norm's epsilon by 1e-3
  f16   3e-2   11 bits: PyTorch's own answers in this type are off by up to 6e-3 on these cases
  bf16  1.5e-1 8 bits: PyTorch's are off by up to 9e-2
The two of 16 bits show that their kernels are there and right; the finer faults, such as the wrong GELU, show in f32.

Standard library alone; with `--bench` torch and timm (made with torch 2.11.0, timm 1.0.29). It times a ViT-B/16 with random weights
at batches of 1, 8 and 64 against PyTorch on the same GPU, by turns, from pixels in the host's memory to logits in the host's memory
on both sides; PyTorch's time with the input on the GPU is printed beside, and with `--compile` torch.compile's. Errors are those of
the logits against float64. Exit status: 0 all good, 1 not.
"""
import argparse
import copy
import fnmatch
import json
import math
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"f32": 1e-4, "f16": 3e-2, "bf16": 1.5e-1}
FAILED = []


def check(what, good, figure=""):
    print(f"{'ok  ' if good else 'FAIL'} {what}{': ' if figure else ''}{figure}", flush=True)
    if not good:
        FAILED.append(f"{what}: {figure}")


def read_safetensors(path):
    """name → (shape, values), for F32 and U8"""
    blob = Path(path).read_bytes()
    (n,) = struct.unpack("<Q", blob[:8])
    header = json.loads(blob[8 : 8 + n])
    header.pop("__metadata__", None)
    tensors = {}
    for name, info in header.items():
        if info["dtype"] in ("F32", "U8"):
            values = array("f" if info["dtype"] == "F32" else "B")
            first, last = info["data_offsets"]
            values.frombytes(blob[8 + n + first : 8 + n + last])
            tensors[name] = (info["shape"], values)
    return tensors


def difference(have, want):
    """The largest, and infinite where a value is no number."""
    return max((abs(a - b) if a == a else math.inf for a, b in zip(have, want)), default=0.0)


def pixels(path):
    """The bytes of an RGB picture in PNG."""
    blob, at, data = Path(path).read_bytes(), 8, b""
    while at < len(blob):
        size, kind = struct.unpack(">I4s", blob[at : at + 8])
        if kind == b"IHDR":
            width, height = struct.unpack(">II", blob[at + 8 : at + 16])
        elif kind == b"IDAT":
            data += blob[at + 8 : at + 8 + size]
        at += size + 12
    data, row, above, picture = zlib.decompress(data), 3 * width, bytes(3 * width), bytearray()
    for y in range(height):
        how, line = data[y * (row + 1)], bytearray(data[y * (row + 1) + 1 : (y + 1) * (row + 1)])
        for i in range(row):
            left, up, corner = (line[i - 3], above[i], above[i - 3]) if i >= 3 else (0, above[i], 0)
            p = left + up - corner
            paeth = min((left, up, corner), key=lambda v: abs(p - v))
            line[i] = (line[i] + (0, left, up, (left + up) // 2, paeth)[how]) & 255
        picture += line
        above = line
    return picture


class Cli:
    def __init__(self, path):
        self.path = path

    def __call__(self, *args, hidden=False):
        env = dict(os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if hidden else {}))
        return subprocess.run([self.path, *map(str, args)], stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env)


def devices(cli):
    """What `--device` means, with a GPU and without."""
    p = cli("predict", "--device", "cuda", ROOT / "weights/digits/samples/3.png", hidden=True)
    check("cuda, hidden: exit status 2, why, and no answer", p.returncode == 2 and "--device cuda" in p.stderr and not p.stdout, p.stderr.strip())
    p = cli("predict", "--device", "auto", "-v", ROOT / "weights/digits/samples/3.png", hidden=True)
    check("auto, hidden: the CPU, and says so", p.returncode == 0 and "running on the CPU" in p.stderr and "candle-cuda" not in p.stderr, p.stderr.strip())
    p = cli("predict", "--device", "auto", "-v", ROOT / "weights/digits/samples/3.png")
    check("auto: the GPU, and says so", p.returncode == 0 and "candle-cuda" in p.stderr, p.stderr.strip())
    p = cli("predict", "--device", "cuda", "--precision", "bf16x3", ROOT / "weights/digits/samples/3.png")
    check("a precision that no GPU has", p.returncode == 2 and "f32, f16 and bf16" in p.stderr, p.stderr.strip())


def digits(cli, tmp):
    """The embedded model on every held-out image, against PyTorch."""
    held = read_safetensors(ROOT / "weights/digits/heldout.safetensors")
    want = read_safetensors(ROOT / "tests/fixtures/digits/pytorch.safetensors")["probabilities"][1]
    folder = Path(tmp, "digits")
    folder.mkdir()
    for i, label in enumerate(held["labels"][1]):
        (folder / f"{i:03}.pgm").write_bytes(b"P5\n32 32\n255\n" + held["images"][1][i * 1024 : (i + 1) * 1024].tobytes())
    for precision, limit in (("f32", 1e-4), ("f16", 5e-2), ("bf16", 2e-1)):  # of a probability, not of a logit
        p = cli("predict", "--device", "cuda", "--precision", precision, "--format", "jsonl", "-k", 10, folder)
        rows = [json.loads(line)["predictions"] for line in p.stdout.splitlines()]
        have = [sorted((r["class"], r["probability"]) for r in row) for row in rows]
        d = difference([x for row in have for _, x in row], want)
        right = sum(row[0]["class"] == label for row, label in zip(rows, held["labels"][1]))
        same = sum(row[0]["class"] == max(range(10), key=want[i * 10 : i * 10 + 10].__getitem__) for i, row in enumerate(rows))
        good = p.returncode == 0 and len(rows) == 360 and d <= limit and right >= 349 and same == 360 if precision == "f32" else d <= limit and right >= 349
        check(f"digits in {precision}", good, f"{right} of {len(rows)} right, {same} as PyTorch, probabilities within {d:.1e} {p.stderr.strip()}")
    pictures = []
    for device in ("cpu", "cuda"):
        out = Path(tmp, f"{device}.png")
        p = cli("explain", ROOT / "weights/digits/samples/8.png", "--device", device, "--output", out)
        pictures.append(pixels(out) if p.returncode == 0 else p.stderr)
    same = len(pictures[0]) == len(pictures[1]) > 224 * 224
    d = difference(*pictures) if same else math.inf
    check("the attention picture", d <= 1, f"within {d} of 255 levels")  # a level: where rounding falls the other way
    p = cli("compare", ROOT / "weights/digits/model.onnx", "digits", "--device", "cuda")
    check("the ONNX file and the converted one", p.returncode == 0, " ".join((p.stdout + p.stderr).split()))


def judge(cli, case, precision, tmp):
    """None where all is right, else why; and the largest difference"""
    meta = json.loads((case / "meta.json").read_text())
    out = Path(tmp, f"{case.parent.name}-{case.name}-{precision}.safetensors")
    p = cli("forward", case, "--device", "cuda", "--precision", precision, "--input", case / "expect.safetensors", "--tensor", "x", "--output", out)
    if p.returncode:
        allowed = meta["expect"] == "either" and p.returncode == 2
        return (None if allowed else f"exit status {p.returncode}: {p.stderr.strip()[-300:]}"), 0.0
    want, have = read_safetensors(case / "expect.safetensors"), read_safetensors(out)
    out.unlink()
    worst = 0.0
    for name in meta["compare"]:
        if name == "logits" and meta.get("num_classes") == 0 and name not in have:
            continue
        if name not in have or have[name][0] != want[name][0]:
            return f"{name}: {have.get(name, ['absent'])[0]}, want {want[name][0]}", math.inf
        scale = max(map(abs, want[name][1]), default=0.0)
        worst = max(worst, difference(have[name][1], want[name][1]) / (min(scale, 1.0) if precision == "f32" else scale))
    return (None if worst <= LIMITS[precision] else f"differs by {worst:.2e}"), worst


def parity(cli, pack, only, precisions, jobs, tmp):
    # folders: torchvision's bare state dicts say too little of themselves to run as they are
    cases = sorted(config.parent for config in pack.glob("*/*/config.json") if any(fnmatch.fnmatch(config.parent.name, g) for g in only))
    check("cases in the pack", bool(cases), f"{len(cases)} in {pack}")
    figures = {}
    for precision in precisions:
        start = time.perf_counter()
        with ThreadPoolExecutor(jobs) as pool:
            results = list(pool.map(lambda case: judge(cli, case, precision, tmp), cases))
        worst = sorted(((d, f"{case.parent.name}/{case.name}") for case, (_, d) in zip(cases, results)), reverse=True)
        figures[precision] = {name: d for d, name in worst}
        for case, (why, _) in zip(cases, results):
            if why:
                check(f"{case.parent.name}/{case.name} in {precision}", False, why)
        good = sum(why is None for why, _ in results)
        took = time.perf_counter() - start
        median = statistics.median(d for d, _ in worst) if worst else math.nan
        listed = ", ".join(f"{name} {d:.1e}" for d, name in worst[:3])
        check(f"{precision}: {good} of {len(cases)}", good == len(cases), f"median difference {median:.1e}, largest {listed} ({took:.0f} s)")
    return figures


def bench(cli, batches, rounds, precisions, compiled, tmp):
    import timm
    import torch
    from safetensors.torch import load_file, save_file
    from timm.models import save_for_hf

    torch.manual_seed(1)
    model = timm.create_model("vit_base_patch16_224").eval()
    with torch.no_grad():  # nothing stays at its initial value; sizes as in a trained model
        for name, p in model.named_parameters():
            p.normal_(1.0, 0.2) if "norm" in name and name.endswith("weight") else p.normal_(0.0, 0.03)
    folder = Path(tmp, "base")
    save_for_hf(model, str(folder), safe_serialization=True)
    x = torch.randn(8, 3, 224, 224)
    save_file({"x": x}, folder / "x.safetensors")
    with torch.no_grad():
        exact = copy.deepcopy(model).double().cuda()(x.double().cuda()).cpu()
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, timm {timm.__version__}; tf32 in PyTorch: {torch.backends.cuda.matmul.allow_tf32}")
    print("logit errors against float64, relative to the largest; ms from host to host, medians; ratio to PyTorch eager, smaller is faster")
    rows = []
    for precision in precisions:
        dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[precision]
        theirs = copy.deepcopy(model).to(dtype).cuda()
        error = lambda y: float((y.double() - exact).abs().max() / exact.abs().max())
        out = folder / "y.safetensors"
        p = cli("forward", folder, "--device", "cuda", "--precision", precision, "--input", folder / "x.safetensors", "--tensor", "x", "--output", out)
        ours = error(load_file(out)["logits"]) if p.returncode == 0 else math.inf
        with torch.no_grad():
            pytorch = error(theirs(x.to(dtype).cuda()).float().cpu())
        # as good as PyTorch's arithmetic in the same type: another order of the same roundings
        check(f"ViT-B/16 in {precision}", ours <= 2 * pytorch + 1e-6, f"logit error {ours:.1e}, PyTorch {pytorch:.1e} {p.stderr.strip()}")
        contenders = {"eager": theirs, **({"compile": torch.compile(theirs)} if compiled and precision == "bf16" else {})}
        for batch in batches:
            inputs = [torch.randn(batch, 3, 224, 224) for _ in range(4)]
            runs, times = (60 if batch == 1 else 20 if batch < 64 else 7), {}

            def timed(net, count, on_gpu):
                there = [i.to("cuda").to(dtype) for i in inputs]
                for i in range(count):
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    if on_gpu:
                        net(there[i % 4])
                        torch.cuda.synchronize()
                    else:
                        net(inputs[i % 4].to("cuda").to(dtype)).float().cpu()
                    yield (time.perf_counter() - start) * 1e3

            with torch.inference_mode():
                for net in contenders.values():
                    list(timed(net, 10, False))
                for _ in range(rounds):  # by turns
                    for name, net in contenders.items():
                        times.setdefault(name, []).extend(timed(net, runs, False))
                        times.setdefault(name + ", input there", []).extend(timed(net, runs, True))
                    p = cli("bench", folder, "--device", "cuda", "--precision", precision, "--batch", batch, "--warmup", 10, "--iters", runs, "--json")
                    times.setdefault("vit-cli", []).extend(json.loads(p.stdout.splitlines()[-1])["times_ms"] if p.returncode == 0 else [math.inf])
            ms = {name: statistics.median(t) for name, t in times.items()}
            rows.append({"precision": precision, "batch": batch, "ms": ms, "error": ours, "torch_error": pytorch})
            others = ", ".join(f"{name} {t:.2f}" for name, t in ms.items() if name != "vit-cli")
            print(f"  {precision:4} batch {batch:3}: vit-cli {ms['vit-cli']:.2f} ms, {others}; {ms['vit-cli'] / ms['eager']:.2f} of eager", flush=True)
    return rows


def main():
    ap = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    ap.add_argument("--bin", default="target/release", type=Path)
    ap.add_argument("--pack", default=ROOT / "tests/fixtures/parity", type=Path)
    ap.add_argument("--only", nargs="*", default=["*"])
    ap.add_argument("--jobs", default=6, type=int)
    ap.add_argument("--precisions", nargs="*", default=list(LIMITS), choices=LIMITS)
    ap.add_argument("--bench", action="store_true")
    ap.add_argument("--batches", nargs="*", default=[1, 8, 64], type=int)
    ap.add_argument("--rounds", default=3, type=int)
    ap.add_argument("--compile", action="store_true")
    ap.add_argument("--json", type=Path)
    args = ap.parse_args()
    cli, figures = Cli((args.bin / "vit-cli").resolve()), {}
    with tempfile.TemporaryDirectory() as tmp:
        devices(cli)
        digits(cli, tmp)
        figures["parity"] = parity(cli, args.pack, args.only, args.precisions, args.jobs, tmp)
        if args.bench:
            figures["bench"] = bench(cli, args.batches, args.rounds, args.precisions, args.compile, tmp)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    print("\n" + ("\n".join(["failed:"] + FAILED) if FAILED else "all good"))
    sys.exit(1 if FAILED else 0)


if __name__ == "__main__":
    main()
