// Builds the dashboard's page into the Python package. Same sources and lock file, same bytes.
import { build } from "esbuild";
import { createHash } from "node:crypto";
import { copyFile, readFile, readdir } from "node:fs/promises";

const page = new URL("../src/foregate/server/dashboard/page/", import.meta.url).pathname;
const here = new URL("./src/", import.meta.url).pathname;

// Named in the built script, so that a test sees a page that was not built from these sources.
const hash = createHash("sha256");
for (const name of (await readdir(here)).sort()) hash.update(await readFile(here + name));
const sources = hash.digest("hex").slice(0, 16);

await build({
  entryPoints: { app: here + "app.tsx" },
  bundle: true,
  minify: true,
  target: "es2022",
  format: "iife",
  jsx: "automatic",
  jsxImportSource: "preact",
  legalComments: "none",
  banner: { js: `// Foregate dashboard, built from frontend/ by make frontend. Sources ${sources}. Contains Preact (MIT).` },
  outdir: page,
});
await build({ entryPoints: [here + "app.css"], minify: true, outdir: page });
for (const name of ["index.html", "icon.svg"]) await copyFile(here + name, page + name);
