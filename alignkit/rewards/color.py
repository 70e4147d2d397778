"""Whether a sign has the colour that its prompt names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from alignkit import shipped
from alignkit.errors import RecipeError, RewardError
from alignkit.rewards.card import Card
from alignkit.types import Prompt

_QUOTED = re.compile(r'"[^"]*"|“[^”]*”')


class SignColor:
    """1 where the named colour nearest to the sign's background is the one in the prompt, else 0.

    0 and 1 make the mean reward the colour accuracy. The background is the median over a border an eighth of
    the image thick, so that letters that reach into it do not count; nearest is by distance in RGB.

    Args:
        world: `world.json`, or its contents: `colours` is {name: [r, g, b]} in 0..255. Default: the shipped
            signs.
    """

    name = "sign_color"
    kind = "image"
    differentiable = False
    card: ClassVar[Card] = Card(
        family="statistics",
        summary="the sign's background has the colour that the prompt names",
        range="0 or 1",
        cost="a median and a table lookup",
        columns=("colour?",),
    )

    def __init__(self, world: str | Path | Mapping[str, Any] | None = None) -> None:
        colours = _colours(world)
        self.names = list(colours)
        self.colours = torch.tensor(list(colours.values())).float() / 255  # (K, 3)
        self._pattern = re.compile(rf"\b({'|'.join(map(re.escape, self.names))})\b", re.IGNORECASE)

    def read(self, media: torch.Tensor) -> list[str]:
        """The name of the colour nearest to each background of (B, 3, H, W), float in [0, 1]."""
        distance = torch.cdist(background(media), self.colours.to(media.device))  # (B, K)
        return [self.names[index] for index in distance.argmin(dim=1).tolist()]

    def target_of(self, prompt: Prompt) -> str:
        """The colour a prompt asks for: its column `colour`, else the only colour named outside the quotes.

        Raises:
            RewardError: none, or more than one.
        """
        if "colour" in prompt.columns:
            found = {str(prompt.columns["colour"]).lower()}
        else:
            found = {name.lower() for name in self._pattern.findall(_QUOTED.sub(" ", prompt))}
        known = [name for name in self.names if name.lower() in found]
        if len(found) != 1 or len(known) != 1:
            raise RewardError(
                f"prompt {prompt.id} (its line or row in the prompt file) names {len(known)} known colours: "
                f"{str(prompt)!r}. Name exactly one of {', '.join(self.names)}, or add a column `colour`"
            )
        return known[0]

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises RewardError naming the first prompt without exactly one colour."""
        for prompt in prompts:
            self.target_of(prompt)

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        """(B,) 0 or 1."""
        wanted = [self.target_of(prompt) for prompt in prompts]
        return torch.tensor([float(seen == want) for seen, want in zip(self.read(media), wanted)])

    def describe(self) -> dict[str, Any]:
        """The colours that it tells apart."""
        return {"colours": dict(zip(self.names, (self.colours * 255).round().int().tolist()))}


def background(media: torch.Tensor) -> torch.Tensor:
    """(B, 3) median colour of a border an eighth of the shorter side thick, of (B, 3, H, W) in [0, 1]."""
    height, width = media.shape[-2:]
    thick = max(1, min(height, width) // 8)
    border = torch.ones(height, width, dtype=torch.bool, device=media.device)
    border[thick : height - thick, thick : width - thick] = False
    return media[:, :, border].median(dim=-1).values


def _colours(world: str | Path | Mapping[str, Any] | None) -> dict[str, list[float]]:
    if not isinstance(world, Mapping):
        path = shipped.path("assets", "signs", "world.json") if world is None else Path(world)
        if not path.is_file():
            raise RecipeError(f"world={str(world)!r}: there is no such file; expected the path of a world.json")
        contents: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    else:
        contents = world
    colours: dict[str, list[float]] = dict(contents["colours"]) if "colours" in contents else {}
    if not colours or not all(len(rgb) == 3 and all(0 <= c <= 255 for c in rgb) for rgb in colours.values()):
        raise RecipeError("the world needs `colours`: {name: [red, green, blue]} in 0..255, at least one")
    return colours
