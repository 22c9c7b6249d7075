"""embed_arrow: columns in, columns out."""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest


def vectors(batch):
    return [None if row is None else np.array(row, np.float32) for row in batch.column("embedding").to_pylist()]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()])
def test_every_column_of_images(model, samples, kind, tmp_path):
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()
    images = [str(p) if text else p.read_bytes() for p in samples] + [None, "missing.png" if text else b"no image"]
    batch = pa.record_batch({"n": list(range(len(images))), "image": pa.array(images, kind)})
    out = model.embed_arrow(batch)
    assert isinstance(out, pa.RecordBatch) and out.schema.names == ["n", "image", "embedding", "error"]
    assert out.schema.field("embedding").type == pa.list_(pa.field("item", pa.float32(), nullable=False), model.dim)
    for found, expected in zip(vectors(out), model.embed(samples), strict=False):
        assert (found == expected).all()
    assert all(np.isnan(row).all() for row in vectors(out)[-2:])
    errors = out.column("error").to_pylist()
    assert errors[:-2] == [None] * len(samples) and "null" in errors[-2] and errors[-1]
    assert out.column("embedding").null_count == 0
    # pyarrow cannot read null lists of a fixed size from Parquet
    pq.write_table(pa.table(out), tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").column("error").to_pylist() == errors


def test_structs_of_hugging_face_datasets(model, samples):
    rows = [{"bytes": samples[0].read_bytes(), "path": "nowhere"}, {"bytes": None, "path": str(samples[1])}, None]
    out = model.embed_arrow(pa.table({"image": rows}))
    assert isinstance(out, pa.Table)
    assert all((a == b).all() for a, b in zip(vectors(out)[:2], model.embed(samples[:2]), strict=True))
    assert out.column("error").to_pylist()[2] is not None


def test_slices_chunks_and_no_rows(model, samples):
    table = pa.table({"image": pa.chunked_array([[str(p)] for p in samples])})
    expected = model.embed(samples)
    assert (np.array(vectors(model.embed_arrow(table))) == expected).all()
    assert (np.array(vectors(model.embed_arrow(table.combine_chunks().slice(3, 2)))) == expected[3:5]).all()
    assert model.embed_arrow(table.slice(0, 0)).num_rows == 0
    assert table.schema.metadata is None and model.embed_arrow(table.replace_schema_metadata({"a": "b"})).schema.metadata == {b"a": b"b"}


def test_what_does_not_fit_is_named(model):
    batch = pa.record_batch({"image": pa.array([1, 2])})
    with pytest.raises(TypeError, match="Int64"):
        model.embed_arrow(batch)
    with pytest.raises(ValueError, match='"image"'):
        model.embed_arrow(batch, column="picture")
    with pytest.raises(ValueError, match="embedding"):
        model.embed_arrow(pa.record_batch({"image": ["x"], "embedding": [1]}))
    with pytest.raises(TypeError, match="Arrow C data interface"):
        model.embed_arrow([1])


def test_others_get_an_object_with_the_same_interface(model, samples):
    class Foreign:
        def __init__(self, batch):
            self.batch = batch

        def __arrow_c_array__(self, requested_schema=None):
            return self.batch.__arrow_c_array__(requested_schema)

    out = model.embed_arrow(Foreign(pa.record_batch({"image": [str(samples[0])]})))
    assert pa.record_batch(out).num_columns == 3
    assert pickle.loads(pickle.dumps(model)).dim == model.dim
