"Packaging: everything it says comes from settings.ini, the one place."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=["="])
cfg.read("settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]
train, llm, clinic, ops, dev = (cfg[f"{k}_requirements"].split() for k in ("train", "llm", "clinic", "ops", "dev"))

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["cxr_pred", "cxr_pred.*"]),
    package_data={"cxr_pred": ["**/*.yaml", "**/*.html", "**/*.css"]},
    install_requires=cfg["requirements"].split(),
    extras_require={"train": train, "llm": llm, "clinic": clinic, "ops": ops, "dev": train + llm + clinic + ops + dev},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    zip_safe=False,
)
