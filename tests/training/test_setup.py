"""What a run loads before it begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignkit.errors import RecipeError
from alignkit.training.grpo import GRPO
from alignkit.training.runtime import Runtime
from alignkit.training.setup import policy_of


@pytest.mark.parametrize("model", ["runs/shapes/generator", "generator"])
def test_a_model_folder_that_is_not_there_is_named_with_where_it_was_looked_for(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = f"model='{model}' is no folder with a model_index.json .looked from {tmp_path}"
    with pytest.raises(RecipeError, match=said):
        policy_of(GRPO(model=model, prompts="p", rewards={"brightness": 1.0}), Runtime("fp32"))
