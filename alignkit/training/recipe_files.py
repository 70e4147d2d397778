"""Recipes as files: found by name, path or run directory, and written down so that a run can be repeated."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rapidfuzz import process

from alignkit import shipped
from alignkit.errors import CheckpointError, RecipeError
from alignkit.flow.transition import Noise
from alignkit.inference.comparison import Arm, Comparison
from alignkit.policy.adapters import Full, LoRA
from alignkit.policy.memory import Decode
from alignkit.rewards import load_file
from alignkit.rewards.loading import split_options, with_options
from alignkit.training.adversary import Critic
from alignkit.training.follow import Follow
from alignkit.training.matching import Levels
from alignkit.training.recipe import Recipe
from alignkit.training.reward_model import RewardModel
from alignkit.training.shaped import Shaped
from alignkit.training.steered import Steered

AnyRecipe = Recipe | RewardModel | Comparison
TRAINERS = {
    "GRPO": "grpo",
    "Euphonium": "euphonium",
    "DPO": "dpo",
    "KTO": "kto",
    "DGPO": "dgpo",
    "SFT": "rwr",
    "RWR": "rwr",
    "ORW": "rwr",
    "ADRPO": "rwr",
    "NFT": "nft",
    "AWM": "awm",
    "CRD": "crd",
    "Regional": "regional",
    "ValueGradient": "value_gradient",
    "InstructVideo": "instruct_video",
    "RewardModel": "reward_model",
    "Comparison": "recipe_files",
}
"""Names of what recipes return, and the module of this package each is found in."""
NESTED: dict[str, type] = {
    "LoRA": LoRA,
    "Full": Full,
    "Noise": Noise,
    "Follow": Follow,
    "Levels": Levels,
    "Critic": Critic,
    "Decode": Decode,
    "Arm": Arm,
}


def trainer(name: str, base: Any = None) -> type | None:
    """The class of a recipe, or of a value nested in one, by its name; `base` may be of a class of the user's own."""
    if name in NESTED:
        return NESTED[name]
    if type(base).__name__ == name:
        return type(base)
    if name not in TRAINERS:
        return None
    return vars(importlib.import_module(f"alignkit.training.{TRAINERS[name]}"))[name]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a recipe came from: a Python file and a function in it."""

    file: Path
    function: str = "recipe"

    @property
    def name(self) -> str:
        """`quickstart`, or `quickstart-hacking` for a variant."""
        stem = self.file.parent.name if self.file.stem == "recipe" else self.file.stem
        return stem if self.function == "recipe" else f"{stem}-{self.function}"


def find(spec: str) -> Source:
    """The file and function that `NAME`, `path/x.py`, `path/x.py:variant` or `NAME:variant` means.

    Raises:
        RecipeError: there is no such recipe; names the nearest shipped one.
    """
    place, _, function = spec.rpartition(":") if ":" in spec[2:] else (spec, "", "")
    file = Path(place)
    if file.suffix == ".py":
        if not file.is_file():
            raise RecipeError(f"there is no recipe file {file} (looked from {Path.cwd()})")
        return Source(file.resolve(), function or "recipe")
    known = {f.stem: f for f in sorted(shipped.path("recipes").glob("*.py"))}
    if place not in known:
        near = process.extractOne(place, list(known))
        hint = f"; nearest: {near[0]!r}" if near else ""
        raise RecipeError(
            f"there is no recipe {place!r}{hint}; shipped recipes: {', '.join(known)}, or give a .py file"
        )
    return Source(known[place], function or "recipe")


def load(source: Source) -> AnyRecipe:
    """Run the recipe's function.

    Raises:
        RecipeError: the file has no such function, or it returns something else than a recipe.
    """
    module = load_file(source.file)
    functions = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
    if source.function not in functions:
        raise RecipeError(f"{source.file.name} has no function {source.function!r}; it has {', '.join(functions)}")
    made = vars(module)[source.function]()
    if not isinstance(made, AnyRecipe):
        raise RecipeError(
            f"{source.file.name}:{source.function} returned {type(made).__name__}; expected one of "
            f"{', '.join(TRAINERS)}"
        )
    return made


def encode(value: Any) -> Any:
    """A recipe's value as JSON; callables by name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: encode(v) for key, v in value.items()}
        return {"pairs": [[encode(key), encode(v)] for key, v in value.items()]}
    if isinstance(value, list | tuple):
        return [encode(v) for v in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if callable(value):
        return {"callable": _name(value)}
    raise RecipeError(f"a recipe cannot hold {type(value).__name__} {value!r}; use numbers, text, or rewards")


def _name(value: Callable[..., Any]) -> str:
    own = vars(value)
    return str(own.get("name", own.get("__name__", type(value).__name__)))


def decode(record: Any, base: Any) -> Any:
    """The inverse of `encode`; callables are those of the same name in `base`, what the recipe file made."""
    kind = trainer(record["class"], base) if isinstance(record, dict) and "class" in record else None
    if isinstance(record, dict) and kind is not None:
        known = {f.name: f for f in dataclasses.fields(kind)}
        unknown = sorted(set(record) - set(known) - {"class"})
        if unknown:
            near = process.extractOne(unknown[0], list(known))
            raise RecipeError(
                f"recipe.json: {record['class']} has no field {unknown[0]!r}; nearest: {near[0] if near else ''!r}"
            )
        same = type(base) is kind
        values = {n: decode(v, getattr(base, n) if same else None) for n, v in record.items() if n != "class"}
        return kind(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})
    if isinstance(record, dict) and set(record) == {"pairs"}:
        keys = list(base) if isinstance(base, Mapping) else []
        return {_callable(k, keys): decode(v, None) for k, v in record["pairs"]}
    if isinstance(record, dict) and set(record) == {"callable"}:
        return _callable(record, [base])
    if isinstance(record, dict):
        return {k: decode(v, base.get(k) if isinstance(base, Mapping) else None) for k, v in record.items()}
    if isinstance(record, list):
        keys = list(base) if isinstance(base, list | tuple) else []
        return [_callable(v, keys) for v in record]
    return record


