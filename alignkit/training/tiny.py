"""`--tiny`: any recipe's code path, for two steps, on a tiny random pipeline of the same class."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shutil
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alignkit.errors import RecipeError
from alignkit.inference.comparison import Comparison
from alignkit.rewards.loading import tiny as tiny_reward
from alignkit.training import shrink
from alignkit.training.blueprint import DENOISERS, build, class_named, configurations, count, local_folder
from alignkit.training.grpo import GRPO
from alignkit.training.recipe import Recipe
from alignkit.training.recipe_files import AnyRecipe
from alignkit.training.reward_model import RewardModel
from alignkit.training.tiny_data import write_data

SMALL_ENOUGH = 20_000_000  # parameters; such a pipeline keeps its own sizes
PIXELS, FRAMES, TEXT_LENGTH = 64, 9, 77
VIDEO_TEXT = 128
"""Tokens of a video pipeline's prompt; HunyuanVideo's system prompt takes half of them."""
STEPS, EVAL_STEPS = 6, 4
WEIGHTS = ("*.safetensors", "*.bin", "*.msgpack", "*.onnx", "*.safetensors.index.json", "*.h5")
FIRST_SPECIAL = 151643
QWEN_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
BUILD_FAULTS = (ValueError, TypeError, RuntimeError, KeyError, AttributeError, IndexError, ZeroDivisionError)


def tiny(recipe: AnyRecipe, out: Path) -> AnyRecipe:
    """The recipe with two steps, two prompts of two samples, and a tiny random model written to `out/model`.

    Evaluations take few denoising steps, and so do rollouts whose plan names none of its steps by number.

    A recipe that learns from data gets a few random pictures or videos instead, written to `out/data`.

    A reward model's recipe keeps its model, which is the recipe's own code, and does two steps of two examples. A
    comparison keeps its model too, with two prompts, one seed and two denoising steps.

    Rewards whose weights are on the hub get tiny random ones, written to `out/rewards` and read by their own code.

    A random model's pictures have no text and no subject, so rewards that read give every sample the same score and
    no group carries a signal: `brightness` joins the rewards of images, so that there is something to train on.

    Raises:
        RecipeError: the pipeline's class cannot be made small, or nothing is known about it here.
    """
    if (out / "recipe.json").exists():
        raise RecipeError(f"{out} already holds a run; give --tiny another --out, or none for a temporary folder")
    if isinstance(recipe, RewardModel):
        return dataclasses.replace(recipe, steps=2, batch=2, eval_every=1, time_limit=None)
    if isinstance(recipe, Comparison):  # noise-aware rewards fit one model only, so it keeps its own
        arms = {name: dataclasses.replace(arm, num_steps=None) for name, arm in recipe.arms.items()}
        return dataclasses.replace(recipe, limit=2, seeds=recipe.seeds[:1], num_steps=2, arms=arms)
    pipeline = write_model(recipe.model, out / "model")
    rewards = {tiny_reward(spec, out / "rewards"): weight for spec, weight in recipe.rewards.items()}
    judges = tuple(tiny_reward(judge, out / "rewards") for judge in recipe.judges)
    recipe = dataclasses.replace(recipe, model=str(out / "model"), rewards=rewards, judges=judges)
    fields = _few(recipe, pipeline)
    return dataclasses.replace(recipe, **fields, **_data(recipe, fields, out / "data"))


def _few(recipe: Recipe, pipeline: str) -> dict[str, Any]:
    """Fields of a recipe that make it short; everything else is the recipe's own."""
    import diffusers

    keywords = inspect.signature(inspect.unwrap(getattr(diffusers, pipeline).__call__)).parameters
    call = dict(recipe.call)
    for name, most in (("height", PIXELS), ("width", PIXELS), ("num_frames", FRAMES)):
        if name in keywords:
            call[name] = min(int(call.get(name) or most), most)
    own_length = pipeline.startswith("CogVideoX")  # its transformer is built for one length
    if {"num_frames", "max_sequence_length"} <= keywords.keys() and not own_length:
        longest = call.get("max_sequence_length", keywords["max_sequence_length"].default)
        call["max_sequence_length"] = min(longest, VIDEO_TEXT)
    rewards = dict(recipe.rewards)
    if "num_frames" not in keywords:
        rewards.setdefault("brightness", 1.0)
    fields: dict[str, Any] = {
        "steps": 2,
        "time_limit": None,
        "call": call,
        "prompts_per_step": 2 * recipe.updates,
        "rewards": rewards,
        "micro_batch": None if recipe.micro_batch is None else 2,
        "rollout_batch": None if recipe.rollout_batch is None else min(recipe.rollout_batch, 2),
        "init_lora": None,
        "eval_steps": min(recipe.eval_steps or recipe.num_steps, recipe.num_steps, EVAL_STEPS),
        "eval_every": 1,
        "eval_limit": 2,
        "eval_curve_prompts": 2,
        "sample_prompts": 2,
        "diversity_prompts": min(recipe.diversity_prompts, 1),
        "diversity_samples": min(recipe.diversity_samples, 2),
        "precision": "fp32" if recipe.precision == "fp16" and not torch.cuda.is_available() else recipe.precision,
        "group_size": 2,
        "data_samples": min(recipe.data_samples, 2),
        "kl_prompts": min(recipe.kl_prompts, 1),
        "critic": None if recipe.critic is None else dataclasses.replace(recipe.critic, alone=0, steps=1),
    }
    if isinstance(recipe, GRPO) and recipe.branch_width:  # a tree of two leaves has one split
        fields |= {"branch_width": 2, **({"branches": recipe.branches[:1]} if recipe.branches else {"window": 1})}
    if isinstance(recipe, GRPO) and recipe.kl_steps is None and recipe.plan in ("full", "random"):
        fields |= _short_grid(recipe)
    return fields


