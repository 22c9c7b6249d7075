#!/usr/bin/env bash
# The server against real clients: Python's (in a virtual environment of its own, under target/), and, where Node and Chromium
# are installed, Hugging Face's for JavaScript and the page in a browser. schemathesis sends what openapi.json allows and what
# it forbids; no answer may be a 5xx.
#
#     tests/serve/run.sh target/release/vit-cli
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cli=$(realpath "$1")
work=${CARGO_TARGET_DIR:-$here/../../target}/serve-clients
mkdir -p "$work"
work=$(realpath "$work")

if [ ! -x "$work/venv/bin/st" ]; then
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet --disable-pip-version-check openai==3.57.0 huggingface_hub==2.4.0 \
        'tritonclient[http]==2.73.0' schemathesis==4.32.5 numpy pillow
fi
"$work/venv/bin/python" "$here/clients.py" "$cli"

"$cli" serve --port 0 2>"$work/log" &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
for _ in $(seq 100); do
    url=$(grep -o 'http://[0-9.:]*' "$work/log" || true)
    [ -n "$url" ] && break
    sleep 0.1
done

(cd "$work" && venv/bin/st run "$url/openapi.json" --checks not_a_server_error --max-examples 25 --seed 1 --no-color) | tail -5

sample=$here/../../weights/digits/samples/3.png
if command -v npm >/dev/null; then
    cp "$here"/*.mjs "$work"
    (cd "$work" && npm install --silent --no-fund --no-audit --prefix . @huggingface/inference@4.13.30 playwright-core@1.65.1 axe-core@4.14.1)
    node "$work/client.mjs" "$url" "$sample" 3
    chromium=$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)
    if [ -n "$chromium" ]; then
        node "$work/page.mjs" "$url/" "$sample" 3 "$work" "$chromium"
    else
        echo "no Chromium: the page was not opened"
    fi
else
    echo "no npm: the clients for JavaScript were not tried"
fi
kill -0 $server
