"""A Qwen2-VL with a reward head on special tokens: reading, renaming, merging, training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards.hpsv3 import FILE, TOKEN, HPSv3, build_head
from alignkit.rewards.token_head import (
    INPUTS,
    at_tokens,
    current_names,
    load_state,
    load_token_reward,
    merge_lora,
    published_names,
    template_of,
)
from alignkit.rewards.vision_language import Chat


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return HPSv3.tiny(tmp_path_factory.mktemp("hpsv3"))


def picture(seed: int) -> torch.Tensor:
    return torch.rand(3, 56, 56, generator=torch.Generator().manual_seed(seed))


def test_states_are_read_at_the_token_wherever_it_stands() -> None:
    hidden = torch.arange(2 * 5 * 3, dtype=torch.float32).reshape(2, 5, 3)
    ids = torch.tensor([[9, 1, 1, 7, 1], [1, 7, 1, 1, 9]])
    torch.testing.assert_close(at_tokens(hidden, ids, (7, 9)), torch.stack([hidden[0, [3, 0]], hidden[1, [1, 4]]]))


@pytest.mark.parametrize(("row", "times"), [([7, 1, 7], 2), ([1, 1, 1], 0)])
def test_a_token_that_stands_not_once_is_an_error_that_names_the_question(row: list[int], times: int) -> None:
    with pytest.raises(RewardError, match=f"question 1 has the reward token of id 7 {times} times, expected once"):
        at_tokens(torch.zeros(2, 3, 4), torch.tensor([[1, 7, 1], row]), (7,))


@pytest.mark.parametrize(
    ("published", "today"),
    [
        ("visual.blocks.0.attn.qkv.weight", "model.visual.blocks.0.attn.qkv.weight"),
        ("model.layers.3.mlp.up_proj.weight", "model.language_model.layers.3.mlp.up_proj.weight"),
        ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
        ("base_model.model.model.norm.weight", "model.language_model.norm.weight"),
        ("base_model.model.visual.merger.ln_q.bias", "model.visual.merger.ln_q.bias"),
        ("base_model.model.rm_head.weight", "rm_head.weight"),
        ("model.language_model.norm.weight", "model.language_model.norm.weight"),
        ("model.visual.merger.ln_q.bias", "model.visual.merger.ln_q.bias"),
        ("rm_head.0.weight", "rm_head.0.weight"),
    ],
)
def test_published_names_become_those_of_today_and_these_stay(published: str, today: str) -> None:
    assert list(current_names({published: torch.zeros(1)})) == [today]


def test_names_of_today_become_published_ones_and_come_back() -> None:
    names = ["model.visual.merger.ln_q.weight", "model.language_model.layers.0.mlp.up_proj.weight", "rm_head.weight"]
    published = published_names({name: torch.zeros(1) for name in names})
    assert list(published) == ["visual.merger.ln_q.weight", "model.layers.0.mlp.up_proj.weight", "rm_head.weight"]
    assert list(current_names(published)) == names


def test_the_vocabulary_head_is_left_out() -> None:
    assert current_names({"lm_head.weight": torch.zeros(1), "base_model.model.lm_head.weight": torch.zeros(1)}) == {}


def test_merged_lora_is_what_peft_computes() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    wrapped: Any = get_peft_model(  # type: ignore[arg-type]
        nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2)), LoraConfig(r=3, lora_alpha=12, target_modules=["0"])
    )
    for parameter in wrapped.parameters():
        nn.init.normal_(parameter)
    merged = {name.removeprefix("base_model.model."): v for name, v in merge_lora(wrapped.state_dict(), 12 / 3).items()}
    plain = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
    plain.load_state_dict(merged)
    x = torch.randn(4, 6)
    torch.testing.assert_close(plain(x), wrapped(x))


def test_lora_without_its_scale_is_refused() -> None:
    state = {f"a.{part}.weight": torch.zeros(2, 2) for part in ("base_layer", "lora_A.default", "lora_B.default")}
    with pytest.raises(RecipeError, match="nothing says how they are scaled"):
        merge_lora(state, None)


def test_ratings_do_not_depend_on_the_side_of_the_padding(options: dict[str, Any]) -> None:
    reader = HPSv3(**options).reader
    chats = [Chat((picture(i), f"{text} {TOKEN}")) for i, text in enumerate(("a", "a much longer question"))]
    left = reader.inputs(chats, special=(TOKEN,), reply=False)
    moved = dict(left)
    for name in ("input_ids", "attention_mask"):
        rows = zip(left[name], left["attention_mask"].argmax(dim=1).tolist(), strict=True)
        moved[name] = torch.stack([row.roll(-start) for row, start in rows])
    assert not torch.equal(moved["input_ids"], left["input_ids"])
    both = [reader.model(**{name: batch[name] for name in INPUTS if name in batch}) for batch in (left, moved)]
    torch.testing.assert_close(*both, atol=1e-5, rtol=1e-5)


def test_the_model_can_be_trained_saved_and_read_again(options: dict[str, Any], tmp_path: Path) -> None:
    base = Path(options["base"])
    state = current_names(load_state(Path(options["weights"]) / FILE))
    size = {"shortest_edge": 3136, "longest_edge": 3136}
    reader = load_token_reward(state, base, build_head, (TOKEN,), "float32", size=size)
    model = reader.model.requires_grad_(True)
    inputs = reader.inputs([Chat((picture(0), f"a {TOKEN}"))], special=(TOKEN,), reply=False)
    arguments = {name: inputs[name] for name in INPUTS if name in inputs}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = model(**arguments)[0, 0, 0]
    (-before).backward()
    used = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert any("visual" in n for n in used) and any("rm_head" in n for n in used)
    optimizer.step()
    after = model(**arguments)
    assert after[0, 0, 0] > before
    save_file(model.state_dict(), tmp_path / FILE)
    again = HPSv3(weights=str(tmp_path), base=options["base"], dtype="float32").reader.model
    torch.testing.assert_close(again(**arguments), after)


def test_weights_of_another_model_name_what_lacks(options: dict[str, Any], tmp_path: Path) -> None:
    state = load_state(Path(options["weights"]) / FILE)
    lacking = {name: value for name, value in state.items() if name != "visual.merger.ln_q.weight"}
    save_file(lacking, tmp_path / FILE)
    with pytest.raises(RewardError, match=r"not those of base .*missing_keys.*visual.merger.ln_q.weight"):
        HPSv3(**{**options, "weights": str(tmp_path)}).prepare()
    save_file({name: value for name, value in state.items() if name != "rm_head.3.bias"}, tmp_path / FILE)
    with pytest.raises(RewardError, match=r"rm_head.* lack 1 tensors of Sequential: 3.bias"):
        HPSv3(**{**options, "weights": str(tmp_path)}).prepare()
    save_file({"something.weight": torch.zeros(1)}, tmp_path / FILE)
    with pytest.raises(RewardError, match=r"lack model.language_model.embed_tokens.weight"):
        HPSv3(**{**options, "weights": str(tmp_path)}).prepare()


def test_weights_without_a_row_for_the_token_say_so(options: dict[str, Any], tmp_path: Path) -> None:
    state = load_state(Path(options["weights"]) / FILE)
    save_file({**state, "model.embed_tokens.weight": state["model.embed_tokens.weight"][:-1].clone()}, tmp_path / FILE)
    with pytest.raises(RewardError, match=r"270 tokens and '<\|Reward\|>' would be number 270"):
        HPSv3(**{**options, "weights": str(tmp_path)}).prepare()


def test_a_template_needs_the_prompt_and_each_token_once(tmp_path: Path) -> None:
    file = tmp_path / "template.txt"
    file.write_text("{prompt} {literal} <|A|>", encoding="utf-8")
    assert template_of(str(file), "unused", ("<|A|>",)) == "{prompt} {literal} <|A|>"
    with pytest.raises(RecipeError, match=r"has <\|B\|> 0 times, expected once"):
        template_of(str(file), "unused", ("<|A|>", "<|B|>"))
    with pytest.raises(RecipeError, match="there is no such file"):
        template_of(str(tmp_path / "nothing.txt"), "unused", ())
