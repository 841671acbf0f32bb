"""The architecture's rules, checked by reading imports: who may import whom, where vLLM is, file sizes, packaging."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("serving", "kernels", "model_configs", "bench")
MAY_IMPORT = {
    "model_configs": {"model_configs"},
    "kernels": {"kernels"},
    "serving": {"serving", "kernels", "model_configs"},
    "bench": {"bench", "serving", "kernels", "model_configs"},
}
MAX_LINES = 500
MAX_FUNCTION_LINES = 60
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_a_folder_imports_only_what_its_layer_allows(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    ours = {name.split(".")[1] for name in imports_of(path) if name.startswith("vllm_puzzle.")}
    assert ours <= MAY_IMPORT[folder], f"{folder} may import {sorted(MAY_IMPORT[folder])}"


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent.name != "serving"], ids=ids)
def test_only_serving_imports_vllm(path: Path) -> None:
    assert not {name for name in imports_of(path) if name.split(".")[0] == "vllm"}


@pytest.mark.parametrize("path", sorted((ROOT / "model_configs").rglob("*.py")), ids=ids)
def test_model_configs_needs_the_standard_library_only(path: Path) -> None:
    import sys

    others = {name.split(".")[0] for name in imports_of(path)} - {"vllm_puzzle", "__future__"}
    assert others <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_triton_is_imported_in_kernels_only(path: Path) -> None:
    if path.parent.name != "kernels":
        assert not {name for name in imports_of(path) if name.split(".")[0] == "triton"}


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_nobody_uses_vllms_triton_placeholders(path: Path) -> None:
    # On CPU they are stand-ins that do nothing; kernels import triton itself.
    assert not {name for name in imports_of(path) if name.startswith("vllm.triton_utils")}


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_files_and_functions_keep_their_size(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name


def test_the_package_list_equals_the_disk() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {path.parent for path in SOURCES}
    mapped = {ROOT / folder for folder in config["package-dir"].values()}
    assert on_disk == mapped, "a folder with modules is missing from the wheel, or the other way round"
    assert set(config["packages"]) == set(config["package-dir"])


def test_package_data_covers_every_file_that_is_not_python() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {package: ROOT / folder for package, folder in config["package-dir"].items()}
    covered = {
        path
        for package, patterns in config["package-data"].items()
        for pattern in patterns
        for path in folders[package].glob(pattern)
    }
    shipped = ("model_configs", "serving", "kernels")
    files = {path for folder in shipped for path in (ROOT / folder).rglob("*") if path.is_file()}
    assert {path for path in files if path.suffix not in (".py", ".pyc")} == covered


@pytest.mark.parametrize("folder", ["kernels", "bench", "tests"])
def test_folders_with_a_taken_import_name_are_not_packages(folder: str) -> None:
    assert not list((ROOT / folder).rglob("__init__.py")), "started from the root, Python would import them instead"


def test_the_top_level_holds_nothing_unexpected() -> None:
    import subprocess

    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {line.split("/")[0] for line in tracked.splitlines()}
    allowed = {"pyproject.toml", *FOLDERS, "tests", "README.md", "LICENSE", ".ci", ".gitignore"}
    assert top <= allowed


def test_no_file_names_a_machine_or_a_registry() -> None:
    import subprocess

    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    forbidden = ("/opt/" + "wheels", "/work/" + "main", "/root" + "/")
    for line in tracked.splitlines():
        path = ROOT / line
        if path.suffix in (".py", ".toml", ".md", ".json", "") and path.is_file():
            text = path.read_text(errors="ignore")
            assert not [word for word in forbidden if word in text], line
    assert "uv.lock" not in tracked.split()
