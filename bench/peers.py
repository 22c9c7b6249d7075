#!/usr/bin/env python3
"""Time vit-cli against other runtimes, interleaved in one run, so that a machine whose speed drifts slows all alike.

    pip install torch timm onnxruntime openvino safetensors
    cargo build --release -p vit-cli
    bench/peers.py --model vit_base_patch16_224 --batch 1 --threads 2 --vit target/release/vit-cli --markdown

In every round each contender makes a warm-up call and a few timed ones. Printed: the median and the fastest call, images a
second, the median over rounds of the ratio to the reference within the round, and the largest difference of logits from
PyTorch's in f32. The model's weights are random but seeded; inputs too. A runtime that is not installed is left out, and
said. Another program joins with `--external NAME='COMMAND'` (`{model}`, `{onnx}`, `{batch}`, `{threads}` and `{iters}` are
filled in); its last line must be a JSON object with `times_ms`, as `vit-cli bench --json` prints it.
"""

import argparse
import json
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="vit_base_patch16_224", help="a name of timm's")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--iters", type=int, default=5, help="timed calls of a contender in a round")
    p.add_argument("--seconds", type=float, default=110, help="no round begins after this many")
    p.add_argument("--vit", help="the vit-cli program")
    p.add_argument("--vit-run", action="append", metavar="KERNEL:PRECISION",
                   help="what vit-cli is to run, more than once if wanted (default: auto:auto and auto:bf16)")
    p.add_argument("--only", help="of the Python runtimes, these: names, separated by commas")
    p.add_argument("--external", action="append", default=[], metavar="NAME=COMMAND")
    p.add_argument("--reference", default="onnxruntime f32")
    p.add_argument("--folder", help="keep the model's files here, and use them again")
    p.add_argument("--markdown", action="store_true", help="print the README's table")
    p.add_argument("--json", help="write every time here")
    return p.parse_args()


A = arguments()
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = str(A.threads)

import numpy as np  # noqa: E402  (after the number of threads is set)
import timm  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(A.threads)


