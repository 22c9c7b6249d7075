// The page in a real browser: a picture dropped in gets its answer and its map, nothing is logged as an error, and axe finds
// no serious violation.
//
//     npm install playwright-core axe-core
//     node tests/serve/page.mjs URL PICTURE LABEL FOLDER-FOR-SCREENSHOTS [CHROMIUM]
import { chromium } from "playwright-core";
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";

const [url, picture, label, folder, executablePath = "/usr/bin/chromium"] = process.argv.slice(2);
const axe = await readFile(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const args = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run"];
const browser = await chromium.launch({ executablePath, args });

async function drop(page) {
  const bytes = (await readFile(picture)).toString("base64");
  const transfer = await page.evaluateHandle((base64) => {
    const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], "picture.png", { type: "image/png" }));
    return transfer;
  }, bytes);
  await page.dispatchEvent("body", "drop", { dataTransfer: transfer });
}

for (const [name, width, height, colorScheme] of [["desktop", 1280, 900, "light"], ["desktop-dark", 1280, 900, "dark"], ["phone", 390, 844, "light"]]) {
  const page = await browser.newPage({ viewport: { width, height }, colorScheme, bypassCSP: true });
  const errors = [];
  page.on("console", (message) => { if (message.type() === "error") errors.push(message.text()); });
  page.on("pageerror", (error) => errors.push(String(error)));
  await page.goto(url);
  await page.waitForFunction(() => document.getElementById("model").textContent.includes("pixels"));
  await drop(page);
  await page.waitForFunction(() => document.querySelectorAll("#classes li").length > 0);
  const best = await page.textContent("#classes li span");
  if (best !== label) errors.push(`the answer is ${best}, not ${label}`);
  await page.waitForFunction(() => Number(document.getElementById("block").max) > 0);
  const dark = () => page.evaluate(() => {
    const canvas = document.getElementById("map"), data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    return data.reduce((sum, value) => sum + value, 0);
  });
  const before = await dark();
  await page.fill("#block", "1");
  if ((await dark()) === before) errors.push("the slider does not change the map");
  await page.fill("#head", "2");
  await page.screenshot({ path: `${folder}/${name}.png`, fullPage: true });
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() => axe.run());
  for (const v of violations) if (["serious", "critical"].includes(v.impact)) errors.push(`${v.id}: ${v.help} (${v.nodes[0].html})`);
  const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  if (wide > 0) errors.push(`the page is ${wide} pixels too wide`);
  if (errors.length) { console.error(name, errors); process.exitCode = 1; }
  // a file that is no picture is said so
  await page.setInputFiles("#file", { name: "notes.txt", mimeType: "text/plain", buffer: Buffer.from("hello") });
  await page.waitForFunction(() => document.getElementById("bad").textContent.includes("not a PNG"));
  await page.close();
}
await browser.close();
console.log(process.exitCode ? "the page: BAD" : "the page: good");
