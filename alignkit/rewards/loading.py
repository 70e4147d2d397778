"""From a name, a module or a file to a reward, and from a reward to the record that names it."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from rapidfuzz import process

from alignkit import shipped
from alignkit.errors import RecipeError, RewardError
from alignkit.rewards.base import Reward
from alignkit.rewards.card import HasTiny, HasWeights
from alignkit.rewards.functions import FunctionReward, NoiseAwareFunction, as_reward
from alignkit.rewards.table import TABLE
from alignkit.rewards.weights import present

_FILE_MODULE = "alignkit_file_"


@runtime_checkable
class DescribesItself(Protocol):
    """A reward that has more to record than its name: engine, version, options."""

    def describe(self) -> dict[str, Any]: ...


def load(spec: str | Callable[..., Any], **options: Any) -> Reward:
    """The reward that `spec` names.

    Args:
        spec: a name of `TABLE`; `package.module:Name`; `path/file.py:name` or `shipped:recipes/file.py:name`, which
            run the file; each also with options, `name(option="value", other=2)`; or a callable.
        options: arguments of the class that is named; they come after those in `spec`.

    Raises:
        RecipeError: nothing is there (names the nearest), or it cannot be made with these options.
    """
    return as_reward(made(spec, **options))


def made(spec: str | Callable[..., Any], **options: Any) -> Any:
    """What `spec` names, made with its options, whether it is a reward, a judge that compares, or something else."""
    target: Any = spec
    if isinstance(spec, str):
        place, written = split_options(spec)
        target, options = find(place), {**written, **options}
    if inspect.isclass(target):
        target = _make(spec, target, options)
    elif options:
        raise RecipeError(
            f"reward {spec!r} is no class and takes no options, given {', '.join(options)}; "
            "make it a class whose __init__ takes them"
        )
    return target


def split_options(spec: str) -> tuple[str, dict[str, Any]]:
    """`'dino(patches=True)'` as the spec and the options written behind it, which are Python literals.

    Raises:
        RecipeError: what stands in the parentheses cannot be read.
    """
    if not spec.endswith(")"):
        return spec, {}
    place, _, written = spec.partition("(")
    try:
        call = ast.parse(f"options({written}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("options are given by name")
        return place, {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (ValueError, SyntaxError) as error:
        raise RecipeError(
            f'reward {spec!r}: {error}; write options as Python literals by name, such as {place}(weights="folder")'
        ) from error


def split_specs(text: str) -> list[str]:
    """`'ocr,dino(a=1,b=2)'` as its specs; commas inside parentheses and quotes do not separate."""
    found, depth, quote, start = [], 0, "", 0
    for index, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "()":
            depth += 1 if character == "(" else -1
        elif character == "," and depth == 0:
            found.append(text[start:index])
            start = index + 1
    return [spec.strip() for spec in (*found, text[start:]) if spec.strip()]


def with_options(spec: str, options: Mapping[str, Any]) -> str:
    """`spec` with these options set, in the text form that `split_options` reads."""
    place, written = split_options(spec)
    both = {**written, **options}
    return f"{place}({', '.join(f'{name}={value!r}' for name, value in both.items())})" if both else place


def _make(spec: Any, target: type, options: dict[str, Any]) -> Any:
    try:
        inspect.signature(target).bind(**options)
    except TypeError as error:
        raise RecipeError(
            f"reward {spec!r} cannot be made with {options}: {error}; it takes "
            f"{target.__name__}{inspect.signature(target)}"
        ) from error
    return target(**options)


def find(spec: str) -> Any:
    """The object behind a spec, before it is made a reward. Raises RecipeError where there is none."""
    place, colon, name = TABLE.get(spec, spec).rpartition(":")
    if not colon:
        if spec.endswith(".py"):
            raise RecipeError(f"reward {spec!r} names a file but nothing in it; write {spec}:name")
        raise RecipeError(
            f"there is no reward {spec!r}{_nearest(spec, list(TABLE))}; or give "
            f"'package.module:Name' or 'path/file.py:name'. Known: {', '.join(TABLE)}"
        )
    module = load_file(Path(shipped.resolved(place))) if place.endswith(".py") else _import(spec, place)
    if name not in vars(module):
        own = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise RecipeError(f"reward {spec!r}: {place} has no {name!r}{_nearest(name, own)}")
    return vars(module)[name]


def _nearest(name: str, known: list[str]) -> str:
    best = process.extractOne(name, known, score_cutoff=60)
    return f"; did you mean {best[0]!r}?" if best else ""


def _import(spec: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = error.name or module
        raise RecipeError(
            f"reward {spec!r} cannot be imported, {missing} is missing: {error}. Install it, "
            "or for a file of yours write path/file.py:name"
        ) from error


def load_file(path: Path) -> ModuleType:
    """Run a Python file and return it as a module; the same content of the same file is run once.

    Raises:
        RecipeError: there is no such file, or it raises while it runs.
    """
    if not path.is_file():
        raise RecipeError(f"there is no file {path} (looked from {Path.cwd()})")
    digest = hashlib.sha256(str(path.resolve()).encode() + path.read_bytes()).hexdigest()
    name = f"{_FILE_MODULE}{path.stem}_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    specification = importlib.util.spec_from_file_location(name, path.resolve())
    if specification is None or specification.loader is None:
        raise RecipeError(f"{path} cannot be loaded as a Python file")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses and pickle look their module up by name
    try:
        specification.loader.exec_module(module)
    except Exception as error:  # a user's file may raise anything
        del sys.modules[name]
        raise RecipeError(f"{path} fails while it runs: {type(error).__name__}: {error}") from error
    return module


def describe(reward: Reward) -> dict[str, Any]:
    """A JSON record of a reward: name, kind, spec, what it says of itself, and the hash of a user's file."""
    code = reward.function if isinstance(reward, FunctionReward | NoiseAwareFunction) else reward
    owner = code if inspect.isroutine(code) or inspect.isclass(code) else type(code)
    record: dict[str, Any] = {
        "name": reward.name,
        "kind": reward.kind,
        "differentiable": reward.differentiable,
        "spec": f"{owner.__module__}:{owner.__qualname__}",
    }
    if dataclasses.is_dataclass(reward) and not isinstance(reward, FunctionReward | NoiseAwareFunction):
        options = {field.name: getattr(reward, field.name) for field in dataclasses.fields(reward) if field.init}
        plain = str | int | float | bool | tuple | None
        record["options"] = {n: v for n, v in options.items() if n != "name" and isinstance(v, plain)}
    if owner.__module__.split(".")[0] != "alignkit":
        record.update(_source(owner, record["spec"]))
    if isinstance(reward, DescribesItself):
        record.update(reward.describe())
    return record


