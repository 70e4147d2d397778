"""Diffusion-DPO on CogVideoX 2B with pairs that VideoReward ranked (arXiv 2311.12908; on this model 2412.14167).

Command:   alignkit pairs cogvideox_grpo --samples 8 --min-margin 0.5 --out data/cogvideox_pairs
           alignkit run cogvideox_dpo
           alignkit run cogvideox_dpo:online          (pairs of new videos every round, no file)
           alignkit run cogvideox_dpo:five_billion    (CogVideoX 5B)
Measured:  not yet run at full size.
Hardware:  `alignkit plan cogvideox_dpo`: 12 GiB of weights in bf16 (5B: 20), most of it the text encoder; one
           80 GB GPU.
Sources:   errors are those of the model's own prediction, v; beta as in Diffusion-DPO's released launchers, where
           errors are means of eps. VideoDPO chose its pairs by a score of look and text, here VideoReward does; rank,
           learning rate and batch are those of `wan_dpo`, untuned here.
"""

from dataclasses import replace

from alignkit.policy import LoRA
from alignkit.training.dpo import DPO
from alignkit.training.matching import Levels


def recipe() -> DPO:
    return DPO(
        model="THUDM/CogVideoX-2b",
        prompts=None,
        data="data/cogvideox_pairs/pairs.jsonl",
        eval_prompts="shipped:recipes/prompts/video_held_out.txt",
        rewards={"video_reward(media_fps=8)": 1.0},  # only measured: it ranked the pairs
        judges=("motion_smoothness", "flow_magnitude", 'per_frame_mean(reward="aesthetic")'),
        call={"height": 480, "width": 720, "num_frames": 17},
        guidance_baseline={"guidance_scale": 6.0},
        train=LoRA(rank=64, alpha=128.0),
        num_steps=20,
        eval_steps=50,
        levels=Levels("uniform"),
        draws=1,
        beta=2000.0,
        steps=400,
        warmup=20,
        prompts_per_step=64,
        micro_batch=1,
        lr=5e-6,
        precision="bf16",
        gradient_checkpointing=True,
        eval_batch=4,
        diversity_prompts=4,
        diversity_samples=4,
    )


def online() -> DPO:
    """The best and the worst of eight new videos per prompt, against the model before training."""
    return replace(
        recipe(),
        prompts="shipped:recipes/prompts/video.txt",
        data=None,
        prompts_per_step=16,
        group_size=8,
        rollout_batch=4,
        draws=4,
        min_margin=0.5,
        lr=1e-5,
        steps=100,
    )


def five_billion() -> DPO:
    return replace(recipe(), model="THUDM/CogVideoX-5b")