def _short_grid(recipe: GRPO) -> dict[str, Any]:
    """Fewer steps where no other field names one of them; the same share of them is trained."""
    if recipe.branch_width or recipe.num_steps <= STEPS:
        return {}
    return {"num_steps": STEPS, "window": max(1, round(recipe.window * STEPS / recipe.num_steps))}


def _data(recipe: Recipe, fields: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Files of random media in place of those that the recipe learns from or is held by."""
    enough = 3 * fields["prompts_per_step"]  # some are held out
    made: dict[str, Any] = {}
    if recipe.data is not None and recipe.learns_from != "rollouts":
        made["data"] = write_data(recipe.data, recipe.learns_from, fields["call"], out, enough)
    if recipe.data_anchor is not None:
        made["data_anchor"] = write_data(recipe.data_anchor, "samples", fields["call"], out / "anchor", enough)
    return made


def write_model(model: str, out: Path) -> str:
    """Write a tiny random pipeline of `model`'s class to `out`; returns the class's name."""
    folder = local_folder(model)
    if folder is not None:
        return _from_folder(folder, out)
    for stem, record in configurations().items():
        if model.lower() in (stem, record["name"].lower(), record["hub_id"].lower()):
            _from_record(record, out)
            return record["pipeline"]
    raise RecipeError(
        f"--tiny builds {model!r} from its configuration, and there is none here: give a local folder with a "
        f"model_index.json, or one of {', '.join(configurations())}"
    )


def _from_folder(folder: Path, out: Path) -> str:
    """Copy tokenizers, schedulers and processors; rebuild every network from its configuration, made small."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns(*WEIGHTS), dirs_exist_ok=True)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    configs: dict[str, tuple[Any, dict[str, Any]]] = {}
    for name, entry in index.items():
        file = folder / name / "config.json"
        if isinstance(entry, list) and all(isinstance(e, str) for e in entry) and file.is_file():
            cls = class_named(*entry)
            if issubclass(cls, nn.Module):
                configs[name] = (cls, json.loads(file.read_text(encoding="utf-8")))
    with torch.device("meta"):
        large = sum(count(_network(name, *made)) for name, made in configs.items()) > SMALL_ENOUGH
    for name, (cls, config) in configs.items():
        network = _network(name, cls, small_config(cls, config) if large else config)
        network.save_pretrained(out / name)  # type: ignore[operator]
    return index["_class_name"]


def _from_record(record: Mapping[str, Any], out: Path) -> None:
    """Networks from a shipped configuration, made small; tokenizers of characters; the scheduler's defaults."""
    import diffusers

    cls = getattr(diffusers, record["pipeline"])
    parts: dict[str, Any] = {}
    for name, part in record["components"].items():
        own = class_named(part["library"], part["class"])
        config = small_config(own, part["config"])
        if "text_encoder" in name:
            tokenizer = tokenizer_for(part["class"])
            parts[name.replace("text_encoder", "tokenizer")] = tokenizer
            if "vocab_size" in config:  # a quarter of a million rows take seconds to draw and to write
                config["vocab_size"] = min(config["vocab_size"], max(tokenizer.get_vocab().values()) + 1)
        parts[name] = _network(name, own, config)
    parts["scheduler"] = _scheduler(record)
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name not in ("self", *parts) and parameter.default is inspect.Parameter.empty:
            parts[name] = None
    switches = {"requires_safety_checker": False} if "safety_checker" in parts else {}
    cls(**parts, **switches).save_pretrained(out)


def small_config(cls: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of class `cls` made small."""
    if cls.__module__.startswith(DENOISERS):
        return shrink.denoiser(config)
    if cls.__module__.startswith("diffusers.models.autoencoders"):
        return shrink.autoencoder(config)
    return shrink.text_encoder(config) if cls.__module__.startswith("transformers.") else dict(config)


def _network(name: str, cls: Any, config: Mapping[str, Any]) -> nn.Module:
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return build(cls, config)
    except BUILD_FAULTS as error:
        raise RecipeError(
            f"--tiny cannot build {name} ({cls.__name__}) from its configuration: {type(error).__name__}: {error}. "
            "Give a small model of this class with --model FOLDER instead"
        ) from error


def _scheduler(record: Mapping[str, Any]) -> Any:
    from diffusers import (
        CogVideoXDDIMScheduler,
        DDIMScheduler,
        EulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
    )

    if record["pipeline"] == "CogVideoXPipeline":
        return CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        )
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    if record["denoiser"] != "unet":
        dynamic = record["pipeline"] in ("FluxPipeline", "QwenImagePipeline", "LTXPipeline")
        return FlowMatchEulerDiscreteScheduler(shift=1.0 if dynamic else 3.0, use_dynamic_shifting=dynamic)
    if record["pipeline"] == "StableDiffusionXLPipeline":
        return EulerDiscreteScheduler(**betas, timestep_spacing="leading")
    return DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False)


def tokenizer_for(encoder: str) -> Any:
    """A tokenizer of single characters of the class that a text encoder goes with.

    Raises:
        RecipeError: no such tokenizer is known for this encoder.
    """
    from transformers import CLIPTokenizer, Qwen2Tokenizer, T5Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters = list(bytes_to_unicode().values())
    if encoder.startswith("CLIP"):
        pieces = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TEXT_LENGTH)
    if encoder.startswith(("T5", "UMT5")):
        printable = [c for c in string.printable if not c.isspace()]
        pairs = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -4.0), *((c, -4.0) for c in printable)]
        return T5Tokenizer(vocab=pairs, extra_ids=0, model_max_length=512)
    if encoder.startswith("Llama"):
        return _words_and_characters()
    if encoder.startswith("Qwen2"):
        special = {token: FIRST_SPECIAL + i for i, token in enumerate(QWEN_SPECIAL)}  # configurations name their ids
        vocabulary = {piece: i for i, piece in enumerate(characters)} | special
        return Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=list(special))
    raise RecipeError(f"--tiny has no tokenizer for {encoder}; give a local folder of the model, which has its own")


def _words_and_characters() -> Any:
    """The fast tokenizer of HunyuanVideo's Llama: each word of its system prompt is one token, as long words are in
    the real one, because the pipeline cuts that prompt off by a number of tokens and truncates what follows."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted(set(re.findall(r"<\|\w+\|>|\w{2,}", str(DEFAULT_PROMPT_TEMPLATE["template"]))))
    vocabulary = {piece: i for i, piece in enumerate(("<pad>", "<unk>", *string.printable))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(word, single_word=word.isalnum()) for word in words])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
