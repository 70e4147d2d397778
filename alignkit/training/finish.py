"""Before and after: the base, the base with guidance, the aligned model; samples, summary, adapters, report."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from PIL import Image

from alignkit.errors import PolicyError
from alignkit.evaluation import clips
from alignkit.evaluation.diversity import Diversity, comparison, within_groups
from alignkit.evaluation.monitors import DISTANCES
from alignkit.evaluation.report import write_report
from alignkit.inference.sampling import Sample, contact_sheet
from alignkit.policy import LoRA
from alignkit.policy.lora_files import save_lora
from alignkit.rewards import Weighted
from alignkit.rewards.pixels import to_uint8
from alignkit.training.assess import Assessment

if TYPE_CHECKING:
    from alignkit.training.run import Run


@runtime_checkable
class Reads(Protocol):
    """A reward that can say what it sees."""

    def read(self, media: torch.Tensor) -> list[str]: ...


def readers(judges: Weighted) -> dict[str, Reads]:
    """The rewards and judges that read."""
    # A judge has an option of that name, which is a text.
    return {n: r for n, r in judges.rewards.items() if isinstance(r, Reads) and callable(r.read)}


def measures(assessment: Assessment, judges: Weighted) -> dict[str, float]:
    """Mean of every reward and judge; for readers with graded scores also the share of exact ones."""
    found = assessment.means()
    for name in readers(judges):
        scores = assessment.scores.parts[name]
        if bool(((scores > 0) & (scores < 1)).any()):
            found[f"{name}_exact"] = float((scores >= 1).double().mean())
    return found


def baseline(run: Run) -> dict[str, Any]:
    """The base: with our solver, with the pipeline's own scheduler, and with guidance switched on."""
    recipe, call, began = run.recipe, dict(run.recipe.call), time.monotonic()
    with run.policy.reference():
        plain = run.assess(run.held_out, call)
        own = run.assess(run.held_out, call, own_scheduler=True)
        record: dict[str, Any] = {"ours": measures(plain, run.judges), "own_scheduler": measures(own, run.judges)}
        write_samples(run, "base", "the pipeline as it was", plain)
        if recipe.guidance_baseline:
            guided = run.assess(run.held_out, {**call, **recipe.guidance_baseline}, guided=True)
            words = ", ".join(f"{k}={v}" for k, v in recipe.guidance_baseline.items())
            write_samples(run, "guidance", f"no training, only {words}", guided)
            record["guidance"] = measures(guided, run.judges)
        record["diversity"] = diversity(run)
        record["distances"] = run.distances()
    record["seconds"] = time.monotonic() - began
    return record


def diversity(run: Run) -> dict[str, Any]:
    """How much samples of one prompt differ, all of them and those that the rewards find right."""
    recipe = run.recipe
    if not recipe.diversity_prompts or recipe.diversity_samples < 2:
        return {}
    prompts = [p for p in run.held_out[: recipe.diversity_prompts] for _ in range(recipe.diversity_samples)]
    found = run.assess(prompts, dict(recipe.call))
    if found.media is None:
        return {}
    ids = {prompt: number for number, prompt in enumerate(dict.fromkeys(p.id for p in found.prompts))}
    groups = torch.tensor([ids[p.id] for p in found.prompts])
    right = right_samples(run.judges, found)
    return {
        "all": asdict(within_groups(found.media, groups)),
        "right": asdict(within_groups(found.media, groups, right)),
    }


def right_samples(judges: Weighted, assessment: Assessment) -> torch.Tensor:
    """(N,) bool: every trained reward that reads gives its full score."""
    trained = [n for n in readers(judges) if judges.weights[n] != 0]
    right = torch.ones(len(assessment.prompts), dtype=torch.bool)
    for name in trained:
        right &= assessment.scores.parts[name].cpu() >= 1
    return right


def write_samples(run: Run, name: str, note: str, assessment: Assessment) -> None:
    """The first samples of an assessment with what each reader read; the same prompts and seeds for every grid.

    Clips are enlarged to be seen, and stand on a sheet of frames too.
    """
    if assessment.media is None:
        return
    count = min(run.recipe.sample_prompts, len(assessment.prompts))
    media, right = assessment.media[:count], right_samples(run.judges, assessment)
    texts = {reader: reward.read(media) for reader, reward in readers(run.judges).items()}
    prompts = [str(prompt) for prompt in assessment.prompts[:count]]
    folder = run.directory.samples / name
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for i, (prompt, one) in enumerate(zip(prompts, media, strict=True)):
        file, scale = _written(folder / f"{i:02d}", one)
        pictures.append(
            {
                "file": f"{name}/{file.name}",
                "scale": scale,
                "prompt": prompt,
                "reads": {reader: read[i] for reader, read in texts.items()},
                "right": bool(right[i]) if texts else None,
            }
        )
    titles = {"base": "base", "guidance": "base with guidance", "aligned": "aligned"}
    grid: dict[str, Any] = {"title": titles[name], "note": note, "images": pictures}
    if media.ndim == 5:
        shown = [Sample(prompt, run.recipe.seed, one) for prompt, one in zip(prompts, media, strict=True)]
        sheet = clips.write_sheet(folder / "sheet", contact_sheet(shown, captions=[""] * count))
        grid["sheet"] = f"{name}/{sheet.name}"
    _index(run.directory.samples, grid)


