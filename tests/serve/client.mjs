// The server through @huggingface/inference: node tests/serve/client.mjs URL PICTURE LABEL
import { InferenceClient } from "@huggingface/inference";
import { readFile } from "node:fs/promises";

const [url, picture, label] = process.argv.slice(2);
const data = new Blob([await readFile(picture)], { type: "image/png" });
const found = await new InferenceClient().endpoint(url).imageClassification({ data });
if (found[0].label !== label || !(found[0].score > 0.5)) throw new Error(JSON.stringify(found));
console.log("@huggingface/inference: good");
