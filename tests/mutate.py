#!/usr/bin/env python3
"""Breaks graphs in one place and lets ONNX Runtime judge: what still converts must answer as the broken graph does.

  mutate.py --cases DIR [--bin target/debug] [--count 20000] [--seed 0] [--only GLOB]

DIR holds `<name>/model.onnx` and `<name>/io.safetensors` with the input `x`, as tests/fixtures/zoo does. Conversions run
with --no-verify, so that the importer stands alone; a wrong one is tried again with the proof, and both are counted. The
converted model answers in f32: it is the conversion that is judged, not a faster kernel's rounding.
Needs numpy, onnx, onnxruntime and safetensors. Exit status 1 where one conversion is wrong.
"""
import argparse, collections, fnmatch, math, os, random, subprocess, sys, tempfile, time
import numpy as np, onnx, onnxruntime as ort
from onnx import numpy_helper as nh
from safetensors.numpy import load_file

SWAP = {"Erf": "Tanh", "Tanh": "Sigmoid", "Sigmoid": "Tanh", "Add": "Sub", "Sub": "Add", "Mul": "Add", "Div": "Mul", "Sqrt": "Neg",
        "ReduceMean": "ReduceMax", "Softmax": "LogSoftmax", "Relu": "Sigmoid", "Gelu": "Relu", "Pow": "Mul", "Transpose": "Identity",
        "LayerNormalization": "Identity", "MatMul": "Add", "Max": "Min", "Reciprocal": "Sqrt", "Where": "Where"}
KINDS = "perm axis attr const const swap rewire rewire op drop init init2 init2 concat residual text".split()


def perturbed(tensor, r):
    a = nh.to_array(tensor).copy()
    if a.size == 0 or (a.size > 64 and a.dtype.kind == "f") or a.dtype.kind not in "iufb":
        return None
    flat, i = a.reshape(-1), r.randrange(a.size)
    if a.dtype.kind in "iu":
        flat[i] += r.choice([-1, 1, 1, 2, -2]) if a.dtype.kind == "i" else 1
    elif a.dtype.kind == "f":
        flat[i] = flat[i] * r.choice([.5, 1.3, -1, 2, 1.01]) + (0.1 if flat[i] == 0 else 0)
    else:
        flat[i] = not flat[i]
    tensor.CopyFrom(nh.from_array(a, tensor.name))
    return f"{tensor.name}[{i}] of {a.shape} -> {flat[i]}"