def _source(owner: Any, spec: str) -> dict[str, str]:
    module = sys.modules.get(owner.__module__)
    found = None if module is None else vars(module).get("__file__")
    if found is None or not Path(found).is_file():
        return {"file": "", "sha256": ""}  # typed into an interpreter, or written in C
    digest = hashlib.sha256(Path(found).read_bytes()).hexdigest()
    if owner.__module__.startswith(_FILE_MODULE):
        spec = f"{found}:{owner.__qualname__}"
    return {"spec": spec, "file": str(found), "sha256": digest}


def tiny(spec: Any, folder: Path) -> Any:
    """The same reward with tiny random weights in place of those that the hub has; others as they are.

    Options that name a reward of the table, such as the judge of a win rate, are treated alike.

    Args:
        folder: where weights are written, one folder per reward.
    """
    if not isinstance(spec, str):
        remote = isinstance(spec, HasWeights) and _on_hub(spec)
        if remote and isinstance(spec, HasTiny) and dataclasses.is_dataclass(spec):
            return dataclasses.replace(spec, **type(spec).tiny(_fresh(folder, type(spec).__name__)))
        return spec
    place, options = split_options(spec)
    target = find(place)
    if not (inspect.isclass(target) and dataclasses.is_dataclass(target)):
        return spec
    values = {f.name: options.get(f.name, f.default) for f in dataclasses.fields(target)}
    named = {n: v for n, v in values.items() if isinstance(v, str) and n != "name"}
    nested = {n: v for n, v in named.items() if split_options(v)[0] in TABLE}
    changed = {name: str(tiny(value, folder)) for name, value in nested.items()}
    if issubclass(target, HasTiny) and _on_hub(load(spec)):
        changed = {**target.tiny(_fresh(folder, target.__name__)), **changed}
    return with_options(spec, changed) if changed else spec


def _on_hub(reward: Any) -> bool:
    return isinstance(reward, HasWeights) and any(files.local is None for files in reward.files())


def _fresh(folder: Path, name: str) -> Path:
    taken = sum(1 for one in folder.glob(f"{name}*")) if folder.is_dir() else 0
    made = folder / (f"{name}-{taken + 1}" if taken else name)
    made.mkdir(parents=True)
    return made


def status() -> dict[str, str]:
    """For every name of `TABLE`: "ready", or why it cannot be used here and now. No weights are read."""
    required = {name: _required(name) for name in TABLE}
    return {n: f"needs {', '.join(r)}" if r else unavailable(n) or "ready" for n, r in required.items()}


def unavailable(spec: str | Callable[..., Any]) -> str:
    """Why a reward cannot be used on this machine now; "" where it can. No weights are read.

    Raises:
        RecipeError: it is none, or its options are wrong.
    """
    try:
        reward = load(spec)
    except RewardError as error:  # a program that is not installed
        return str(error)
    files = reward.files() if isinstance(reward, HasWeights) else ()
    missing = dict.fromkeys(one.source for one in files if not present(one))
    fetch = split_options(spec)[0] if isinstance(spec, str) else "RECIPE"
    return f"not here: {', '.join(missing)}; `alignkit fetch {fetch}`" if missing else ""


def _required(name: str) -> list[str]:
    """Options without a default."""
    return [p.name for p in inspect.signature(find(name)).parameters.values() if p.default is p.empty]
