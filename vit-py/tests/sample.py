"""A program that mypy and pyright check; it also runs."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from vit_rs import ImageError, Model, Prediction

SAMPLES = Path(__file__).parents[2] / "weights/digits/samples"


def main() -> None:
    model = Model("digits", precision="f32", threads=1)
    vectors = model.embed([SAMPLES / "3.png", (SAMPLES / "8.png").read_bytes()])
    print((vectors @ vectors.T).shape, model.dim)
    rows, errors = model.embed(["no such file"], errors="return")
    print(rows.shape, [text.upper() for text in errors if text is not None])
    best: Prediction = model.classify([np.zeros((8, 8, 3), dtype=np.uint8)], k=1)[0][0]
    print(best.label.upper(), best.index + 1, best.probability * 100)
    table = pa.table({"image": [str(SAMPLES / "3.png")]})
    print(model.embed_arrow(table).column("embedding"))
    try:
        model.embed(["no such file"])
    except ImageError as error:
        print(error)


if __name__ == "__main__":
    main()
