"""What the notebooks show, against what they say now: outputs.py [--store] NOTEBOOK[:CELL,CELL] ... runs each as nbdev tests it and names the cells whose stored output is another.

With --store their outputs are replaced, those of the named cells or of all that differ; a cell is counted from 0. Durations are no
difference, and neither is stderr, which is dropped. A path or an address of this machine is never stored: such an output is refused.
Exit status 1 where something differs, or was refused; 2 where a cell fails.
"""
import base64, contextlib, difflib, io, json, os, re, subprocess, sys
from pathlib import Path, PurePath

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = re.compile(r"^#\| *(notest|slow|cuda|eval: *false)\b|\bnbdev_export\(", re.M)   # cells that the tests do not run either: they keep what they have
OF_A_MACHINE = re.compile(r"/tmp/|/home/|/root/|/Users/|\b0x[0-9a-f]{6,}")
NAMED = ("text/plain", "text/markdown", "text/html")


def text_of(outputs: list[dict]) -> str:
    "What the outputs of a cell say, stdout first: no colours, no tags, no widths, no durations."
    stream = "".join("".join(o["text"]) for o in outputs if o.get("name") == "stdout")
    said = [stream, *("".join(o["data"][kind]) for kind in NAMED for o in outputs if kind in o.get("data", {}))]
    text = re.sub(r"<style.*?</style>|<[^<>]*>", " ", re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(said)), flags=re.S)
    text = re.sub(r"\d+(\.\d+)?(e[-+]\d+)? ?(ns|µs|us|ms|s|min)\b", "# s", text)
    return "\n".join(line for l in text.splitlines() if (line := " ".join(l.split())))


def pictures_of(outputs: list[dict]) -> list:
    "The pictures among the outputs, those inside a page too, as pixels."
    import numpy as np
    from PIL import Image
    data = [o["data"] for o in outputs if "data" in o]
    coded = ["".join(d["image/png"]) for d in data if "image/png" in d] + [p for d in data for p in re.findall(r"data:image/(?:png|jpeg|webp);base64,([\w+/=]+)", "".join(d.get("text/html", "")))]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(p)))) for p in coded]


def same_pictures(a: list, b: list) -> bool:
    "Whether they are as many and of the same pixels."
    return len(a) == len(b) and all(x.shape == y.shape and (x == y).all() for x, y in zip(a, b))


def clean(outputs: list[dict]) -> list[dict]:
    "As they are stored: no stderr, no count, no metadata, this repository's folder as `.`."
    kept = json.loads(json.dumps([o for o in outputs if o.get("name") != "stderr"]).replace(str(ROOT), "."))
    for o in kept:
        if "metadata" in o: o["metadata"] = {}
        if "execution_count" in o: o["execution_count"] = None
        for kind, lines in o.get("data", {}).items():
            if kind.startswith("text/"): o["data"][kind] = [re.sub(r" at 0x[0-9a-f]+", "", l) for l in lines]
    return kept


def run(path: Path) -> dict[int, list[dict]]:
    "Fresh outputs of a notebook, by cell; raises what a cell raises."
    from execnb.shell import CaptureShell
    Path.__repr__ = PurePath.__repr__   # fastcore, which comes with it, shows a path in a way of its own
    os.environ["IN_TEST"] = "1"
    cells, shell, made = json.loads(path.read_text(encoding="utf-8"))["cells"], CaptureShell(path), {}
    for i, cell in enumerate(cells):
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or LEFT_OUT.search(source): continue
        made[i] = clean(shell.run(source))
        if shell.exc: raise RuntimeError(f"{path.name} [{i}] {type(shell.exc).__name__}: {shell.exc}") from shell.exc
    return made


def fresh(path: Path) -> dict[int, list[dict]]:
    "`run` in a process of its own, in the notebook's folder and without the settings of this shell. Raises RuntimeError where a cell fails."
    env = {k: v for k, v in os.environ.items() if not k.startswith("CXR_")} | {"PYTHONPATH": str(ROOT)}
    r = subprocess.run([sys.executable, __file__, "--run", str(path)], cwd=path.parent, env=env, capture_output=True, text=True)
    if r.returncode: raise RuntimeError((r.stderr.strip().splitlines() or ["it ended without a word"])[-1])
    return {int(i): o for i, o in json.loads(r.stdout).items()}


def differing(path: Path, only: set[int] | None = None, pictures: bool = True) -> dict[int, tuple[list[dict], list[dict]]]:
    "By cell, stored and fresh outputs that say or show something else."
    cells, new = json.loads(path.read_text(encoding="utf-8"))["cells"], fresh(path)
    pairs = {i: (cells[i].get("outputs", []), o) for i, o in new.items() if not only or i in only}
    return {i: (a, b) for i, (a, b) in pairs.items() if text_of(a) != text_of(b) or pictures and not same_pictures(pictures_of(a), pictures_of(b))}


def store(path: Path, outputs: dict[int, list[dict]]) -> None:
    "Write the cells' outputs into the notebook, in the form that nbdev_clean leaves."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for i, o in outputs.items(): notebook["cells"][i]["outputs"] = o
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    writes, names, status = "--store" in arguments, [a for a in arguments if a != "--store"], 0
    if not names: print(__doc__.split("\n\n")[0]); return 2
    for name in names:
        file, _, cells = name.partition(":")
        path = Path(file).resolve()
        try: differs = differing(path, {int(c) for c in cells.split(",")} if cells else None)
        except RuntimeError as e: print(f"{file}: {e}"); status = 2; continue
        refused = {i for i, (_, b) in differs.items() if OF_A_MACHINE.search(json.dumps([o.get("text", "") for o in b] + [o["data"].get(k, "") for o in b if "data" in o for k in NAMED]))}
        for i, (a, b) in differs.items():
            print(f"{file} [{i}]" + (" holds a path or an address of this machine: not stored" if i in refused else " stored" if writes else ""))
            changed = [l for l in difflib.unified_diff(text_of(a).splitlines(), text_of(b).splitlines(), lineterm="", n=0) if not l.startswith(("---", "+++", "@@"))]
            print("\n".join(f"  {l[:200]}" for l in changed[:12]) or "  another picture")
        if writes: store(path, {i: b for i, (_, b) in differs.items() if i not in refused})
        if refused or differs and not writes: status = max(status, 1)
    return status


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        with contextlib.redirect_stdout(sys.stderr): made = run(Path(sys.argv[2]))
        print(json.dumps(made)); sys.exit()
    sys.exit(main(sys.argv[1:]))
