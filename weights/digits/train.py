#!/usr/bin/env python3
"""Trains the `digits` model and writes what stands beside this file.

    pip install torch==2.15.0 timm==1.0.31 scikit-learn==1.9.1 pillow==13.0.0 onnx==1.23.2 safetensors==0.8.0 numpy==2.4.6
    python train.py                 # under five minutes on one core
    vit-convert model.onnx ../../vit-model/digits/model.safetensors --force --labels labels.txt --preprocess crop_pct=1,interpolation=bilinear

A Vision Transformer (64 wide, 4 deep, 4 heads, patches of 4 x 4 on 3 x 32 x 32) learns the UCI handwritten digits as
scikit-learn carries them: 1797 images of 8 x 8 with 17 levels of ink. They are enlarged to 32 x 32 by bilinear
interpolation. 360 of them, 36 of each class, are held out: no training step sees them. Half of what is trained on is
shown dark on light instead of light on dark, so that ink on paper is read too.

Files: model.onnx (TorchScript exporter, opset 11), heldout.safetensors (`images` u8 [360, 32, 32], `labels` u8 [360]),
train.safetensors (the same for the other 1437, as 8 x 8 with values 0..16), labels.txt, samples/*.png (held-out images,
one of each class, named by what they show), and ../../tests/fixtures/digits/pytorch.safetensors (PyTorch's `logits` and
`probabilities` on the 360). Seeds and the thread count are fixed; another processor or version may still round
differently, so that another run gives an equally good model, not the same bytes.
"""
import math
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.numpy import save_file
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer

HERE = Path(__file__).parent
FIXTURES = HERE / "../../tests/fixtures/digits"
EPOCHS, BATCH, LR = 100, 64, 2e-3


def enlarge(image):
    """8 x 8 with values 0..16 -> 32 x 32 with values 0..255"""
    return np.asarray(Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)).resize((32, 32), Image.Resampling.BILINEAR))


def to_input(images):
    """u8 [N, 32, 32] -> f32 [N, 3, 32, 32], mean 0.5 and standard deviation 0.5"""
    x = (torch.from_numpy(images).float() / 255 - 0.5) / 0.5
    return x[:, None].expand(-1, 3, -1, -1).contiguous()


def augment(x, rng):
    """small rotations, scalings, shears and shifts; half of the batch inverted"""
    n = len(x)
    angle = (torch.rand(n, generator=rng) - 0.5) * 0.5
    shear = (torch.rand(n, generator=rng) - 0.5) * 0.4
    scale = 1 + (torch.rand(n, 2, generator=rng) - 0.5) * 0.35
    shift = (torch.rand(n, 2, generator=rng) - 0.5) * 0.3
    cos, sin = angle.cos(), angle.sin()
    row0 = torch.stack([cos * scale[:, 0], (shear - sin) * scale[:, 0], shift[:, 0]], 1)
    row1 = torch.stack([sin * scale[:, 1], cos * scale[:, 1], shift[:, 1]], 1)
    grid = F.affine_grid(torch.stack([row0, row1], 1), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    sign = torch.where(torch.rand(n, generator=rng) < 0.5, -1.0, 1.0)
    return x * sign[:, None, None, None]


def main():
    torch.set_num_threads(1)
    torch.manual_seed(2)
    rng = torch.Generator().manual_seed(2)
    timm.layers.set_fused_attn(False)  # opset 11 has no operator for fused attention

    digits = load_digits()
    small, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
    order = np.random.default_rng(2).permutation(len(labels))
    held = np.sort(np.concatenate([order[labels[order] == c][:36] for c in range(10)]))
    kept = np.setdiff1d(np.arange(len(labels)), held)
    large = np.stack([enlarge(i) for i in small])
    x, y = to_input(large[kept]), torch.from_numpy(labels[kept]).long()

    model = VisionTransformer(img_size=32, patch_size=4, embed_dim=64, depth=4, num_heads=4, num_classes=10)
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW([{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}], lr=LR)
    steps, step = EPOCHS * math.ceil(len(y) / BATCH), 0
    for epoch in range(EPOCHS):
        total = 0.0
        for batch in torch.randperm(len(y), generator=rng).split(BATCH):
            for group in optimiser.param_groups:  # five epochs of warm-up, then a cosine
                group["lr"] = LR * min(1.0, step * EPOCHS / (5 * steps)) * (1 + math.cos(math.pi * step / steps)) / 2
            loss = F.cross_entropy(model(augment(x[batch], rng)), y[batch], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            step, total = step + 1, total + loss.item() * len(batch)
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1}: loss {total / len(y):.4f}", flush=True)

    model.eval()
    with torch.no_grad():
        logits = model(to_input(large[held]))
        inverted = model(-to_input(large[held]))
    truth = torch.from_numpy(labels[held]).long()
    right = logits.argmax(1) == truth
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
    print(f"held out: {right.sum()}/{len(truth)} right, inverted: {(inverted.argmax(1) == truth).sum()}/{len(truth)}")
    assert right.float().mean() >= 0.97

    torch.onnx.export(model, to_input(large[held[:2]]), HERE / "model.onnx", opset_version=11, dynamo=False, input_names=["x"],
                      output_names=["logits"], dynamic_axes={"x": {0: "batch"}, "logits": {0: "batch"}})
    save_file({"images": large[held], "labels": labels[held]}, HERE / "heldout.safetensors")
    save_file({"images": small[kept], "labels": labels[kept]}, HERE / "train.safetensors")
    FIXTURES.mkdir(parents=True, exist_ok=True)
    save_file({"logits": logits.numpy(), "probabilities": logits.softmax(1).numpy()}, FIXTURES / "pytorch.safetensors")
    (HERE / "labels.txt").write_text("".join(f"{name}\n" for name in range(10)))
    (HERE / "samples").mkdir(exist_ok=True)
    for c in range(10):  # the first of its class in the held-out images, whatever the model says of it
        Image.fromarray(large[held[labels[held] == c][0]]).save(HERE / "samples" / f"{c}.png", optimize=True)
    assert all(right[labels[held] == c][0] for c in range(10)), "a sample is not recognised"


if __name__ == "__main__":
    main()
