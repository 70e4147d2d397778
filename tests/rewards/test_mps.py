from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from alignkit.errors import RewardError
from alignkit.rewards import evaluate
from alignkit.rewards.mps import MPS, OVERALL, Rotary, relevant_words, shared_attention
from alignkit.rewards.weights import MissingWeights
from alignkit.types import Prompt

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROMPTS = [Prompt('a red sign that says "CAT"', id=0), Prompt("dog", id=1), Prompt("a small boat " * 12, id=2)]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return MPS.tiny(tmp_path_factory.mktemp("mps"))


def pictures(height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(1))


def norm(x: torch.Tensor, state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.norm.weight"], state[f"{name}.norm.bias"])


def gated(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x[..., :half] * F.silu(x[..., half:])


def turned(x: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Rotary position, element by element: coordinate i is paired with i + d/2."""
    out, half = torch.empty_like(x), x.shape[-1] // 2
    for position in range(x.shape[-2]):
        for i in range(half):
            angle = position * frequencies[i]
            first, second = x[..., position, i], x[..., position, i + half]
            out[..., position, i] = first * angle.cos() - second * angle.sin()
            out[..., position, i + half] = second * angle.cos() + first * angle.sin()
    return out


def cross_model(
    image: torch.Tensor, text: torch.Tensor, mask: torch.Tensor, state: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Four layers on (n, D) and (m, D) with one head of 64, written out; `mask` (m,) is added to the logits."""
    for i in range(4):
        cross, own = f"layers.{i}.0.fn", f"layers.{i}.1.fn"
        x = norm(image, state, cross)
        keys, values = (text @ state[f"{cross}.to_kv.weight"].T).split(64, dim=-1)
        weights = (x @ state[f"{cross}.to_q.weight"].T * 64**-0.5 @ keys.T + mask).softmax(dim=-1)
        fed = gated(x @ state[f"{cross}.ff.0.weight"].T) @ state[f"{cross}.ff.2.weight"].T
        image = image + weights @ values @ state[f"{cross}.to_out.weight"].T + fed
        x = norm(image, state, own)
        parts = (x @ state[f"{own}.fused_attn_ff_proj.weight"].T).split([64, 64, 64, 256], dim=-1)
        queries, keys = (turned(part, state[f"{own}.rotary_emb.inv_freq"]) for part in parts[:2])
        weights = (queries * 64**-0.5 @ keys.T).softmax(dim=-1)
        fed = gated(parts[3]) @ state[f"{own}.ff_out.1.weight"].T
        image = image + weights @ parts[2] @ state[f"{own}.attn_out.weight"].T + fed
    return image


@pytest.fixture(scope="module")
def choosy(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Weights by which the criterion "" and the letters of a prompt lie on opposite sides of a line."""
    reward = MPS(**options)
    hidden = {}
    for text in ("", "ted sign boat"):
        hidden[text] = reward.network.model.text_model(reward.tokens([text], torch.device("cpu"))).last_hidden_state[0]
    points = torch.cat([hidden[""], hidden["ted sign boat"][1:14]])
    sides = torch.cat([torch.ones(77), -torch.ones(13)])
    line = torch.linalg.lstsq(points, sides).solution
    assert ((points @ line).sign() == sides).all()
    state = load_file(Path(options["weights"]) / "model.safetensors")
    state["mps.model.text_projection.weight"] = torch.outer(torch.ones(32), line)
    folder = tmp_path_factory.mktemp("choosy")
    save_file(state, folder / "model.safetensors")
    return {"weights": str(folder), "clip": options["clip"], "condition": ""}


@pytest.mark.parametrize("which", ["options", "choosy"])
def test_the_score_is_the_authors_formula_for_one_picture(which: str, request: pytest.FixtureRequest) -> None:
    options = request.getfixturevalue(which)
    folder, hidden = Path(options["clip"]), []
    condition_text = options.get("condition", OVERALL)
    state = {n.removeprefix("mps."): t for n, t in load_file(Path(options["weights"]) / "model.safetensors").items()}
    clip = CLIPModel(CLIPConfig.from_pretrained(folder)).eval()
    clip.load_state_dict({n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.")})
    top = {n.removeprefix("cross_model."): t for n, t in state.items() if n.startswith("cross_model.")}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = MPS(**options)(pictures(), PROMPTS)
    for media, prompt, score in zip(pictures(), PROMPTS, scores):
        values = ((media - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])[None]
        ids = [
            tokenizer(text, max_length=77, padding="max_length", truncation=True, return_tensors="pt").input_ids
            for text in (str(prompt), condition_text)
        ]
        with torch.no_grad():
            text, condition = (clip.text_model(input_ids=one) for one in ids)
            words = clip.text_projection(text.last_hidden_state)[0]
            criterion = clip.text_projection(condition.last_hidden_state)[0]
            image = clip.visual_projection(clip.vision_model(values).last_hidden_state)[0]
            similarity = (criterion @ words.T).max(dim=0).values
            mask = torch.where(similarity / similarity.max() > 0.01, 0, float("-inf"))
            hidden.append(mask.isinf().any())
            seen = cross_model(image, words, mask, top)[0]
            sentence = clip.text_projection(text.pooler_output)[0]
            expected = clip.logit_scale.exp() * F.cosine_similarity(seen, sentence, dim=0)
        torch.testing.assert_close(score, expected, atol=1e-3, rtol=1e-4)
    assert any(hidden) == (which == "choosy")


def test_only_words_that_the_criterion_is_about_are_seen() -> None:
    words = torch.tensor([[[1.0, 0], [0.005, 0], [-1, 0], [0, 1]], [[100.0, 0], [0.5, 0], [-1, 0], [0, 1]]])
    criterion = torch.tensor([[1.0, 0], [0, 0.02]])
    expected = torch.tensor([[True, False, False, True], [True, False, False, False]])
    assert torch.equal(relevant_words(words, criterion), expected)


def test_what_is_not_allowed_has_no_weight() -> None:
    rng = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(*shape, generator=rng) for shape in ((2, 3, 4, 8), (2, 5, 8), (2, 5, 8)))
    allowed = torch.tensor([[True, True, False, False, True]] * 2)
    masked = shared_attention(queries, keys, values, allowed)
    torch.testing.assert_close(masked, shared_attention(queries, keys[:, [0, 1, 4]], values[:, [0, 1, 4]]))


def test_the_score_of_a_sample_does_not_depend_on_its_batch(options: dict[str, Any]) -> None:
    reward = MPS(**options)
    together = reward(pictures(), PROMPTS)
    alone = torch.cat([reward(pictures()[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-5)  # of scores up to 100


def test_gradients_reach_the_pixels_that_are_shown(options: dict[str, Any]) -> None:
    media = pictures(32, 64).requires_grad_()
    evaluate(MPS(**options), media, PROMPTS).scores.sum().backward()
    assert media.grad is not None
    shown = media.grad.abs().sum(dim=1) > 0
    assert shown[..., 16:48].all() and not shown[..., :16].any()


def test_another_criterion_gives_other_scores(choosy: dict[str, Any]) -> None:
    assert not torch.equal(
        MPS(**choosy)(pictures(), PROMPTS), MPS(**{**choosy, "condition": "ted"})(pictures(), PROMPTS)
    )


def test_the_state_of_the_original_module_is_read_too(options: dict[str, Any], tmp_path: Path) -> None:
    state = load_file(Path(options["weights"]) / "model.safetensors")
    original = {name.removeprefix("mps."): tensor for name, tensor in state.items()}
    original["model.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(original, tmp_path / "mps.safetensors")
    scores = MPS(weights=str(tmp_path), clip=options["clip"])(pictures(), PROMPTS)
    assert torch.equal(scores, MPS(**options)(pictures(), PROMPTS))


def test_a_missing_tensor_is_refused_by_name(options: dict[str, Any], tmp_path: Path) -> None:
    state = load_file(Path(options["weights"]) / "model.safetensors")
    del state["mps.cross_model.layers.3.1.fn.attn_out.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(
        RewardError, match=r"lack 1 tensors of MPSNetwork: cross_model\.layers\.3\.1\.fn\.attn_out\.weight"
    ):
        MPS(weights=str(tmp_path), clip=options["clip"]).prepare()


class Code:
    """Something that a file of tensors must not hold."""


def test_the_authors_pickled_object_is_not_read(options: dict[str, Any], tmp_path: Path) -> None:
    torch.save(Code(), tmp_path / "MPS_overall_checkpoint.pth")
    with pytest.raises(RewardError, match="save `model.state_dict\\(\\)` as safetensors"):
        MPS(weights=str(tmp_path / "MPS_overall_checkpoint.pth"), clip=options["clip"]).prepare()


def test_half_precision_weights_give_float32_scores_near_the_exact_ones(options: dict[str, Any]) -> None:
    exact, half = (MPS(**options, dtype=dtype)(pictures(), PROMPTS) for dtype in ("float32", "bfloat16"))
    assert half.dtype == torch.float32 and not torch.equal(exact, half)
    torch.testing.assert_close(exact, half, atol=5, rtol=0)


def test_in_half_precision_far_patches_are_turned_by_their_exact_angles(options: dict[str, Any]) -> None:
    exact, half = (
        [one for one in MPS(**options, dtype=dtype).network.modules() if isinstance(one, Rotary)][0]
        for dtype in ("float32", "bfloat16")
    )
    x = torch.randn(1, 257, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    torch.testing.assert_close(half(x).float(), exact(x.float()), atol=0.05, rtol=0)


def test_missing_weights_name_the_hub_id_and_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingWeights, match="RE-N-Y/mpsv1.*`alignkit fetch NAME`"):
        evaluate(MPS(), pictures(), PROMPTS)
