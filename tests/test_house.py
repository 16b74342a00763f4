"""Rules for the code: layered imports without cycles, no private names across modules, limits on file and function sizes.

Known offenders are listed in two tables below, with their reasons. The tables may only shrink: a test fails when an offender
has grown, and also when it has shrunk or is gone; the message gives the line to write instead.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

# The layers of each package, lowest first. Each line names the components (modules or packages) of one layer. A component imports
# only from lower layers; components of the same layer do not import each other. Imports inside functions count, imports under
# TYPE_CHECKING do not. A package's own `__init__` is above all its layers.
LAYERS: dict[str, list[str]] = {
    "eval": [
        "model_state positions",
        "perplexity generation harness",
    ],
    "quant": [
        "byte_views weight_cache",
        "nf4 ternary",
        "backends",
        "ops",
        "linear",
        "conv experts lora",
        "swap",
        "plugins health pretrained",
    ],
    "finetune": [
        "allocator errors",
        "processes provenance units memory",
        "files screen",
        "recipe libraries",
        "record",
        "run_dir",
        "data",
        "train",
        "models",
        "task_data",
        "assembly sources",
        "planning exporters report",
        "merging bench",
        "stages",
        "pipeline",
        "commands",
        "cli",
    ],
}  # fmt: skip
MAY_IMPORT: dict[str, set[str]] = {"eval": set(), "quant": set(), "finetune": {"eval", "quant"}}

# Libraries that only these files may import.
BASELINES = "finetune/bench/baselines.py"  # the plain stack to compare with
ONLY_IN = {
    "bitsandbytes": ("quant/backends/", "finetune/train/optim.py", BASELINES),
    "triton": ("quant/backends/",),
    "xllamacpp": ("finetune/exporters/",),
    **dict.fromkeys(("numba", "llvmlite"), ("quant/backends/",)),
    "trl": ("finetune/train/preference.py", BASELINES),
    **dict.fromkeys(("libggml", "onebitllms", "torchao"), (BASELINES,)),
}

LIMITS = {"file": 500, "class": 300, "function": 80}  # lines

# "importer → imported" → why.
IMPORT_OFFENDERS = {
    "quant.swap → quant.pretrained": "until schemes have a protocol, the swap asks the stored formats what can be read",
}
# file, or file::name → its lines and why.
SIZE_OFFENDERS: dict[str, tuple[int, str]] = {
    "finetune/bench/baselines.py::sft_trainer": (126, "the plain stack written out as its users write it"),
    "finetune/bench/device.py": (603, "one bench of everything a new machine must show; it splits by what is measured"),
    "finetune/bench/plan.py": (592, "cases and measurement in one file"),
    "finetune/bench/qlora.py": (607, "cases, both sides and tables in one file"),
    "finetune/data/stream.py": (702, "reading, shuffling and cutting of streamed text in one file"),
    "finetune/planning/devices.py": (670, "table of GPUs and measurement of this machine in one file"),
    "finetune/planning/trace.py": (541, "recorder and stand-ins of the fast step in one file"),
    "quant/backends/numba_cpu.py": (642, "compiler and kernels in one file"),
    "quant/backends/numba_cpu.py::_dot": (126, "one kernel, written as LLVM instructions"),
    "quant/backends/triton_kernels.py": (540, "all kernels for CUDA in one file"),
    "quant/linear.py": (591, "linears of both schemes in one file; splits with the schemes"),
    "quant/pretrained.py": (679, "all stored formats in one file; they move to formats/"),
}


# ---------------------------------------------------------------------------------------------------------- reading sources


@dataclass(frozen=True)
class Import:
    importer: str  # module
    imported: str  # module, or module.name where a private name is used
    at: str  # file:line


@dataclass
class Source:
    """One module: its imports from our packages, the private names it uses from them, and the libraries it imports."""

    path: str
    module: str
    imports: list[Import] = field(default_factory=list)
    private: list[Import] = field(default_factory=list)
    libraries: dict[str, int] = field(default_factory=dict)  # name → line
    relative: list[int] = field(default_factory=list)  # lines
    sizes: dict[str, tuple[str, int, int]] = field(default_factory=dict)  # path or path::name → (kind, lines, first line)


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes except those under TYPE_CHECKING."""
    pending = [tree]
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending += node.orelse
        else:
            pending += ast.iter_child_nodes(node)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def read_imports(source: Source, tree: ast.AST, modules: set[str]) -> None:
    """Fills in the module's imports and the private names that it uses from them."""
    our_names: dict[str, str] = {}  # local name → full name
    private: list[ast.Attribute] = []
    for node in runtime_nodes(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            private.append(node)
            continue
        if isinstance(node, ast.Import):
            names = {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                source.relative.append(node.lineno)
            names = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        else:
            continue
        for name, full in names.items():
            source.libraries.setdefault(full.split(".")[0], node.lineno)
            module = full if full in modules else full.rpartition(".")[0]
            if module in modules:
                our_names[name] = full
                at = f"{source.path}:{node.lineno}"
                source.imports.append(Import(source.module, module, at))
                if isinstance(node, ast.ImportFrom) and is_private(full.rpartition(".")[2]):
                    source.private.append(Import(source.module, full, at))
    for node in private:
        if full := our_names.get(ast.unparse(node.value)):
            source.private.append(Import(source.module, f"{full}.{node.attr}", f"{source.path}:{node.lineno}"))


def read_sizes(source: Source, node: ast.AST, prefix: str = "") -> None:
    """Fills in the length of each class and function, without decorators."""
    for child in ast.iter_child_nodes(node):
        name = prefix
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}.{child.name}".removeprefix(".")
            kind = "class" if isinstance(child, ast.ClassDef) else "function"
            lines = (child.end_lineno or child.lineno) - child.lineno + 1
            source.sizes[f"{source.path}::{name}"] = (kind, lines, child.lineno)
        read_sizes(source, child, name)


def read_sources(root: Path, packages: list[str]) -> list[Source]:
    paths = [path.relative_to(root) for package in packages for path in sorted((root / package).rglob("*.py"))]
    modules = {module_name(path) for path in paths}
    sources = []
    for path in paths:
        text = (root / path).read_text(encoding="utf-8")
        tree, source = ast.parse(text), Source(path.as_posix(), module_name(path))
        source.sizes[source.path] = ("file", len(text.splitlines()), 1)
        read_imports(source, tree, modules)
        read_sizes(source, tree)
        sources.append(source)
    return sources


# ------------------------------------------------------------------------------------------------------------------- checks


def layer_of(module: str, layers: dict[str, list[str]]) -> tuple[str, str, int]:
    """(package, component, index of its layer); the package's `__init__` is above all layers. LookupError without a layer."""
    package, _, path = module.partition(".")
    if not path:
        return package, "__init__", len(layers[package])
    component = path.partition(".")[0]
    for layer, components in enumerate(layers[package]):
        if component in components.split():
            return package, component, layer
    raise LookupError(f"{module} has no layer: add {component} to a line of LAYERS")


def wrong_directions(imports: list[Import], layers: dict[str, list[str]], may_import: dict[str, set[str]]) -> list[Import]:
    wrong = []
    for each in imports:
        package, component, layer = layer_of(each.importer, layers)
        other_package, other_component, other_layer = layer_of(each.imported, layers)
        allowed = (
            component == other_component or other_layer < layer
            if package == other_package
            else other_package in may_import[package]
        )
        wrong += [] if allowed else [each]
    return wrong


def find_cycle(imports: list[Import]) -> list[Import]:
    """The imports of one cycle, or an empty list. Compares `importer` and `imported`."""
    edges: dict[str, dict[str, Import]] = {}
    for each in imports:
        if each.importer != each.imported:
            edges.setdefault(each.importer, {}).setdefault(each.imported, each)
    done: set[str] = set()

    def follow(name: str, path: list[Import]) -> list[Import]:
        for target, step in edges.get(name, {}).items():
            names = [each.importer for each in path] + [name]
            if target in names:
                return [*path, step][names.index(target) :]
            if target not in done and (cycle := follow(target, [*path, step])):
                return cycle
        done.add(name)
        return []

    return next((cycle for name in edges if name not in done and (cycle := follow(name, []))), [])


def package_cycles(imports: list[Import]) -> list[str]:
    """One line for each cycle, of modules or of packages at any depth (all modules of a package count as one node)."""
    lines = []
    for depth in range(1, max((each.importer.count(".") for each in imports), default=0) + 2):
        truncated = [
            Import(".".join(each.importer.split(".")[:depth]), ".".join(each.imported.split(".")[:depth]), each.at)
            for each in imports
        ]
        if cycle := find_cycle(truncated):
            lines.append("cycle: " + ", ".join(f"{each.importer} → {each.imported} ({each.at})" for each in cycle))
    return lines


def import_errors(offending: list[Import], known: dict[str, str], table: str) -> list[str]:
    """One line for each violation that is not in the table, and for each table entry that is no longer a violation."""
    violations = {f"{each.importer} → {each.imported}": each.at for each in offending}
    return [f"{at}: {name}" for name, at in violations.items() if name not in known] + [
        f"{name} is gone: take it out of {table}" for name in known if name not in violations
    ]


def size_errors(sizes: dict[str, tuple[str, int, int]], known: dict[str, tuple[int, str]]) -> list[str]:
    """One line for each file, class or function that is too long and not in the table, has grown, or is below its entry."""
    lines = []
    for name, (kind, size, line) in sizes.items():
        if name not in known and size > LIMITS[kind]:
            lines.append(f"{name.partition('::')[0]}:{line}: {name} has {size} lines, a {kind} at most {LIMITS[kind]}")
        elif name in known and size > known[name][0]:
            lines.append(
                f"{name.partition('::')[0]}:{line}: {name} grew from {known[name][0]} lines to {size}: it may only shrink"
            )
        elif name in known and size <= LIMITS[kind]:
            lines.append(f"{name} has {size} lines, within the limit: take it out of SIZE_OFFENDERS")
        elif name in known and size < known[name][0]:
            lines.append(f"{name} shrank from {known[name][0]} lines: write {size} in SIZE_OFFENDERS")
    return lines + [f"{name} is gone: take it out of SIZE_OFFENDERS" for name in known if name not in sizes]


# -------------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def sources(repository: Path) -> list[Source]:
    sources = read_sources(repository, list(LAYERS))
    assert {source.module for source in sources} > set(LAYERS)
    return sources


def test_every_module_has_a_layer(sources: list[Source]) -> None:
    errors = []
    for source in sources:
        try:
            layer_of(source.module, LAYERS)
        except LookupError as error:
            errors.append(f"{source.path}: {error}")
    assert errors == []


def test_imports_follow_the_layers_and_use_no_private_names(sources: list[Source]) -> None:
    """Both kinds of violation share IMPORT_OFFENDERS."""
    offending = wrong_directions([each for source in sources for each in source.imports], LAYERS, MAY_IMPORT)
    offending += [each for source in sources for each in source.private]
    assert import_errors(offending, IMPORT_OFFENDERS, "IMPORT_OFFENDERS") == []
    assert [f"{source.path}:{line}: relative import" for source in sources for line in source.relative] == []


def test_no_import_cycles(sources: list[Source]) -> None:
    imports = [each for source in sources for each in source.imports]
    assert package_cycles([each for each in imports if f"{each.importer} → {each.imported}" not in IMPORT_OFFENDERS]) == []


def test_files_classes_and_functions_stay_short(sources: list[Source]) -> None:
    assert size_errors({name: size for source in sources for name, size in source.sizes.items()}, SIZE_OFFENDERS) == []


def test_libraries_are_imported_only_where_allowed(sources: list[Source]) -> None:
    wrong = [
        f"{source.path}:{source.libraries[library]}: {library} may only be imported in {', '.join(homes)}"
        for source in sources
        for library, homes in ONLY_IN.items()
        if library in source.libraries and not source.path.startswith(homes)
    ]
    assert wrong == []


def test_no_import_shadows_the_builtin_eval(repository: Path, sources: list[Source]) -> None:
    for source in sources:
        assert not re.search(r"^\s*import eval\b", (repository / source.path).read_text(encoding="utf-8"), re.M), source.path


TOY = {
    "toy/__init__.py": "",
    "toy/low.py": "def f():\n    from toy.high import g\n",
    "toy/high.py": "import typing\nfrom toy.low import _hidden\nif typing.TYPE_CHECKING:\n    from toy.top import x\n",
    "toy/top.py": "from toy import low as l\nl._shown()\nl.f.__name__\nfrom .low import f\n",
    "toy/a/one.py": "from toy.b.one import x\n",
    "toy/b/one.py": "",
    "toy/b/two.py": "from toy.a.one import y\n",
}


def test_checks_report_each_violation_of_a_toy_package(tmp_path: Path) -> None:
    for name, text in TOY.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    toys = read_sources(tmp_path, ["toy"])
    imports = [each for toy in toys for each in toy.imports]
    layers = {"toy": ["low", "high", "top", "a b"]}
    wrong = [f"{each.importer} → {each.imported}" for each in wrong_directions(imports, layers, {"toy": set()})]
    assert wrong == ["toy.a.one → toy.b.one", "toy.b.two → toy.a.one", "toy.low → toy.high"]
    private = [f"{each.at} {each.imported}" for toy in toys for each in toy.private]
    assert private == ["toy/high.py:2 toy.low._hidden", "toy/top.py:2 toy.low._shown"]
    assert [toy.relative for toy in toys if toy.relative] == [[4]]
    assert package_cycles(imports) == [
        "cycle: toy.a → toy.b (toy/a/one.py:1), toy.b → toy.a (toy/b/two.py:1)",  # a cycle of packages, not of modules
        "cycle: toy.high → toy.low (toy/high.py:2), toy.low → toy.high (toy/low.py:2)",
    ]
    assert import_errors([], {"a → b": "why"}, "THE TABLE") == ["a → b is gone: take it out of THE TABLE"]


def test_size_table_may_only_shrink() -> None:
    sizes = {"a.py": ("file", 600, 1), "a.py::f": ("function", 81, 7), "a.py::C": ("class", 300, 9)}
    assert size_errors(sizes, {"a.py": (600, "why"), "a.py::f": (81, "why")}) == []
    assert size_errors(sizes, {"a.py": (599, "why"), "a.py::f": (82, "why"), "a.py::C": (301, "why"), "b.py": (501, "why")}) == [
        "a.py:1: a.py grew from 599 lines to 600: it may only shrink",
        "a.py::f shrank from 82 lines: write 81 in SIZE_OFFENDERS",
        "a.py::C has 300 lines, within the limit: take it out of SIZE_OFFENDERS",
        "b.py is gone: take it out of SIZE_OFFENDERS",
    ]
    assert size_errors(sizes, {"a.py": (600, "why")}) == ["a.py:7: a.py::f has 81 lines, a function at most 80"]