def _written(stem: Path, media: torch.Tensor) -> tuple[Path, int]:
    """The file of one sample (3, H, W) or (T, 3, H, W), and how many times it is enlarged there."""
    if media.ndim == 4:
        scale = clips.enlargement(media)
        return clips.write_clip(stem, media, clips.playback_rate(len(media)), scale), scale
    file = stem.with_name(f"{stem.name}.png")
    Image.fromarray(to_uint8(media[None])[0]).save(file)
    return file, 1


def _index(folder: Path, grid: dict[str, Any]) -> None:
    file = folder / "index.json"
    grids = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    order = ["base", "base with guidance", "aligned"]
    kept = [g for g in grids if g["title"] != grid["title"]] + [grid]
    file.write_text(json.dumps(sorted(kept, key=lambda g: order.index(g["title"])), indent=1), encoding="utf-8")


@contextmanager
def final_weights(run: Run) -> Iterator[None]:
    """The weights that are handed over: the moving average where the recipe keeps one."""
    if run.recipe.ema_decay is None:
        yield
        return
    with run.policy.ema():
        yield


def write(run: Run) -> None:
    """Assess the aligned model; write adapters (loaded back before they count as saved), summary and report."""
    began, call, before = time.monotonic(), dict(run.recipe.call), run.state.baseline
    with final_weights(run):
        ours = run.assess(run.held_out, call)
        own = measures(run.assess(run.held_out, call, own_scheduler=True), run.judges)
        after, distances = diversity(run), run.distances()
    write_samples(run, "aligned", f"after {run.state.step} rounds", ours)
    found = measures(ours, run.judges)
    trained = [n for n in found if run.judges.weights.get(n.removesuffix("_exact"), 0.0) != 0.0]
    critics = run.adversary.critics if run.adversary is not None else {}  # another critic scored the base: no change
    both = {n: {"before": None if n in critics else before["ours"].get(n), "after": v} for n, v in found.items()}
    summary = {
        "recipe": type(run.recipe).__name__,
        "seed": run.recipe.seed,
        "wall_seconds": before["seconds"] + run.state.trained_seconds + time.monotonic() - began,
        "train_seconds": run.state.trained_seconds,
        "steps": run.state.step,
        "held_out_prompts": len(run.held_out),
        "rewards": {n: v for n, v in both.items() if n in trained},
        "judges": {n: v for n, v in both.items() if n not in trained},
        "own_scheduler": {
            n: {"before": None if n in critics else before["own_scheduler"].get(n), "after": v} for n, v in own.items()
        },
        "baselines": {"guidance": before["guidance"]} if "guidance" in before else {},
        "diversity": _change(before["diversity"], after, "all"),
        "diversity_right": _change(before["diversity"], after, "right"),
        "distances": {n: {"before": before["distances"].get(n), "after": v} for n, v in distances.items()},
        "reward_settings": run.judges.describe(),
    }
    run.directory.write_json("summary.json", summary)
    report = write_report(run.directory.folder)
    if isinstance(run.recipe.train, LoRA):
        hand_over(run)
    for name, change in {**summary["rewards"], **summary["judges"]}.items():
        run.display.say(f"{name}: {_number(change['before'])} -> {_number(change['after'])}")
    for name, value in distances.items():
        run.display.say(f"{DISTANCES[f'heldout/{name}']}: {_number(before['distances'].get(name))} -> {value:.3f}")
    run.display.say(f"report: {report}")


def hand_over(run: Run) -> None:
    """Write `lora/` and say that it was loaded back; a pipeline class that loads no adapters keeps its checkpoint."""
    try:
        save_lora(run.policy, run.directory.lora, ema=run.recipe.ema_decay is not None)
        run.display.say(f"adapters saved and loaded back: {run.directory.lora}")
    except PolicyError as error:
        run.display.say(f"no lora/ was written: {error}. The trained weights are in {run.directory.checkpoints}")


def _change(before: dict[str, Any], after: dict[str, Any], which: str) -> dict[str, Any]:
    if not before or not after:
        return {"before": None, "after": None, "parts": {}}
    return comparison(Diversity(**before[which]), Diversity(**after[which]))


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
