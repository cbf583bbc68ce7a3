"Render the chart as Helm does, without a cluster: render.py CHART VALUES... prints one JSON list; what lint finds goes to stderr."
import json, sys
from pathlib import Path

import helm_python as helm
import yaml


def merged(below: dict, above: dict) -> dict:
    "Helm's way of laying one values file over another."
    return below | {k: merged(below[k], v) if isinstance(v, dict) and isinstance(below.get(k), dict) else v for k, v in above.items()}


def main(chart: str, *files: str) -> int:
    values: dict = {}
    for file in files: values = merged(values, yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {})
    with helm.Chart.load(chart) as c:
        c.validate_schema(values)
        rendered = c.render(values, name="cxr", namespace="cxr")
    print(json.dumps([d for name, text in sorted(rendered.items()) if name.endswith(".yaml") for d in yaml.safe_load_all(text) if d]))
    found = helm.lint(chart, values)
    print(json.dumps(found), file=sys.stderr)
    return 0


if __name__ == "__main__": sys.exit(main(*sys.argv[1:]))