def mutate(model, r):
    """Changes one place; says which, or None where there was nothing to change."""
    g, kind = model.graph, r.choice(KINDS)
    nodes = list(g.node)
    if kind == "perm":
        found = [(n, a) for n in nodes if n.op_type == "Transpose" for a in n.attribute if a.name == "perm"]
        if not found: return None
        n, a = r.choice(found)
        was, now = list(a.ints), list(a.ints)
        r.shuffle(now)
        if was == now: return None
        del a.ints[:]
        a.ints.extend(now)
        return f"perm {n.name} {was}->{now}"
    if kind in ("axis", "attr"):
        found = [(n, a) for n in nodes for a in n.attribute if a.type in (1, 2, 7)]
        if not found: return None
        n, a = r.choice(found)
        if a.type == 1: a.f = a.f * r.choice([.5, 1.5, 3]) if a.f else .3
        elif a.type == 2: a.i += r.choice([-1, 1])
        elif not a.ints: return None
        else: a.ints[r.randrange(len(a.ints))] += r.choice([-1, 1])
        return f"attr {n.op_type} {n.name} {a.name}={onnx.helper.get_attribute_value(a)}"
    if kind == "text":
        found = [(n, a) for n in nodes for a in n.attribute if a.type == 3]
        if not found: return None
        n, a = r.choice(found)
        now = {b"none": b"tanh", b"tanh": b"none"}.get(a.s)
        if now is None and n.op_type == "Einsum":
            left, right = a.s.split(b"->")
            right = bytearray(right)
            i, j = r.randrange(len(right)), r.randrange(len(right))
            right[i], right[j] = right[j], right[i]
            now = left + b"->" + bytes(right)
        if now is None or now == a.s: return None
        a.s = now
        return f"text {n.op_type} {n.name} {a.name}={now}"
    if kind == "const":
        found = [n.attribute[0].t for n in nodes if n.op_type == "Constant" and n.attribute[0].name == "value"]
        if not found: return None
        said = perturbed(r.choice(found), r)
        return said and "const " + said
    if kind == "init":
        found = [t for t in g.initializer if t.data_type in (6, 7, 9) or math.prod(t.dims) <= 64]
        if not found: return None
        said = perturbed(r.choice(found), r)
        return said and "init " + said
    if kind == "init2":
        found = [t for t in g.initializer if len(t.dims)]
        if len(found) < 2: return None
        a, b = r.sample(found, 2)
        if list(a.dims) != list(b.dims) or a.data_type != b.data_type or nh.to_array(a).tobytes() == nh.to_array(b).tobytes(): return None
        a.name, b.name = b.name, a.name
        return f"exchange {a.name} {b.name}"
    if kind in ("swap", "concat"):
        ops = ("MatMul", "Sub", "Div", "Concat", "Where", "Gemm", "Add", "Mul", "Pow", "Einsum", "LayerNormalization", "Attention", "MultiHeadAttention", "SkipLayerNormalization")
        found = [n for n in nodes if len(n.input) >= 2 and n.op_type in ops]
        if not found: return None
        n = r.choice(found)
        i, j = r.sample(range(len(n.input)), 2)
        names = list(n.input)
        names[i], names[j] = names[j], names[i]
        if names == list(n.input): return None
        del n.input[:]
        n.input.extend(names)
        return f"swap {n.op_type} {n.name} {i}{j}"
    if kind == "residual":
        made = {o for n in nodes for o in n.output}
        found = [n for n in nodes if n.op_type == "Add" and len(n.input) == 2 and all(i in made for i in n.input)]
        if not found: return None
        n = r.choice(found)
        keep = n.input[r.randrange(2)]
        del n.input[:]
        n.input.append(keep)
        n.op_type = "Identity"
        return f"residual {n.name} keeps {keep}"
    if kind == "rewire":
        k = r.randrange(len(nodes))
        n = nodes[k]
        pool = [o for x in nodes[:k] for o in x.output if x.op_type != "Constant"] + [t.name for t in g.initializer]
        if not pool or not n.input: return None
        i, o = r.randrange(len(n.input)), r.choice(pool)
        if n.input[i] == o: return None
        said = f"rewire {n.op_type} {n.name} in{i} {n.input[i]} -> {o}"
        n.input[i] = o
        return said
    if kind == "op":
        found = [n for n in nodes if n.op_type in SWAP]
        if not found: return None
        n = r.choice(found)
        said = f"{n.op_type}->{SWAP[n.op_type]} {n.name}"
        n.op_type = SWAP[n.op_type]
        if n.op_type == "Identity":
            del n.attribute[:]
            del n.input[1:]
        return said
    found = [n for n in nodes if len(n.output) == 1 and len(n.input) >= 1]
    if not found: return None
    n = r.choice(found)
    i = r.randrange(min(2, len(n.input)))
    keep, said = n.input[i], f"drop {n.op_type} {n.name} keep in{i}"
    if not keep: return None
    del n.input[:]
    n.input.append(keep)
    del n.attribute[:]
    n.op_type, n.domain = "Identity", ""
    return said


def answers(path, options, x):
    """The graph's outputs by ONNX Runtime, in a child: it aborts on some broken graphs."""
    out = path + ".npz"
    if os.path.exists(out): os.remove(out)
    child = os.fork()
    if not child:
        try:
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            np.savez(out, *session.run(None, {session.get_inputs()[0].name: x}))
            os._exit(0)
        except BaseException:
            os._exit(1)
    return list(np.load(out).values()) if os.waitpid(child, 0)[1] == 0 else None


