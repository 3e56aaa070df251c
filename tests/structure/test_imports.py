"""Imports flow one way; parsed from the sources, nothing is imported."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
PACKAGE = "mpmc_jax"

# Part of the package -> parts that it may import. The plug-ins know no method.
BELOW_METHODS = {
    "types",
    "pixels",
    "distributed",
    "memory",
    "precision",
    "random_keys",
    "text",
    "losses",
    "models",
    "data",
    "augmentation",
}
BELOW_EXPERIMENTS = BELOW_METHODS | {
    "web_page",
    "atomic_write",
    "paths",
    "methods",
    "plugins",
    "training",
    "evaluation",
}
ALLOWED = {
    "atomic_write": set(),
    "paths": set(),
    "pixels": set(),
    "types": set(),
    "distributed": set(),
    "memory": set(),
    "precision": {"types"},
    "random_keys": {"types"},
    "text": set(),
    "web_page": {"text"},
    "losses": {"types", "distributed", "precision"},
    "models": {
        "types",
        "pixels",
        "distributed",
        "memory",
        "text",
        "precision",
        "atomic_write",
    },
    # The builder alone, for the normalization that the configured encoder states.
    "data": {"types", "pixels", "memory", "text", "web_page", "atomic_write", "models"},
    "augmentation": {"types", "pixels", "random_keys"},
    "methods": BELOW_METHODS,
    "plugins": BELOW_METHODS,
    "training": BELOW_METHODS | {"methods", "plugins", "atomic_write"},
    "evaluation": {"types", "pixels", "memory", "text", "models", "atomic_write"},
    "experiments": BELOW_EXPERIMENTS,
    "analysis": BELOW_EXPERIMENTS | {"experiments"},
}
OUTSIDE = ("configs", "launch", "tests")
DATA_LIBRARIES = {"grain", "tensorflow_datasets", "array_record"}
FOREIGN = {"tensorflow", "torch", "clu"}


def _module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path):
    """Every name a file imports, at the top or inside a function, as dotted text."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


GRAPH = {
    _module_name(path): _imports(path)
    for path in sorted((ROOT / PACKAGE).rglob("*.py"))
}


def _part(name):
    pieces = name.split(".")
    return pieces[1] if pieces[0] == PACKAGE and len(pieces) > 1 else None


def _libraries(module):
    """Top-level libraries that importing the module brings in, through the package."""
    seen, found, todo = set(), set(), [module]
    while todo:
        name = todo.pop()
        # The package itself imports what reads data at its first use, see below.
        if name in seen or name not in GRAPH or name == PACKAGE:
            continue
        seen.add(name)
        for imported in GRAPH[name]:
            found.add(imported.split(".")[0])
            todo.append(imported)
    return found


def test_the_graph_is_not_empty():
    parts = {_part(name) for name in GRAPH}
    assert ALLOWED.keys() <= parts


@pytest.mark.parametrize("module", [name for name in GRAPH if _part(name)])
def test_imports_flow_one_way(module):
    part = _part(module)
    assert part in ALLOWED, f"{module}: a part that the design does not name"
    used = {_part(name) for name in GRAPH[module]} - {None, part}
    assert used <= ALLOWED[part], f"{module} imports {sorted(used - ALLOWED[part])}"


@pytest.mark.parametrize("module", GRAPH)
def test_the_package_does_not_import_its_users(module):
    assert not {name.split(".")[0] for name in GRAPH[module]} & set(OUTSIDE)


@pytest.mark.parametrize(
    "module", [name for name in GRAPH if _part(name) in ("methods", "training")]
)
def test_a_step_runs_on_plain_arrays(module):
    assert not _libraries(module) & DATA_LIBRARIES


def test_nothing_names_another_framework():
    for module, names in GRAPH.items():
        found = {name.split(".")[0] for name in names} & FOREIGN
        assert not found, f"{module} imports {sorted(found)}"


def test_importing_the_package_loads_neither_data_nor_checkpoint_libraries():
    heavy = DATA_LIBRARIES | FOREIGN | {"orbax", "tensorboardX"}
    code = f"import mpmc_jax, sys; print(sorted({heavy} & sys.modules.keys()))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert found.stdout.strip() == "[]", found.stdout + found.stderr


def test_importing_everything_loads_no_other_framework():
    modules = [*GRAPH]
    programs = sorted((ROOT / "launch").rglob("*.py"))
    # The bench loads PyTorch's step in a process of its own, where there is torch.
    programs = [path for path in programs if path.parent.name != "pytorch"]
    modules += [_module_name(path) for path in programs]
    code = (
        "import importlib, sys\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)\n"
        f"print(sorted({FOREIGN} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize(
    "module", [name for name in GRAPH if _part(name) in ("methods", "plugins")]
)
def test_methods_and_plugins_leave_the_loop_to_training(module):
    forbidden = {"optax", "orbax", "jax.pmap", "jax.shard_map"}
    names = {name for name in GRAPH[module] if name.split(".")[0] in forbidden}
    assert not (GRAPH[module] & forbidden) | names
    path = ROOT / (module.replace(".", "/") + ".py")
    path = path if path.is_file() else path.with_suffix("") / "__init__.py"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"pmap", "shard_map", "checkpoint"}
        if isinstance(node, ast.For) and isinstance(node.target, ast.Name):
            assert node.target.id != "step"
