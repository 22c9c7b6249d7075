#!/usr/bin/env python3
"""Time vit-cli against other runtimes, interleaved in one run, so that a machine whose speed drifts slows all alike.

    pip install torch timm onnx onnxruntime openvino safetensors
    cargo build --release -p vit-cli
    cargo build --release --manifest-path bench/rust-peers/Cargo.toml
    bench/peers.py --folder /tmp/peers --vit target/release/vit-cli \\
        --rust bench/rust-peers/target/release/rust-peers --threads 2 --readme docs/src/speed.md

In every round each contender makes a warm-up call and a few timed ones. Printed for each batch size: the median and the
fastest call, images a second, the median over rounds of the ratio to the reference within the round, and the largest
difference of logits from PyTorch's in f32. Then the cold start: process start to the first answer, files in the page cache,
and the peak of memory. The model's weights are random but seeded; inputs too, and they change from call to call. A runtime
that is not installed is left out, and said.

Another program joins with `--external NAME='COMMAND'` (`{model}`, `{onnx}`, `{batch}`, `{threads}` and `{iters}` are filled
in); its last line must be a JSON object with `times_ms`, as `vit-cli bench --json` prints it.
"""

import argparse
import importlib.metadata
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

INPUTS = 4  # take turns, so that no call finds its own in the cache


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="vit_base_patch16_224", help="a name of timm's")
    p.add_argument("--batch", type=int, action="append", help="more than once if wanted (default: 1 and 8)")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--iters", type=int, default=5, help="timed calls of a contender in a round")
    p.add_argument("--seconds", type=float, default=300, help="of each batch size: no round begins after this many")
    p.add_argument("--vit", help="the vit-cli program")
    p.add_argument("--vit-run", action="append", metavar="KERNEL:PRECISION",
                   help="what vit-cli is to run, more than once if wanted (default: auto:auto, auto:bf16, auto:int8, avx512:f32, avx2:f32)")
    p.add_argument("--rust", help="the rust-peers program: rten, tract, candle-transformers")
    p.add_argument("--only", help="these contenders alone: beginnings of names, separated by commas")
    p.add_argument("--external", action="append", default=[], metavar="NAME=COMMAND")
    p.add_argument("--reference", default="onnxruntime f32")
    p.add_argument("--no-speed", action="store_true", help="the cold start alone")
    p.add_argument("--no-cold", action="store_true", help="leave the cold start out")
    p.add_argument("--folder", help="keep the model's files here, and use them again")
    p.add_argument("--markdown", action="store_true", help="print the guide's tables")
    p.add_argument("--readme", help="write them into this file, between `<!-- BLOCK: written by bench/peers.py -->` and `<!-- /BLOCK -->`")
    p.add_argument("--block", default="speed", help="the name of that block (default: speed)")
    p.add_argument("--json", help="write every time here")
    return p.parse_args()


A = arguments()
A.batch = A.batch or [1, 8]
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = str(A.threads)

import numpy as np  # noqa: E402  (after the number of threads is set)

VIT_RUNS = A.vit_run or ["auto:auto", "auto:bf16", "auto:int8", "avx512:f32", "avx2:f32"]
RUST_PEERS = ("rten", "tract", "candle-transformers")


def wanted(name):
    return not A.only or any(name.startswith(only) for only in A.only.split(","))


def files(folder):
    """The model as a timm folder (model.safetensors, config.json) and as ONNX, inputs, and a picture."""
    import timm
    import torch
    from safetensors.numpy import save_file as save_arrays
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
    for batch in {1, *A.batch}:
        x = np.random.default_rng(batch).standard_normal((batch, *size), dtype=np.float32)
        x.tofile(folder / f"x{batch}.bin")
        save_arrays({"x": x}, folder / f"x{batch}.safetensors")
    picture(folder / "picture.jpg")
    return model, size


def picture(path):
    """A smooth random picture of 640 × 480."""
    from PIL import Image
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=90)


