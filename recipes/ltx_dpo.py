"""Flow-DPO on LTX-Video 2B with pairs that VideoReward ranked (VideoAlign, arXiv 2501.13918).

Command:   alignkit pairs ltx_grpo --samples 8 --min-margin 0.5 --out data/ltx_pairs
           alignkit run ltx_dpo
           alignkit run ltx_dpo:online    (pairs of new videos every round, no file)
           alignkit run ltx_dpo:votes     (people's votes on videos: the CSV of VideoGen-RewardBench)
Measured:  not yet run at full size; for the paper's own model see `wan_dpo`.
Hardware:  `alignkit plan ltx_dpo`: 13 GiB of weights in bf16, most of it the text encoder; one GPU of 48 GB.
Data:      `votes` reads `data/videogen-rewardbench.csv`, whose columns name videos beside it, under the folder that
           the command runs in. They are cut to the frames and the size of `call`.
Sources:   rank, learning rate, batch and the constant weight are the paper's; its beta of 500 belongs to summed
           errors, errors are means here: watch `policy/margin`. The size is that of `ltx_grpo`.
"""

from dataclasses import replace

from alignkit.policy import LoRA
from alignkit.training.dpo import DPO
from alignkit.training.matching import Levels


def recipe() -> DPO:
    return DPO(
        model="Lightricks/LTX-Video",
        prompts=None,
        data="data/ltx_pairs/pairs.jsonl",
        eval_prompts="shipped:recipes/prompts/video_held_out.txt",
        rewards={"video_reward(media_fps=25)": 1.0},  # only measured: it ranked the pairs
        judges=("motion_smoothness", "flow_magnitude", 'per_frame_mean(reward="aesthetic")'),
        call={"height": 320, "width": 512, "num_frames": 49},
        guidance_baseline={"guidance_scale": 3.0},
        train=LoRA(rank=64, alpha=128.0),
        num_steps=20,
        eval_steps=50,
        levels=Levels("uniform"),
        draws=1,
        beta=500.0,
        steps=400,
        warmup=20,
        prompts_per_step=64,
        micro_batch=2,
        lr=5e-6,
        precision="bf16",
        gradient_checkpointing=True,
        eval_batch=4,
        diversity_prompts=4,
        diversity_samples=4,
    )


def votes() -> DPO:
    """Videos of twelve other generators: what people prefer, far from what this model draws."""
    return replace(recipe(), data="data/videogen-rewardbench.csv")


def online() -> DPO:
    """The best and the worst of eight new videos per prompt, against the model before training."""
    return replace(
        recipe(),
        prompts="shipped:recipes/prompts/video.txt",
        data=None,
        prompts_per_step=16,
        group_size=8,
        rollout_batch=8,
        draws=4,
        min_margin=0.5,
        lr=1e-5,
        steps=100,
    )
