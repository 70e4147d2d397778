"""The shape of the repository: which room may know which, what code may not do, what the wheel holds."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignkit import shipped
from alignkit.errors import AlignkitError

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "alignkit"
SOURCES = sorted(PACKAGE.rglob("*.py"))

BASE = {"errors", "types", "shipped"}
MATHS = BASE | {"flow", "objectives"}
MIDDLE = {"policy", "rewards", "data"}
TOP = {"training", "inference", "evaluation"}

MAY_KNOW = {
    "errors": set(),
    "types": {"errors"},
    "shipped": {"errors"},
    "flow": BASE,
    "objectives": BASE | {"flow"},
    "policy": MATHS | {"data"},
    "rewards": MATHS | {"data"},
    "data": MATHS,
    "training": MATHS | MIDDLE | TOP,
    "inference": MATHS | MIDDLE | TOP,
    "evaluation": MATHS | MIDDLE | TOP,
}
EVERYTHING = {"cli", "__main__", "__init__"}
"""What users enter through: these may know everything, and nothing may know them."""

HEAVY = ("torch", "numpy", "diffusers", "transformers", "peft", "accelerate", "matplotlib", "onnxruntime")
AVOIDED_FILES = {"utils", "util", "common", "helpers", "helper", "misc", "base_trainer"}
AVOIDED_CLASS = re.compile(r"(Manager|Processor|Handler|Wrapper)$")
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
MACHINE_PATH = re.compile(r"(?<![\w./:])/(home|root|Users|work|workspace|scratch|mnt)/\w")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".json", ".jsonl", ".txt", ".csv", ".yaml", ".cff", ".html", ""}


def room(file: Path) -> str:
    """`alignkit/flow/path.py` and `alignkit/errors.py` belong to the rooms `flow` and `errors`."""
    first = file.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(file: Path) -> Iterator[str]:
    """Absolute names of all modules a file imports, inside functions and `TYPE_CHECKING` too."""
    parents = ["alignkit", *file.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield base
            if base == "alignkit":
                yield from (f"alignkit.{alias.name}" for alias in node.names)


def known_rooms(file: Path) -> set[str]:
    """The other rooms that a file imports from."""
    names = (name.split(".") for name in imports(file))
    rooms = {parts[1] for parts in names if parts[0] == "alignkit" and len(parts) > 1}
    existing = {room(source) for source in SOURCES}
    return (rooms & existing) - {room(file)}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_imports_only_the_rooms_below_its_own(file: Path) -> None:
    if room(file) in EVERYTHING:
        return
    assert room(file) in MAY_KNOW, f"{room(file)} is a new room: say in this test what it may know"
    assert known_rooms(file) <= MAY_KNOW[room(file)]


def test_no_two_rooms_import_each_other() -> None:
    knows: dict[str, set[str]] = {}
    for file in SOURCES:
        if room(file) not in EVERYTHING:
            knows.setdefault(room(file), set()).update(known_rooms(file))
    pairs = {tuple(sorted((a, b))) for a, others in knows.items() for b in others if a in knows.get(b, ())}
    assert not pairs


@pytest.mark.parametrize("name", ["flow", "objectives"])
def test_the_mathematics_knows_only_torch_and_einops(name: str) -> None:
    files = [file for file in SOURCES if room(file) == name]
    outside = {top.split(".")[0] for file in files for top in imports(file)}
    assert outside - set(sys.stdlib_module_names) - {"alignkit"} <= {"torch", "einops"}


def test_only_training_imports_accelerate() -> None:
    users = {room(file) for file in SOURCES for name in imports(file) if name.split(".")[0] == "accelerate"}
    assert users <= {"training"}


def modules_after(code: str) -> set[str]:
    """Top-level names of the modules loaded in a fresh interpreter after `code`."""
    code = f"import sys\n{code}\nprint('MODULES', *{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.rpartition("MODULES")[2].split())


def test_import_alignkit_loads_no_heavy_library() -> None:
    assert not modules_after("import alignkit") & set(HEAVY)


def test_the_help_of_the_command_line_loads_no_heavy_library() -> None:
    code = "from alignkit.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    assert not modules_after(code) & set(HEAVY)


def test_no_file_or_class_has_a_name_that_says_nothing() -> None:
    named = [file for file in [*SOURCES, *(ROOT / "recipes").rglob("*.py")] if file.stem in AVOIDED_FILES]
    assert not named
    classes = [
        node.name
        for file in SOURCES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and AVOIDED_CLASS.search(node.name)
    ]
    assert not classes


def dangers(source: str) -> list[str]:
    """Ways in which `source` could execute data: unpickling, evaluating text, handing text to a shell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
            found += [name] if name in {"eval", "exec", "os.system", "yaml.load"} else []
            found += ["torch.load"] if name == "torch.load" and keywords.get("weights_only") != "True" else []
            found += ["shell=True"] if keywords.get("shell") == "True" else []
            found += ["allow_pickle"] if keywords.get("allow_pickle") == "True" else []
            found += ["trust_remote_code"] if keywords.get("trust_remote_code") == "True" else []
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_code_executes_data(file: Path) -> None:
    assert not dangers(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "eval(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "subprocess.run(line, shell=True)",
        "numpy.load(path, allow_pickle=True)",
    ],
)
def test_code_that_executes_data_is_recognised(source: str) -> None:
    assert dangers(source)


def test_putting_a_module_in_evaluation_mode_is_not_mistaken_for_evaluating_text() -> None:
    assert not dangers("model.eval()\ntorch.load(path, weights_only=True)")


def written_files() -> list[Path]:
    """Text files of the repository: what git tracks, or in a tree without git, the folders that ship."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode == 0:
        files = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        files = [file for name in ("alignkit", "recipes", "tests") for file in (ROOT / name).rglob("*")]
    return [file for file in files if file.suffix in TEXT_SUFFIXES and file.is_file()]


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    found = {}
    for file in written_files():
        text = file.read_text(encoding="utf-8", errors="replace")
        if file != Path(__file__) and (match := MACHINE_PATH.search(text)):
            found[str(file.relative_to(ROOT))] = text[match.start() : match.start() + 60]
    assert not found


def test_shipped_files_are_found_in_the_checkout_and_in_a_wheel(tmp_path: Path) -> None:
    assert shipped.path("recipes") == ROOT / "recipes"
    inside = tmp_path / "alignkit" / "_shipped" / "recipes"
    inside.mkdir(parents=True)
    assert shipped.path("recipes", package=tmp_path / "alignkit") == inside


def test_a_shipped_file_that_is_missing_is_named() -> None:
    with pytest.raises(AlignkitError, match="assets/nothing does not ship"):
        shipped.path("assets", "nothing")
    with pytest.raises(AlignkitError, match="inside recipes"):
        shipped.path("..", "secrets")


def test_the_wheel_contains_recipes_and_assets(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    run = subprocess.run(build, capture_output=True, text=True, timeout=110)
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("recipes", "assets"):
        files = [file for file in (ROOT / folder).rglob("*") if file.is_file() and file.suffix != ".pyc"]
        expected = {f"alignkit/_shipped/{file.relative_to(ROOT).as_posix()}" for file in files}
        assert expected and expected <= names
    assert "alignkit/shipped.py" in names
    assert not any(name.startswith(("tests/", "recipes/", "assets/")) for name in names)