def contenders(model, x, folder):
    """Name → a function that makes a function from pixels to logits."""

    def in_torch(dtype, compiled):
        def make():
            import copy
            import torch
            m = copy.deepcopy(model).to(dtype)
            if compiled:
                from torch._inductor import config
                config.freezing = True
                m = torch.compile(m)

            def run(x):
                with torch.no_grad():
                    return m(torch.from_numpy(x).to(dtype)).float().numpy()
            return run
        return make

    def in_onnxruntime():
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = A.threads
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        return lambda x: session.run(None, {"x": x})[0]

    def in_openvino(precision):
        def make():
            import openvino
            core = openvino.Core()
            m = core.read_model(str(folder / "model.onnx"))
            m.reshape(list(x.shape))
            options = {"INFERENCE_NUM_THREADS": A.threads, "PERFORMANCE_HINT": "LATENCY",
                       "INFERENCE_PRECISION_HINT": precision}
            request = core.compile_model(m, "CPU", options).create_infer_request()

            def run(x):
                request.infer([x])
                return np.array(request.get_output_tensor(0).data, dtype=np.float32)
            return run
        return make

    import torch
    return {
        "torch f32": in_torch(torch.float32, False),
        "torch bf16": in_torch(torch.bfloat16, False),
        "torch.compile f32": in_torch(torch.float32, True),
        "torch.compile bf16": in_torch(torch.bfloat16, True),
        "onnxruntime f32": in_onnxruntime,
        "openvino f32": in_openvino("f32"),
        "openvino bf16": in_openvino("bf16"),
    }


class Here:
    """A contender in this process."""

    def __init__(self, make, x):
        self.run = make()
        self.logits = self.run(x)
        random = np.random.default_rng(0)
        self.inputs = [random.standard_normal(x.shape, dtype=np.float32) for _ in range(INPUTS)]

    def round(self):
        self.run(self.inputs[-1])
        times = []
        for i in range(A.iters):
            start = time.perf_counter()
            self.run(self.inputs[i % INPUTS])
            times.append((time.perf_counter() - start) * 1e3)
        return times


class Program:
    """A contender in a process of its own."""

    def __init__(self, command, environment=None, logits=None):
        self.command, self.environment, self.logits = command, {**os.environ, **(environment or {})}, logits

    def record(self, *more):
        done = subprocess.run([*self.command, *more], env=self.environment, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.strip().splitlines()[-1])

    def round(self):
        return self.record()["times_ms"]


def vit(run):
    """The options and the environment of `KERNEL:PRECISION`."""
    kernel, precision = run.split(":")
    return ["--precision", precision, "--threads", str(A.threads)], {} if kernel == "auto" else {"VIT_CPU": kernel}


def vit_contender(run, batch, folder):
    """Named after what it came to; its logits are those of `vit-cli forward`."""
    from safetensors.numpy import load_file
    options, environment = vit(run)
    command = [A.vit, "bench", str(folder), *options, "--batch", str(batch), "--warmup", "1", "--json", "--iters"]
    what = Program([*command, "1"], environment).record()
    program = Program([*command, str(A.iters)], environment)
    output = folder / "logits.safetensors"
    subprocess.run([A.vit, "forward", str(folder), *options, "--input", str(folder / f"x{batch}.safetensors"), "--output",
                    str(output)], env=program.environment, check=True)
    program.logits = load_file(output)["logits"]
    return f"vit-cli {what['precision']}, {what['kernel']}" + (" (auto)" if run == "auto:auto" else ""), program


def rust_contender(name, batch, folder):
    command = [A.rust, name, str(folder), "--batch", str(batch), "--threads", str(A.threads), "--iters", str(A.iters)]
    program = Program(command)
    x = folder / f"x{batch}.bin"
    program.logits = np.array(program.record("--iters", "1", "--input", str(x))["logits"], dtype=np.float32).reshape(batch, -1)
    return program


