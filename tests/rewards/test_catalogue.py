"""The README shows the table that the code generates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alignkit.rewards import TABLE, evaluate, load
from alignkit.rewards.catalogue import markdown, record_of, rows
from alignkit.types import Prompt

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_readme_has_the_table_of_rewards_that_the_code_generates() -> None:
    shown = README.read_text(encoding="utf-8").partition("<!-- rewards -->\n")[2].partition("\n<!-- /rewards -->")[0]
    assert shown == markdown(), "run: python -m alignkit.rewards.catalogue, and paste it between the markers"


def test_every_name_is_in_the_table_once() -> None:
    names = [row[0].strip("`") for row in rows()]
    assert sorted(names) == sorted(TABLE)


@pytest.mark.parametrize("name", sorted(TABLE))
def test_what_has_weights_says_under_which_licence(name: str) -> None:
    record = record_of(name)
    assert record["summary"] and record["range"] and record["cost"]
    assert record["licence"] or not record["weights"]


def block(name: str) -> str:
    """The README's code block that begins with the name of a file."""
    text = README.read_text(encoding="utf-8")
    return text.partition(f"```python\n# {name}")[2].partition("```")[0].partition("\n")[2]


def test_the_readmes_three_ways_to_plug_in_a_reward_work_as_printed(tmp_path: Path) -> None:
    for name in ("my_reward.py", "columns.py", "palette.py"):
        (tmp_path / name).write_text(block(name), encoding="utf-8")
        assert len(block(name).splitlines()) <= 12
    media = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = [Prompt("a cat", id=1, columns={"target": "cat"}), Prompt("a dog", id=2)]
    function = load(f"{tmp_path}/my_reward.py:sharpness")
    assert function.differentiable
    torch.testing.assert_close(function(media, prompts), (media[..., 1:] - media[..., :-1]).abs().mean(dim=(1, 2, 3)))
    columns = evaluate(load(f"{tmp_path}/columns.py:mentions"), media, prompts)
    assert columns.scores[0] == 1 and columns.applicable.tolist() == [True, False]
    palette = load(f"{tmp_path}/palette.py:ToPalette(colour=(1.0, 0.9, 0.2))")
    expected = -(media.mean(dim=(2, 3)) - torch.tensor([1.0, 0.9, 0.2])).norm(dim=1)
    torch.testing.assert_close(evaluate(palette, media, prompts).scores, expected)
