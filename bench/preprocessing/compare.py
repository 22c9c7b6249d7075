#!/usr/bin/env python3
"""How far each Rust library's input of a model is from the one that Python's processor makes, on the photos of scikit-image.

    pip install transformers==5.24.0 torch==2.15.0 torchvision==0.29.2 scikit-image==0.26.0 pillow==13.0.0 safetensors
    cargo build --manifest-path bench/preprocessing/Cargo.toml
    bench/preprocessing/compare.py --vit target/release/vit-cli --peers bench/preprocessing/target/debug/preprocessing-peers

Differences are in levels of 8 bits (1/255 of the range of a pixel). A library without a switch for the processor's kind of
resizing is measured with what it does.
"""

import argparse
import json
import pathlib
import subprocess
import tempfile

import numpy as np
import skimage
from PIL import Image
from safetensors.numpy import load_file
from transformers import BitImageProcessor as Bit
from transformers import CLIPImageProcessor as Clip

PHOTOS = ["astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "hubble_deep_field.jpg"]
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
COMMON = {"do_resize": True, "do_center_crop": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
          "do_convert_rgb": True, "resample": 3, "crop_size": {"height": 224, "width": 224}}
SMALL = {"image_size": 224, "patch_size": 14, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
CASES = {
    "DINOv2": (Bit, "BitImageProcessor", IMAGENET | COMMON | {"size": {"shortest_edge": 256}},
               {"model_type": "dinov2", "architectures": ["Dinov2Model"], **SMALL}, "candle"),
    "CLIP": (Clip, "CLIPImageProcessor", CLIP | COMMON | {"size": {"shortest_edge": 224}},
             {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"], "intermediate_size": 64, **SMALL}, "fastembed"),
}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--vit", required=True)
    p.add_argument("--peers", required=True)
    a = p.parse_args()
    folder = pathlib.Path(skimage.data_dir)
    print("| model | library | mean difference | largest difference |\n|---|---|---:|---:|")
    for name, (processor, kind, preprocess, config, peer) in CASES.items():
        ours, theirs = [], []
        with tempfile.TemporaryDirectory() as work:
            work = pathlib.Path(work)
            (work / "config.json").write_text(json.dumps(config))
            (work / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": kind, **preprocess}))
            mean, std = (np.array(preprocess[k])[:, None, None] for k in ("image_mean", "image_std"))
            for photo in PHOTOS:
                # every library reads the same PNG, because JPEG decoders differ by a level or two
                Image.open(folder / photo).convert("RGB").save(work / "photo.png")
                expected = processor(**preprocess)(Image.open(work / "photo.png"), return_tensors="pt")["pixel_values"][0].numpy()
                levels = (expected * std + mean) * 255
                subprocess.run([a.vit, "preprocess", work, work / "photo.png", "--output", work / "o.safetensors"], check=True)
                ours.append(np.abs((load_file(work / "o.safetensors")["pixel_values"][0] * std + mean) * 255 - levels))
                subprocess.run([a.peers, peer, work / "photo.png", work / "o.raw"], check=True)
                raw = np.fromfile(work / "o.raw", np.uint8).reshape(224, 224, 3).transpose(2, 0, 1)
                theirs.append(np.abs(raw - levels))
        for library, differences in (("vit-rs", ours), (peer, theirs)):
            print(f"| {name} | {library} | {np.mean(differences):.3f} | {np.max(differences):.1f} |")


if __name__ == "__main__":
    main()
