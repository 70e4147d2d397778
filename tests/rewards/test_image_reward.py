from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from alignkit.errors import RewardError
from alignkit.rewards import evaluate
from alignkit.rewards.blip_weights import to_published, to_transformers
from alignkit.rewards.image_reward import ImageReward, normalised
from alignkit.rewards.weights import MissingWeights
from alignkit.types import Prompt

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROMPTS = [Prompt('a red sign that says "CAT"', id=0), Prompt("dog", id=1), Prompt("a small boat " * 12, id=2)]
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ImageReward.tiny(tmp_path_factory.mktemp("image_reward"))


def pictures(height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(1))


def linear(x: torch.Tensor, state: State, name: str) -> torch.Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def layer_norm(x: torch.Tensor, state: State, name: str, eps: float) -> torch.Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    scaled = centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """(n, D) from (n, D), (m, D), (m, D), head by head; `mask` (m,) is 1 where a key may be looked at."""
    out = []
    for one in zip(q.chunk(heads, dim=-1), k.chunk(heads, dim=-1), v.chunk(heads, dim=-1)):
        logits = one[0] @ one[1].T / one[0].shape[-1] ** 0.5
        if mask is not None:
            logits = logits.masked_fill(mask[None] == 0, float("-inf"))
        out.append(logits.softmax(dim=-1) @ one[2])
    return torch.cat(out, dim=-1)


def patches(values: torch.Tensor, state: State) -> torch.Tensor:
    """(1 + n, 64), the vision transformer of BLIP's own code, for one normalised picture (3, 32, 32)."""
    name = "blip.visual_encoder"
    weight, bias = state[f"{name}.patch_embed.proj.weight"], state[f"{name}.patch_embed.proj.bias"]
    x = F.conv2d(values[None], weight, bias, stride=8)[0].flatten(1).T
    x = torch.cat([state[f"{name}.cls_token"][0], x]) + state[f"{name}.pos_embed"][0]
    for i in range(2):
        block = f"{name}.blocks.{i}"
        qkv = linear(layer_norm(x, state, f"{block}.norm1", 1e-6), state, f"{block}.attn.qkv").chunk(3, dim=-1)
        x = x + linear(attend(*qkv, heads=1), state, f"{block}.attn.proj")
        hidden = F.gelu(linear(layer_norm(x, state, f"{block}.norm2", 1e-6), state, f"{block}.mlp.fc1"))
        x = x + linear(hidden, state, f"{block}.mlp.fc2")
    return layer_norm(x, state, f"{name}.norm", 1e-6)


def bert_attention(
    x: torch.Tensor, seen: torch.Tensor, state: State, name: str, mask: torch.Tensor | None
) -> torch.Tensor:
    q = linear(x, state, f"{name}.self.query")
    k, v = (linear(seen, state, f"{name}.self.{part}") for part in ("key", "value"))
    out = linear(attend(q, k, v, heads=2, mask=mask), state, f"{name}.output.dense")
    return layer_norm(out + x, state, f"{name}.output.LayerNorm", 1e-12)


def first_word(ids: torch.Tensor, mask: torch.Tensor, image: torch.Tensor, state: State) -> torch.Tensor:
    """(64,) of [CLS] after BERT's layers, each followed by a look at the picture."""
    name = "blip.text_encoder"
    x = state[f"{name}.embeddings.word_embeddings.weight"][ids]
    x = x + state[f"{name}.embeddings.position_embeddings.weight"][: len(ids)]
    x = layer_norm(x, state, f"{name}.embeddings.LayerNorm", 1e-12)
    for i in range(2):
        layer = f"{name}.encoder.layer.{i}"
        x = bert_attention(x, x, state, f"{layer}.attention", mask)
        x = bert_attention(x, image, state, f"{layer}.crossattention", None)
        hidden = F.gelu(linear(x, state, f"{layer}.intermediate.dense"))
        x = layer_norm(linear(hidden, state, f"{layer}.output.dense") + x, state, f"{layer}.output.LayerNorm", 1e-12)
    return x[0]