def log_softmax(z):
    z = z.astype(np.float64) - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def far(ours, theirs):
    """How far the nearest of our answers is from the nearest of the graph's outputs, relative to its magnitude."""
    best = math.inf
    for o in theirs:
        if o.dtype.kind != "f": continue
        o = o.astype(np.float64)
        forms = [v for v in ours.values() if v.size == o.size]
        if "logits" in ours and ours["logits"].size == o.size:
            z = ours["logits"].astype(np.float64)
            forms += [np.exp(log_softmax(z)), log_softmax(z), 1 / (1 + np.exp(-z))]
        for v in forms:
            d = np.abs(v.reshape(o.shape).astype(np.float64) - o).max() / max(1e-3, np.abs(o).max())
            best = min(best, d if np.isfinite(d) else math.inf)
    return best


def main():
    ap = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    ap.add_argument("--cases", required=True)
    ap.add_argument("--bin", default="target/debug")
    ap.add_argument("--count", type=int, default=20000)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--only", default="*")
    args = ap.parse_args()
    ort.set_default_logger_severity(4)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    r, begun, tally = random.Random(args.seed), time.time(), collections.Counter()
    tmp = tempfile.mkdtemp()
    path, out, y = f"{tmp}/m.onnx", f"{tmp}/m.safetensors", f"{tmp}/y.safetensors"

    def converts(*more):
        if os.path.exists(out): os.remove(out)
        p = subprocess.run([f"{args.bin}/vit-convert", path, out, *more], capture_output=True)
        if p.returncode not in (0, 2) or b"panicked" in p.stderr: return "crash " + p.stderr.decode(errors="replace")[:200]
        return None if p.returncode else "yes"

    # whole models: those that convert unbroken, whose answers ONNX Runtime gives within f32's noise
    models = {}
    for name in sorted(os.listdir(args.cases)):
        folder = f"{args.cases}/{name}"
        if not fnmatch.fnmatch(name, args.only) or not os.path.exists(f"{folder}/io.safetensors"): continue
        try:
            model, x = onnx.load(f"{folder}/model.onnx"), load_file(f"{folder}/io.safetensors")["x"]
        except Exception:
            continue
        if any(t.data_type in (10, 16) for t in model.graph.initializer): continue
        onnx.save(model, path)
        if converts() != "yes": continue
        theirs = answers(path, options, x)
        if theirs is None: continue
        p = subprocess.run([f"{args.bin}/vit-cli", "forward", out, "--input", f"{folder}/io.safetensors", "--tensor", "x", "--output", y, "--precision", "f32"], capture_output=True)
        if p.returncode or far(load_file(y), theirs) > 2e-5: continue
        models[name] = (model.SerializeToString(), x, f"{folder}/io.safetensors")
    names = sorted(models)
    print(f"{len(names)} models", flush=True)
    while tally["mutations"] < args.count:
        name = r.choice(names)
        data, x, io = models[name]
        model = onnx.ModelProto.FromString(data)
        try:
            what = mutate(model, r)
        except (IndexError, ValueError, TypeError, OverflowError):
            continue
        if not what: continue
        tally["mutations"] += 1
        if tally["mutations"] % 1000 == 0: print(dict(tally), f"{time.time() - begun:.0f} s", flush=True)
        with open(path, "wb") as f: f.write(model.SerializeToString())
        said = converts("--no-verify")
        if said is None:
            tally["refused"] += 1
            continue
        if said != "yes":
            tally["CRASH"] += 1
            print("CRASH", name, what, said, flush=True)
            continue
        theirs = answers(path, options, x)
        if theirs is None:
            tally["converted; ONNX Runtime cannot run it"] += 1
            if converts() == "yes":
                tally["(the proof holds)"] += 1
            else:
                print("UNJUDGED", name, what, flush=True)
            continue
        p = subprocess.run([f"{args.bin}/vit-cli", "forward", out, "--input", io, "--tensor", "x", "--output", y, "--precision", "f32"], capture_output=True)
        d = math.inf if p.returncode else far(load_file(y), theirs)
        if d <= 2e-5:
            tally["converted, right"] += 1
            continue
        caught = converts() is None
        tally["wrong, refused by the proof" if caught else "WRONG"] += 1
        print("wrong, refused by the proof" if caught else "WRONG", f"{d:.2g}", name, what, p.stderr.decode(errors="replace")[:200], flush=True)
    print(dict(tally), f"{time.time() - begun:.0f} s")
    sys.exit(1 if tally["WRONG"] or tally["CRASH"] else 0)


main()
