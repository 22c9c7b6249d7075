#!/usr/bin/env python3
"""Converts ONNX files to folders and opens them in timm (strictly) and, where its classes fit, in transformers: equal logits.

  timm_opens.py CASES [--bin target/debug] [--only GLOB ...]

CASES holds `<name>/model.onnx` and `<name>/io.safetensors` (`x`, `logits`), as tests/fixtures/zoo does. Needs torch, timm,
transformers and safetensors. A folder that a library has no arguments for is refused by vit-convert, and listed as such.
Exit status 1 where an answer differs.
"""
import argparse, fnmatch, json, os, subprocess, sys, tempfile
import timm, torch, transformers
from safetensors.torch import load_file

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def by_timm(folder, x):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    stored = load_file(f"{folder}/model.safetensors")
    own = model.state_dict()
    assert sorted(stored) == sorted(own), f"names differ: {set(stored) ^ set(own)}"
    for name, tensor in stored.items():
        assert torch.equal(tensor.float(), own[name].float()), f"{name} was changed on loading"
    return model(x)


def by_transformers(folder, x):
    config = json.load(open(f"{folder}/config.json"))
    model, info = getattr(transformers, config["architectures"][0]).from_pretrained(folder, output_loading_info=True)
    left = {k: v for k, v in info.items() if v}
    # transformers makes up what a model without pooling does not hold
    left["missing_keys"] = [k for k in left.get("missing_keys", []) if "pooler" not in k and "head." not in k]
    assert not any(left.values()), left
    y = model.eval()(x)
    for name in ("logits", "image_embeds"):
        if getattr(y, name, None) is not None: return getattr(y, name)
    pooled = getattr(y, "pooler_output", None)
    return y.last_hidden_state[:, 0] if pooled is None or any("pooler" in k for k in info["missing_keys"]) else pooled


def main():
    ap = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    ap.add_argument("cases")
    ap.add_argument("--bin", default="target/debug")
    ap.add_argument("--only", nargs="*", default=["*"])
    args = ap.parse_args()
    tally = {}
    for name in sorted(os.listdir(args.cases)):
        case = f"{args.cases}/{name}"
        if not any(fnmatch.fnmatch(name, g) for g in args.only) or not os.path.exists(f"{case}/io.safetensors"): continue
        if json.load(open(f"{case}/config.json"))["expect"] != "ok": continue
        io = load_file(f"{case}/io.safetensors")
        x, want = io["x"].float(), io.get("logits")
        if want is None: continue
        if x.shape[1] > x.shape[3]: x = x.permute(0, 3, 1, 2)
        size = f"{x.shape[2]}x{x.shape[3]}"
        for library, answer in (("timm", by_timm), ("hf", by_transformers)):
            with tempfile.TemporaryDirectory() as tmp:
                p = subprocess.run([f"{args.bin}/vit-convert", f"{case}/model.onnx", f"{tmp}/out/", "--to", library, "--img-size", size], capture_output=True, text=True)
                said, what = p.stderr.strip().splitlines()[-1:] or [""], "refused"
                if p.returncode == 0:
                    try:
                        with torch.no_grad(): have = answer(f"{tmp}/out", x)
                        far = (have.reshape(want.shape) - want.float()).abs().max().item() / max(1.0, want.abs().max().item())
                        low = any(t.dtype != torch.float32 for t in load_file(f"{tmp}/out/model.safetensors").values())
                        what, said = ("equal" if far <= (2e-2 if low else 2e-5) else "DIFFERS"), [f"by {far:.1e}"]
                    except Exception as error:
                        what, said = "FAILED", [f"{type(error).__name__}: {error}"]
                elif p.returncode != 2 or "panicked" in p.stderr:
                    what = "CRASHED"
            tally[library, what] = tally.get((library, what), 0) + 1
            print(f"{name:40} {library:5} {what:8} {said[0][:200]}", flush=True)
    print(", ".join(f"{library} {what}: {n}" for (library, what), n in sorted(tally.items())))
    sys.exit(1 if not tally or any(what.isupper() for _, what in tally) else 0)


main()