def literal(media: torch.Tensor, prompt: str, options: dict[str, Any]) -> float:
    """One score in float64, from the tensors under their published names."""
    state = torch.load(Path(options["weights"]) / "ImageReward.pt", weights_only=True)
    state = {name: tensor.double() for name, tensor in state.items()}
    tokenizer = AutoTokenizer.from_pretrained(options["tokenizer"])
    tokens = tokenizer(prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    values = (media.double() - torch.tensor(MEAN).double()[:, None, None]) / torch.tensor(STD).double()[:, None, None]
    x = first_word(tokens.input_ids[0], tokens.attention_mask[0], patches(values, state), state)
    for i in (0, 2, 4, 6, 7):
        x = linear(x, state, f"mlp.layers.{i}")
    return (x.item() - 0.16717362830052426) / 1.0333394966054072


def test_the_score_is_the_authors_network_written_out(options: dict[str, Any]) -> None:
    scores = ImageReward(**options)(pictures(), PROMPTS)
    expected = torch.tensor([literal(media, prompt, options) for media, prompt in zip(pictures(), PROMPTS)])
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    assert scores.unique().numel() == 3


def test_raw_scores_are_normalised_with_the_authors_numbers() -> None:
    torch.testing.assert_close(normalised(torch.tensor([0.16717362830052426, 1.2005131])), torch.tensor([0.0, 1.0]))


def test_names_of_tensors_go_to_transformers_and_back(options: dict[str, Any]) -> None:
    state = torch.load(Path(options["weights"]) / "ImageReward.pt", weights_only=True)
    renamed = to_transformers(state)
    assert {name.split(".")[0] for name in renamed} == {"vision", "text", "mlp"}
    assert set(to_published(renamed)) == set(state)
    assert "vision.encoder.layers.1.self_attn.projection.bias" in renamed


def test_tensors_of_the_contrastive_head_are_left_out(options: dict[str, Any], tmp_path: Path) -> None:
    copied = Copied(options, tmp_path)
    extra = {
        "blip.vision_proj.weight": torch.zeros(2, 2),
        "blip.text_encoder.embeddings.position_ids": torch.zeros(1, 2),
    }
    copied.save({**copied.state, **extra})
    assert torch.equal(copied.reward(pictures(), PROMPTS), ImageReward(**options)(pictures(), PROMPTS))


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        (
            "blip.text_encoder.encoder.layer.0.crossattention.self.key.weight",
            "text.encoder.layer.0.crossattention.self.key",
        ),
        ("blip.visual_encoder.blocks.0.mlp.fc1.weight", "vision.encoder.layers.0.mlp.fc1.weight"),
        ("mlp.layers.7.bias", "mlp.layers.7.bias"),
    ],
)
def test_a_missing_tensor_is_refused_by_name(
    options: dict[str, Any], tmp_path: Path, published: str, ours: str
) -> None:
    copied = Copied(options, tmp_path)
    del copied.state[published]
    copied.save(copied.state)
    with pytest.raises(RewardError, match=f"lack 1 tensors of ImageRewardNetwork: {ours}"):
        copied.reward.prepare()


def test_words_after_the_35th_token_do_not_count(options: dict[str, Any]) -> None:
    reward = ImageReward(**options)
    long = "a" * 40
    scores = reward(pictures()[:1].repeat(3, 1, 1, 1), [Prompt(text) for text in (long, long + " dog", "b" + long)])
    assert scores[0] == scores[1] and scores[0] != scores[2]


def test_the_score_of_a_sample_does_not_depend_on_its_batch(options: dict[str, Any]) -> None:
    reward = ImageReward(**options)
    together = reward(pictures(), PROMPTS)
    alone = torch.cat([reward(pictures()[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_the_gradient_of_the_score_is_its_slope_and_the_edges_of_a_wide_picture_have_none(
    options: dict[str, Any],
) -> None:
    reward = ImageReward(**options)
    media = pictures(32, 64)[:1].requires_grad_()
    (gradient,) = torch.autograd.grad(evaluate(reward, media, PROMPTS[:1]).scores.sum(), media)
    assert (gradient[..., 16:48].abs().sum(dim=1) > 0).all() and not gradient[..., :16].any()
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        slope = reward(media + step, PROMPTS[:1]) - reward(media - step, PROMPTS[:1])
    torch.testing.assert_close(slope, 2 * (gradient * step).sum()[None], rtol=0.02, atol=0)


def test_half_precision_weights_give_float32_scores_near_the_exact_ones(options: dict[str, Any]) -> None:
    exact, half = (ImageReward(**options, dtype=dtype)(pictures(), PROMPTS) for dtype in ("float32", "bfloat16"))
    assert half.dtype == torch.float32 and not torch.equal(exact, half)
    torch.testing.assert_close(exact, half, atol=0.05, rtol=0)


def test_missing_weights_name_the_hub_id_and_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingWeights, match="THUDM/ImageReward .ImageReward.pt.*`alignkit fetch NAME`"):
        evaluate(ImageReward(), pictures(), PROMPTS)


class Copied:
    """The tiny weights in another folder, to be changed."""

    def __init__(self, options: dict[str, Any], folder: Path) -> None:
        source = Path(options["weights"])
        (folder / "med_config.json").write_text((source / "med_config.json").read_text())
        self.folder = folder
        self.state: State = torch.load(source / "ImageReward.pt", weights_only=True)
        self.reward = ImageReward(weights=str(folder), tokenizer=options["tokenizer"])

    def save(self, state: State) -> None:
        torch.save(state, self.folder / "ImageReward.pt")
