"""The class Model: what goes in, what comes out, and what is refused."""

import io
import json
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

import vit_rs


def test_every_form_of_an_image_gives_the_same_bits(model, samples):
    path = samples[0]
    picture = Image.open(path)
    pixels = np.asarray(picture.convert("RGB"))
    forms = [path, str(path), path.read_bytes(), bytearray(path.read_bytes()), memoryview(path.read_bytes()), picture, pixels]
    vectors = model.embed(forms)
    assert vectors.dtype == np.float32 and vectors.shape == (len(forms), model.dim)
    assert all((vectors[0] == vector).all() for vector in vectors)
    assert (model.embed(np.stack([pixels, pixels]))[1] == vectors[0]).all()
    # an array with gaps
    assert (model.embed([np.repeat(pixels, 2, axis=1)[:, ::2]])[0] == vectors[0]).all()
    assert model.embed([]).shape == (0, model.dim)


def test_answers_are_those_of_the_command_line(model, samples, program):
    out = subprocess.run([program, "embed", "-m", "digits", *samples], capture_output=True, check=True)
    records = [json.loads(line) for line in out.stdout.splitlines()]
    expected = np.array([record["embedding"] for record in records], dtype=np.float32)
    assert (model.embed(samples, batch=3) == expected).all()
    out = subprocess.run([program, "predict", "-m", "digits", "--format", "jsonl", *samples], capture_output=True, check=True)
    for line, classes in zip(out.stdout.splitlines(), model.classify(samples, k=1), strict=True):
        best = json.loads(line)["predictions"][0]
        assert (best["label"], np.float32(best["probability"])) == (classes[0].label, np.float32(classes[0].probability))


def test_errors_have_the_texts_of_the_command_line(model, samples, program, tmp_path):
    bad = tmp_path / "bröken\n.png"
    bad.write_bytes(samples[0].read_bytes()[:60])
    missing = tmp_path / "missing.png"
    out = subprocess.run([program, "embed", "-m", "digits", bad, missing, samples[0]], capture_output=True)
    expected = [json.loads(line).get("error") for line in out.stdout.splitlines()]
    vectors, errors = model.embed([bad, missing, samples[0]], errors="return")
    assert errors == expected and errors[2] is None
    assert np.isnan(vectors[:2]).all() and np.isfinite(vectors[2]).all()
    with pytest.raises(vit_rs.ImageError) as caught:
        model.embed([samples[0], bad])
    assert str(caught.value) == expected[0]
    answers = model.classify([missing, samples[0]], k=1, errors="return")
    assert isinstance(answers[0], vit_rs.ImageError) and str(answers[0]) == expected[1]
    assert answers[1][0].label == samples[0].stem

    for name in ["no/such/model", "nonsense"]:
        out = subprocess.run([program, "embed", "-m", name, samples[0]], capture_output=True, text=True)
        with pytest.raises(vit_rs.ModelError) as caught:
            vit_rs.Model(name)
        # the program may name the system's error once more
        assert out.stderr.startswith(f"vit-cli: error: {caught.value}")


def test_what_does_not_fit_is_refused(model, samples):
    for wrong in ["3.png", b"bytes", [3], [np.zeros((2, 2, 3))], [np.zeros((2, 2, 2), np.uint8)], 5]:
        with pytest.raises(TypeError):
            model.embed(wrong)
    for options in [{"precision": "f12"}, {"device": "tpu"}]:
        with pytest.raises(vit_rs.UnsupportedError):
            vit_rs.Model("digits", **options)
    with pytest.raises(ValueError, match="errors"):
        model.embed(samples, errors="ignore")
    with pytest.raises(vit_rs.Error, match="block 99"):
        model.attention(samples[0], block=99)
    with pytest.raises(vit_rs.ImageError):
        model.embed([np.zeros((0, 4, 3), np.uint8)])


def test_attention_has_a_value_for_each_patch(model, samples):
    rollout = model.attention(samples[0])
    assert rollout.ndim == 2 and rollout.dtype == np.float32 and (rollout >= 0).all()
    assert model.attention(samples[0], block=0, head=1).shape == rollout.shape


def test_a_model_pickles_as_its_name_and_its_options(samples):
    model = vit_rs.Model("digits", precision="f32", threads=1, exif=False)
    again = pickle.loads(pickle.dumps(model))
    assert (again.precision, again.threads) == ("f32", 1)
    assert (again.embed(samples) == model.embed(samples)).all()
    assert len(pickle.dumps(model)) < 1000


def test_threads_share_a_model(model, samples):
    expected = model.embed(samples)
    wrong = []

    def ask():
        wrong.extend(i for i in range(5) if not (model.embed(samples, batch=i + 1) == expected).all())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_interpreter_is_free_while_a_model_computes(model, samples):
    # the main thread counts while another one computes; with a lock it would not get a turn within one call
    done, counts = threading.Event(), 0
    thread = threading.Thread(target=lambda: (model.embed(samples * 100), done.set()))
    thread.start()
    while not done.is_set():
        counts += 1
    thread.join()
    assert counts > 1000


def test_ctrl_c_ends_a_long_call(samples):
    program = """if True:
        import os, signal, sys, threading, time, vit_rs
        model = vit_rs.Model("digits", threads=1)
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        start = time.monotonic()
        try:
            model.embed([sys.argv[1]] * 2_000_000)
        except KeyboardInterrupt:
            print("interrupted")
    """
    out = subprocess.run([sys.executable, "-c", program, str(samples[0])], capture_output=True, text=True, timeout=60)
    assert out.stdout.strip() == "interrupted", out.stderr


def test_a_forked_child_is_told_what_to_do(samples):
    program = """if True:
        import os, sys, vit_rs
        model = vit_rs.Model("digits", threads=1)
        if os.fork() == 0:
            try:
                model.embed([sys.argv[1]])
            except RuntimeError as error:
                print(error, flush=True)
            os._exit(0)
        os.wait()
    """
    out = subprocess.run([sys.executable, "-c", program, str(samples[0])], capture_output=True, text=True, timeout=60)
    assert "spawn" in out.stdout, out.stderr


def test_convert_writes_what_the_model_opens(tmp_path):
    from conftest import ROOT

    found = ROOT / "weights/digits/model.onnx"
    notes = vit_rs.convert(found, tmp_path / "model.safetensors")
    assert all(isinstance(note, str) for note in notes)
    converted, graph = vit_rs.Model(tmp_path / "model.safetensors", precision="f32"), vit_rs.Model(found, precision="f32")
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(buffer, "png")
    assert (converted.embed([buffer.getvalue()]) == graph.embed([buffer.getvalue()])).all()
    with pytest.raises(vit_rs.ModelError, match="nothing.onnx"):
        vit_rs.convert(tmp_path / "nothing.onnx", tmp_path / "out.safetensors")