def _callable(record: Any, candidates: list[Any]) -> Any:
    if not (isinstance(record, dict) and set(record) == {"callable"}):
        return decode(record, None)
    for candidate in candidates:
        if callable(candidate) and encode(candidate) == record:
            return candidate
    raise RecipeError(f"recipe.json names the function {record['callable']!r}, which its recipe file does not give")


def save(folder: Path, recipe: AnyRecipe, source: Source | None) -> None:
    """Write `recipe.json` and copies of the recipe and of the files that it names into a run directory."""
    code = folder / "code"
    code.mkdir(exist_ok=True)
    files: dict[str, str] = {}
    record: dict[str, Any] = {"recipe": encode(recipe)}
    if source is not None:
        files[source.file.name] = _copy(source.file, code)
        record["source"] = {"file": source.file.name, "function": source.function}
    for place in (place for spec in _specs(recipe) for place in _places(spec)):
        file = Path(shipped.resolved(place.rpartition(":")[0]))
        files[file.name] = _copy(file, code)
    record["files"] = files
    (folder / "recipe.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


def _specs(recipe: AnyRecipe) -> tuple[str, ...]:
    """Whatever in a recipe may name a file."""
    if isinstance(recipe, RewardModel | Comparison):
        return recipe.specs
    own = [*recipe.rewards, *recipe.judges]
    own += [recipe.diversity_shaping] if isinstance(recipe, Shaped) else []
    own += recipe.guide if isinstance(recipe, Steered) else []
    return tuple(spec for spec in own if isinstance(spec, str))


def _places(spec: str) -> Iterator[str]:
    """Every `file.py:name` of a spec, those in its options too."""
    place, options = split_options(spec)
    if ".py:" in place:
        yield place
    for value in options.values():
        if isinstance(value, str) and ".py:" in value:
            yield from _places(value)


def _copy(file: Path, folder: Path) -> str:
    if not file.is_file():
        raise RecipeError(f"there is no file {file} (looked from {Path.cwd()})")
    shutil.copyfile(file, folder / file.name)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def reload(folder: Path) -> tuple[AnyRecipe, Source | None]:
    """The recipe of a run directory, with the copied files in place of the originals.

    Raises:
        CheckpointError: no readable recipe.json, or a copy that was changed.
    """
    try:
        record = json.loads((folder / "recipe.json").read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no readable recipe.json ({error}); is it a run directory?") from error
    for name, digest in record["files"].items():
        if hashlib.sha256((folder / "code" / name).read_bytes()).hexdigest() != digest:
            raise CheckpointError(f"{folder / 'code' / name} was changed since the run began; start a new run with it")
    entry = record.get("source")
    source = Source(folder / "code" / entry["file"], entry["function"]) if entry else None
    recipe = decode(record["recipe"], load(source) if source else None)
    local = {name: folder / "code" / name for name in record["files"]}
    if isinstance(recipe, RewardModel):
        model, data, loss = (_local(spec, local) for spec in (recipe.model, recipe.data, recipe.loss))
        return dataclasses.replace(recipe, model=model, data=data, loss=loss), source
    if isinstance(recipe, Comparison):
        return recipe.with_specs(lambda spec: _local(spec, local)), source
    rewards = {_local(spec, local): weight for spec, weight in recipe.rewards.items()}
    fields: dict[str, Any] = {"rewards": rewards, "judges": tuple(_local(s, local) for s in recipe.judges)}
    if isinstance(recipe, Shaped):
        fields["diversity_shaping"] = _local(recipe.diversity_shaping, local)
    if isinstance(recipe, Steered):
        fields["guide"] = {_local(spec, local): weight for spec, weight in recipe.guide.items()}
    return dataclasses.replace(recipe, **fields), source


def _local(spec: Any, files: Mapping[str, Path]) -> Any:
    if not isinstance(spec, str) or ".py:" not in spec:
        return spec
    place, options = split_options(spec)
    if ".py:" in place:
        file, _, name = place.rpartition(":")
        place = f"{files[Path(file).name]}:{name}"
    return with_options(place, {name: _local(value, files) for name, value in options.items()})


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [k for k, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError(f"a key stands twice: {sorted(k for k in keys if keys.count(k) > 1)[0]!r}")
    return dict(pairs)
