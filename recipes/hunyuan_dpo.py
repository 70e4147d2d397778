"""Flow-DPO on HunyuanVideo with pairs that VideoReward ranked (VideoAlign, arXiv 2501.13918).

Command:   alignkit pairs hunyuan_grpo --samples 8 --min-margin 0.5 --out data/hunyuan_pairs
           alignkit run hunyuan_dpo
           alignkit run hunyuan_dpo:online    (pairs of new videos every round, no file)
Measured:  not yet run at full size; for the paper's own model see `wan_dpo`.
Hardware:  `alignkit plan hunyuan_dpo`: 39 GiB of weights in bf16; one 80 GB GPU. Videos are encoded once, and
           the 15 GiB of text encoders are needed for their prompts alone.
Sources:   rank, learning rate, batch and the constant weight are the paper's; its beta of 500 belongs to summed
           errors, errors are means here: watch `policy/margin`. This model takes guidance as an input, which
           `call` sets in training as in sampling. The size is that of `hunyuan_grpo`.
"""

from dataclasses import replace

from alignkit.policy import LoRA
from alignkit.training.dpo import DPO
from alignkit.training.matching import Levels


def recipe() -> DPO:
    return DPO(
        model="hunyuanvideo-community/HunyuanVideo",
        prompts=None,
        data="data/hunyuan_pairs/pairs.jsonl",
        eval_prompts="shipped:recipes/prompts/video_held_out.txt",
        rewards={"video_reward(media_fps=24)": 1.0},  # only measured: it ranked the pairs
        judges=("motion_smoothness", "flow_magnitude", 'per_frame_mean(reward="aesthetic")'),
        call={"height": 480, "width": 640, "num_frames": 53, "guidance_scale": 6.0},
        train=LoRA(rank=64, alpha=128.0),
        num_steps=16,
        eval_steps=50,
        levels=Levels("uniform"),
        draws=1,
        beta=500.0,
        steps=400,
        warmup=20,
        prompts_per_step=64,
        micro_batch=1,
        lr=5e-6,
        precision="bf16",
        gradient_checkpointing=True,
        eval_batch=2,
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