def compare(batch, model, size, folder):
    """Times all at one batch size → rows of name, median, fastest, ratio, error; the rounds."""
    import torch
    x = np.fromfile(folder / f"x{batch}.bin", dtype=np.float32).reshape(batch, *size)
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()
    runs = {}

    def join(name, make):
        try:
            made = make()
            runs.update(dict([made]) if isinstance(made, tuple) else {name: made})
        except Exception as error:  # what is absent, or cannot run the model, is left out and said
            print(f"{name} is left out: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)

    for name, make in contenders(model, x, folder).items():
        if wanted(name):
            join(name, lambda make=make: Here(make, x))
    for run in VIT_RUNS if A.vit and wanted("vit-cli") else []:
        join(f"vit-cli {run}", lambda run=run: vit_contender(run, batch, folder))
    for name in RUST_PEERS if A.rust else []:
        if wanted(name):
            join(f"{name} f32", lambda name=name: rust_contender(name, batch, folder))
    for external in A.external:
        name, command = external.split("=", 1)
        filled = command.format(model=folder, onnx=folder / "model.onnx", batch=batch, threads=A.threads, iters=A.iters)
        runs[name] = Program(shlex.split(filled))

    times, start, done = {name: [] for name in runs}, time.perf_counter(), 0
    while done < A.rounds and (done == 0 or time.perf_counter() - start < A.seconds):
        for name, run in runs.items():
            time.sleep(0.05)  # threads that still spin come to rest
            times[name].append(run.round())
        done += 1
    reference = times[A.reference if A.reference in runs else next(iter(runs))]
    rows = {}
    for name, run in runs.items():
        error = None if run.logits is None else float(np.abs(run.logits - expected).max())
        rows[name] = {"median": statistics.median(t for r in times[name] for t in r),
                      "fastest": min(t for r in times[name] for t in r),
                      "ratio": statistics.median(statistics.median(a) / statistics.median(b)
                                                 for a, b in zip(times[name], reference)),
                      "error": error, "rounds": times[name]}
    return rows


# starts a program and says how long it took and the peak of its memory; in a small process, as a child's peak begins with
# the size of its parent
LAUNCH = """
import os, sys, time
start = time.perf_counter()
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ,
                        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)])
_, status, used = os.wait4(child, 0)
print(time.perf_counter() - start, used.ru_maxrss / 1000)
sys.exit(os.waitstatus_to_exitcode(status))
"""
PYTHON_COLD = {
    "onnxruntime f32": """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = {threads}
session = onnxruntime.InferenceSession("{folder}/model.onnx", options, providers=["CPUExecutionProvider"])
print(session.run(None, {{"x": numpy.fromfile("{folder}/x1.bin", numpy.float32).reshape(1, *{size})}})[0].argmax())
""",
    "openvino bf16": """
import numpy, openvino
core = openvino.Core()
model = core.read_model("{folder}/model.onnx")
model.reshape([1, *{size}])
options = {{"INFERENCE_NUM_THREADS": {threads}, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16"}}
compiled = core.compile_model(model, "CPU", options)
print(compiled([numpy.fromfile("{folder}/x1.bin", numpy.float32).reshape(1, *{size})])[0].argmax())
""",
    "torch f32": """
import numpy, timm, torch
from safetensors.torch import load_file
torch.set_num_threads({threads})
model = timm.create_model("{model}").eval()
model.load_state_dict(load_file("{folder}/model.safetensors"))
with torch.no_grad():
    print(model(torch.from_numpy(numpy.fromfile("{folder}/x1.bin", numpy.float32).reshape(1, *{size}))).argmax())
""",
}


def cold(folder, size):
    """Seconds from process start to the first answer, and the peak of memory in MB, in rounds → name → both."""
    commands = {}
    if A.vit and wanted("vit-cli"):
        for run in dict.fromkeys([*VIT_RUNS, "auto:f32"]):
            options, environment = vit(run)
            command = [A.vit, "predict", "--model", str(folder), *options, str(folder / "picture.jpg")]
            commands[f"vit-cli {run}"] = (command, environment)
    for name in RUST_PEERS if A.rust else []:
        command = [A.rust, name, str(folder), "--threads", str(A.threads), "--iters", "1", "--warmup", "0", "--input",
                   str(folder / "x1.bin")]
        commands[f"{name} f32"] = (command, {})
    for name, program in PYTHON_COLD.items():
        program = program.format(threads=A.threads, folder=folder, size=tuple(size), model=A.model)
        commands[name] = ([sys.executable, "-c", program], {})
    commands = {name: command for name, command in commands.items() if wanted(name)}

    found = {name: [] for name in commands}
    for round_ in range(A.rounds + 1):  # the first brings the files into the page cache
        for name, (command, environment) in commands.items():
            if name not in found:
                continue
            time.sleep(0.05)
            done = subprocess.run([sys.executable, "-S", "-c", LAUNCH, *command], env={**os.environ, **environment},
                                  capture_output=True, text=True)
            if done.returncode != 0:
                print(f"{name} is left out of the cold start: {done.stderr.strip()[-300:]}", file=sys.stderr)
                del found[name]
            elif round_ > 0:
                found[name].append([float(word) for word in done.stdout.split()])
    reference = "rten f32" if found.get("rten f32") else next(iter(found), None)
    rows = {}
    for name, pairs in found.items():
        seconds, memory = zip(*pairs)
        rows[name] = {"seconds": statistics.median(seconds), "memory": max(memory), "rounds": seconds,
                      "ratio": statistics.median(a / b for a, (b, _) in zip(seconds, found[reference]))}
    return reference, rows


def speed_table(speeds, markdown):
    """Names → figures at every batch size, the fastest at the first of them first; the guide's has the medians alone."""
    reference = next((name for name in next(iter(speeds.values())) if name == A.reference), next(iter(next(iter(speeds.values())))))
    head = [""]
    for batch in speeds:
        head += [f"batch {batch}: ms", *([] if markdown else ["fastest"]), "images/s", f"÷ {reference}"]
    head.append("logit error")
    first = next(iter(speeds.values()))
    rows = []
    for name in sorted(first, key=lambda name: first[name]["median"]):
        row, errors = [name], []
        for batch, figures in speeds.items():
            f = figures.get(name)
            cells = [""] * 4 if f is None else [f"{f['median']:.1f}", f"{f['fastest']:.1f}",
                                                f"{batch * 1e3 / f['median']:.1f}", f"{f['ratio']:.2f}"]
            row += cells[:1] + cells[2:] if markdown else cells
            errors += [f["error"]] if f and f["error"] is not None else []
        rows.append([*row, f"{max(errors):.1e}" if errors else ""])
    return head, rows


def cold_table(reference, colds):
    head = ["", "start to answer, s", f"÷ {reference}", "peak memory, MB"]
    rows = [[name, f"{c['seconds']:.2f}", f"{c['ratio']:.2f}", f"{c['memory']:.0f}"]
            for name, c in sorted(colds.items(), key=lambda item: item[1]["seconds"])]
    return head, rows


def lines(head, rows, markdown):
    if markdown:
        yield "| " + " | ".join(head) + " |"
        yield "|---" + "|---:" * (len(head) - 1) + "|"
        for row in rows:
            cells = [f"**{row[0]}**" if row[0].startswith("vit-cli") else row[0], *row[1:]]
            yield "| " + " | ".join(cells) + " |"
    else:
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        for row in [head, *rows]:
            yield "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))


def cpu():
    """The processor, with the instructions that decide here."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
        name = next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name"))
        flags = {"amx_bf16": "AMX", "avx512f": "AVX-512", "avx2": "AVX2"}
        return f"{name} with " + ", ".join(there for flag, there in flags.items() if f" {flag}" in text)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions():
    found = []
    for name in ("torch", "timm", "onnxruntime", "openvino"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            pass
    if A.vit:
        found.insert(0, subprocess.run([A.vit, "--version"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip())
    if A.rust:
        found += subprocess.run([A.rust, "--versions"], stdout=subprocess.PIPE, text=True, check=True).stdout.split("\n")
    return ", ".join(filter(None, found))


def main():
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(A.folder or scratch).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        import torch
        torch.set_num_threads(A.threads)
        model, size = files(folder)
        megabytes = (folder / "model.safetensors").stat().st_size / 1e6
        # first, while this process has no threads that may spin
        reference, colds = (None, {}) if A.no_cold else cold(folder, size)
        speeds = {} if A.no_speed else {batch: compare(batch, model, size, folder) for batch in A.batch}

    markdown, text = A.markdown or A.readme, []
    if speeds:
        rounds = min(len(figures["rounds"]) for batch in speeds.values() for figures in batch.values())
        text += [f"{A.model}, {A.threads} threads, {cpu()}; {rounds} rounds of {A.iters} calls, interleaved; medians.", "",
                 *lines(*speed_table(speeds, markdown), markdown), ""]
    if colds:
        where = "" if speeds else f", {A.threads} threads, {cpu()}"
        text += [f"Process start to the printed answer for one image, weights of {megabytes:.0f} MB in the page cache{where} (vit-cli's "
                 "time includes decoding a JPEG; the others read the tensor):", "",
                 *lines(*cold_table(reference, colds), markdown), ""]
    text += [f"Versions: {versions()}."]
    print("\n".join(text))
    if A.readme:
        readme, first, last = pathlib.Path(A.readme), f"<!-- {A.block}: written by bench/peers.py -->", f"<!-- /{A.block} -->"
        before, rest = readme.read_text().split(first)
        readme.write_text("\n".join([before + first, *text, last + rest.split(last)[1]]))
    if A.json:
        record = {"model": A.model, "threads": A.threads, "cpu": cpu(), "versions": versions(), "speed": speeds, "cold": colds}
        pathlib.Path(A.json).write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