def files(folder):
    """The model as a timm folder (model.safetensors, config.json) and as ONNX; made where they are not there yet."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model(A.model).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # no tensor stays all zeros or ones, which a runtime could fold away
            parameter.add_(0.02 * torch.randn_like(parameter))
    size = model.default_cfg["input_size"]
    onnx = folder / "model.onnx"
    if not onnx.exists():
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
        keys = ("input_size", "interpolation", "crop_pct", "mean", "std", "num_classes", "pool_size", "first_conv", "classifier")
        config = {"architecture": A.model, "num_classes": model.num_classes,
                  "pretrained_cfg": {key: model.pretrained_cfg[key] for key in keys if key in model.pretrained_cfg}}
        (folder / "config.json").write_text(json.dumps(config))
        torch.onnx.export(model, torch.randn(1, *size), str(onnx), opset_version=17, dynamo=False, input_names=["x"],
                          output_names=["logits"], dynamic_axes={"x": {0: "batch"}, "logits": {0: "batch"}})
    return model, size, onnx


def contenders(model, x, onnx):
    """Name → a function that makes a function that answers logits."""

    def in_torch(dtype, compiled):
        def make():
            import copy
            m, inputs = copy.deepcopy(model).to(dtype), torch.from_numpy(x).to(dtype)
            if compiled:
                from torch._inductor import config
                config.freezing = True
                m = torch.compile(m)

            def run():
                with torch.no_grad():
                    return m(inputs).float().numpy()
            return run
        return make

    def in_onnxruntime():
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = A.threads
        session = onnxruntime.InferenceSession(str(onnx), options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {"x": x})[0]

    def in_openvino(precision):
        def make():
            import openvino
            core = openvino.Core()
            m = core.read_model(str(onnx))
            m.reshape(list(x.shape))
            options = {"INFERENCE_NUM_THREADS": A.threads, "PERFORMANCE_HINT": "LATENCY",
                       "INFERENCE_PRECISION_HINT": precision}
            request = core.compile_model(m, "CPU", options).create_infer_request()

            def run():
                request.infer([x])
                return np.array(request.get_output_tensor(0).data, dtype=np.float32)
            return run
        return make

    all_ = {
        "torch f32": in_torch(torch.float32, False),
        "torch bf16": in_torch(torch.bfloat16, False),
        "torch.compile f32": in_torch(torch.float32, True),
        "torch.compile bf16": in_torch(torch.bfloat16, True),
        "onnxruntime f32": in_onnxruntime,
        "openvino f32": in_openvino("f32"),
        "openvino bf16": in_openvino("bf16"),
    }
    return {name: make for name, make in all_.items() if not A.only or name in A.only.split(",")}


class Here:
    """A contender in this process."""

    def __init__(self, make):
        self.run = make()
        self.logits = self.run()

    def round(self):
        self.run()
        times = []
        for _ in range(A.iters):
            start = time.perf_counter()
            self.run()
            times.append((time.perf_counter() - start) * 1e3)
        return times


class Program:
    """A contender in a process of its own."""

    logits = None

    def __init__(self, command, environment=None):
        self.command, self.environment = command, {**os.environ, **(environment or {})}

    def round(self):
        done = subprocess.run(self.command, env=self.environment, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.strip().splitlines()[-1])["times_ms"]


def main():
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(A.folder or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        compare(folder)


def compare(folder):
    model, size, onnx = files(folder)
    x = np.random.default_rng(A.batch).standard_normal((A.batch, *size), dtype=np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()
    runs = {}
    for name, make in contenders(model, x, onnx).items():
        try:
            runs[name] = Here(make)
        except Exception as error:  # a runtime that is absent, or cannot run the model, is left out and said
            print(f"{name} is left out: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
    if A.vit:
        for run in A.vit_run or ["auto:auto", "auto:bf16"]:
            kernel, precision = run.split(":")
            command = [A.vit, "bench", str(folder), "--batch", str(A.batch), "--threads", str(A.threads),
                       "--precision", precision, "--iters", str(A.iters), "--warmup", "1", "--json"]
            runs[f"vit-cli {run}"] = Program(command, None if kernel == "auto" else {"VIT_CPU": kernel})
    for external in A.external:
        name, command = external.split("=", 1)
        filled = command.format(model=folder, onnx=onnx, batch=A.batch, threads=A.threads, iters=A.iters)
        runs[name] = Program(shlex.split(filled))

    times, start, done = {name: [] for name in runs}, time.perf_counter(), 0
    while done < A.rounds and (done == 0 or time.perf_counter() - start < A.seconds):
        for name, run in runs.items():
            time.sleep(0.05)  # threads that still spin come to rest
            times[name].append(run.round())
        done += 1
    table(runs, times, expected, done)


def table(runs, times, expected, rounds):
    reference = A.reference if A.reference in runs else next(iter(runs))
    median = {name: statistics.median(t for r in times[name] for t in r) for name in runs}
    rows = []
    for name in sorted(runs, key=median.get):
        pairs = zip(times[name], times[reference])
        ratio = statistics.median(statistics.median(a) / statistics.median(b) for a, b in pairs)
        fastest = min(t for r in times[name] for t in r)
        logits = runs[name].logits
        error = "" if logits is None else f"{np.abs(logits - expected).max():.1e}"
        rows.append((name, f"{median[name]:.1f}", f"{fastest:.1f}", f"{A.batch * 1e3 / median[name]:.1f}", f"{ratio:.2f}", error))
    head = ("", "median ms", "fastest ms", "images/s", f"÷ {reference}", "logit error")
    versions = [f"{m.__name__} {m.__version__}" for m in map(sys.modules.get, ("torch", "onnxruntime", "openvino")) if m]
    print(f"{A.model}, batch {A.batch}, {A.threads} threads, {rounds} rounds of {A.iters}; {cpu()}; {', '.join(versions)}\n")
    if A.markdown:
        print("| " + " | ".join(head) + " |\n|---" + "|---:" * (len(head) - 1) + "|")
        print("\n".join("| " + " | ".join(row) + " |" for row in rows))
    else:
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        for row in [head, *rows]:
            print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))
    if A.json:
        pathlib.Path(A.json).write_text(json.dumps({"batch": A.batch, "threads": A.threads, "times_ms": times}, indent=1))


def cpu():
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
