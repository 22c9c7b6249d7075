"""The server through the clients that people already have: openai, huggingface_hub, tritonclient. Every answer is compared
with the command line's.

    pip install openai huggingface_hub 'tritonclient[http]' numpy pillow
    python tests/serve/clients.py target/release/vit-cli
"""
import base64, json, pathlib, re, subprocess, sys, urllib.error, urllib.request

import huggingface_hub, numpy as np, openai, tritonclient.http as triton

CLI = sys.argv[1]
ROOT = pathlib.Path(__file__).parents[2]
SAMPLES = sorted((ROOT / "weights/digits/samples").glob("*.png"))


def cli(*args):
    return subprocess.run([CLI, *map(str, args)], capture_output=True, text=True, check=True).stdout


def uri(path):
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


class Server:
    def __init__(self, *args):
        self.process = subprocess.Popen([CLI, "serve", "--port", "0", *args], stderr=subprocess.PIPE, text=True)
        line = self.process.stderr.readline()
        self.url = re.search(r"http://\S+", line).group()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        assert self.process.wait(30) == 0, "SIGTERM must end the server with status 0"


def same(found, expected):
    # the same numbers, printed as decimal text in between
    np.testing.assert_allclose(np.asarray(found, dtype=np.float32), np.asarray(expected, dtype=np.float32), rtol=1e-6, atol=1e-7)


vectors = [json.loads(line)["embedding"] for line in cli("embed", *SAMPLES, "--format", "jsonl").splitlines()]
classes = [json.loads(line)["predictions"] for line in cli("predict", *SAMPLES, "--format", "jsonl").splitlines()]

with Server() as server:
    # OpenAI asks for base64 unless told otherwise
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    assert [m.id for m in client.models.list()] == ["digits"]
    for encoding in (openai.NOT_GIVEN, "float", "base64"):
        answer = client.embeddings.create(model="digits", input=[uri(p) for p in SAMPLES], extra_body={"modality": "image"}, encoding_format=encoding)
        found = [d.embedding for d in answer.data]
        if encoding == "base64":
            found = [np.frombuffer(base64.b64decode(v), "<f4") if isinstance(v, str) else v for v in found]
        same(found, vectors)
    for bad, kind in (({"model": "other"}, openai.NotFoundError), ({"input": ["a cat on a mat"]}, openai.UnprocessableEntityError), ({"dimensions": 7}, openai.BadRequestError)):
        try:
            client.embeddings.create(**{"model": "digits", "input": [uri(SAMPLES[0])], **bad})
            sys.exit(f"{bad} was accepted")
        except kind as error:
            assert error.body["message"], error

    # Hugging Face
    hub = huggingface_hub.InferenceClient(model=server.url)
    for path, expected in zip(SAMPLES, classes):
        found = hub.image_classification(str(path))
        assert [c.label for c in found] == [c["label"] for c in expected]
        same([c.score for c in found], [c["probability"] for c in expected])
    assert len(hub.image_classification(SAMPLES[0].read_bytes(), top_k=2)) == 2

    # Triton: tensors and pictures, in JSON and binary
    remote = triton.InferenceServerClient(server.url.removeprefix("http://"))
    assert remote.is_server_live() and remote.is_server_ready() and remote.is_model_ready("digits")
    assert remote.get_model_metadata("digits")["inputs"][0]["name"] == "pixel_values"
    for binary in (True, False):
        outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("logits", "pre_logits")]
        tensor = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype("float32")
        pixels = triton.InferInput("pixel_values", list(tensor.shape), "FP32")
        pixels.set_data_from_numpy(tensor, binary_data=binary)
        answer = remote.infer("digits", [pixels], outputs=outputs)
        assert answer.as_numpy("logits").shape == (3, 10) and answer.as_numpy("pre_logits").shape == (3, 64)
    images = triton.InferInput("image", [len(SAMPLES)], "BYTES")
    images.set_data_from_numpy(np.array([p.read_bytes() for p in SAMPLES], dtype=object), binary_data=True)
    same(remote.infer("digits", [images], outputs=outputs).as_numpy("pre_logits"), vectors)

with Server("--api-key", "secret") as server:
    def status(path, key=None, data=None):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            return urllib.request.urlopen(urllib.request.Request(server.url + path, data, headers)).status
        except urllib.error.HTTPError as error:
            return error.code
    assert status("/health") == 200 and status("/") == 200
    assert status("/v1/models") == 401 and status("/v1/models", "wrong") == 401 and status("/v1/models", "secret") == 200
    assert status("/predict", None, SAMPLES[0].read_bytes()) == 401 and status("/predict", "secret", SAMPLES[0].read_bytes()) == 200

print(f"openai {openai.__version__}, huggingface_hub {huggingface_hub.__version__}, tritonclient: {len(SAMPLES)} pictures each, all good")
