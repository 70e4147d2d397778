"""Preferences of any format as a folder that stands alone: `pairs.jsonl` or `samples.jsonl`, and the media."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from alignkit.data.preferences import Found, Pair, ScoredSample
from alignkit.data.stored import Embedded, Medium
from alignkit.errors import DataError
from alignkit.types import Prompt


def write_rows(found: Found, out: Path) -> Path:
    """Copy the media as they are, byte for byte, and write the rows; returns the file.

    Raises:
        DataError: the folder has preferences or their media already, or a picture inside a table is none.
    """
    pairs = isinstance(found.rows[0], Pair)
    file = out / ("pairs.jsonl" if pairs else "samples.jsonl")
    _refuse_used(found, out)
    (out / "media").mkdir(parents=True, exist_ok=True)
    media: dict[Medium, str] = {}
    lines = [json.dumps(_pair(row, out, media) if pairs else _sample(row, out, media)) for row in found.rows]
    aside = file.with_name(f"{file.name}.tmp")
    aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    aside.replace(file)
    return file


def _refuse_used(found: Found, out: Path) -> None:
    """What is there stays as it is: names of copies count from 0, and would replace pictures of the same number."""
    for name in ("pairs.jsonl", "samples.jsonl", "settings.json"):
        if (out / name).exists():
            raise DataError(f"{out / name} is there already; choose another folder")
    own = {(out / name).resolve() for name in ("media", "inputs")}
    for row in found.rows:
        for medium in (row.chosen, row.rejected) if isinstance(row, Pair) else (row.medium,):
            if isinstance(medium, Path) and own & set(medium.resolve().parents):
                raise DataError(f"{row.where}: copies into {out} could replace {medium}; choose another folder")


def _pair(row: Pair, out: Path, media: dict[Medium, str]) -> dict[str, Any]:
    return {
        **_prompt(row.prompt, out),
        "chosen": _copied(row.chosen, out, media),
        "rejected": _copied(row.rejected, out, media),
        "kind": row.kind,
        "source": row.source,
        "weight": row.weight,
        **({} if row.margin is None else {"margin": row.margin}),
        **({"chosen_rewards": dict(row.chosen_rewards)} if row.chosen_rewards else {}),
        **({"rejected_rewards": dict(row.rejected_rewards)} if row.rejected_rewards else {}),
        **({"chosen_facts": dict(row.chosen_facts)} if row.chosen_facts else {}),
        **({"rejected_facts": dict(row.rejected_facts)} if row.rejected_facts else {}),
    }


def _sample(row: ScoredSample, out: Path, media: dict[Medium, str]) -> dict[str, Any]:
    own = _prompt(row.prompt, out)
    return {
        **own,
        "sample" if row.kind in own else row.kind: _copied(row.medium, out, media),
        "source": row.source,
        **({} if row.reward is None else {"reward": row.reward}),
        **({} if row.label is None else {"label": row.label}),
        **({"rewards": dict(row.rewards)} if row.rewards else {}),
    }


def _prompt(prompt: Prompt, out: Path) -> dict[str, Any]:
    return {"prompt": str(prompt), "prompt_id": prompt.id, **portable_columns(prompt, out)}


def portable_columns(prompt: Prompt, out: Path) -> dict[str, Any]:
    """A prompt's columns as JSON; the files that they name are copied to `inputs`, so that the folder stands alone."""

    def own(place: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [own(f"{place}-{i}", one) for i, one in enumerate(value)]
        if not isinstance(value, Path):
            return value
        # files of different folders may have one name
        copy = Path("inputs") / f"{prompt.id:06d}-{place}-{value.name}"
        (out / "inputs").mkdir(exist_ok=True)
        shutil.copyfile(value, out / copy)
        return copy.as_posix()

    return {name: own(name, value) for name, value in prompt.columns.items()}


def _copied(medium: Medium, out: Path, media: dict[Medium, str]) -> str:
    """The medium's name in the folder; what stands in several rows is copied once."""
    if medium not in media:
        number = f"media/{len(media):07d}"
        if isinstance(medium, Embedded):
            content = medium.read()
            media[medium] = number + _ending(content, medium)
            (out / media[medium]).write_bytes(content)
        elif medium.is_dir():
            media[medium] = number
            shutil.copytree(medium, out / number, dirs_exist_ok=True)
        else:
            media[medium] = number + medium.suffix.lower()
            shutil.copyfile(medium, out / media[medium])
    return media[medium]


ENDINGS = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"GIF8": ".gif"}


def _ending(content: bytes, medium: Embedded) -> str:
    for start, ending in ENDINGS.items():
        if content.startswith(start):
            return ending
    raise DataError(f"{medium} holds {len(content)} bytes that are no JPEG, PNG, WebP or GIF picture")
