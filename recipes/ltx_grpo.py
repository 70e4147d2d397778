"""Flow-GRPO on LTX-Video 2B towards VideoReward (arXiv 2505.05470, 2501.13918).

Command:   alignkit run ltx_grpo
           alignkit run ltx_grpo:fast     (Flow-GRPO-Fast: two stochastic steps of twenty)
           alignkit run ltx_grpo:frames   (an image reward on four frames, less the farther from the centre)
Measured:  not yet run at full size.
Hardware:  `alignkit plan ltx_grpo`: 13 GiB of weights in bf16, most of it the text encoder, and 5 GB of
           VideoReward. A video of 49 frames is 1,120 tokens, a tenth of what other models make of it: this is the
           video recipe to begin with, on one GPU of 48 GB.
Sources:   steps, noise, KL, learning rate and clip as `wan_grpo`, that is the released Wan configuration of Flow-GRPO;
           nothing is published for LTX-Video. The size is ours: sides divide by 32, frames are 8 k + 1. Its time shift
           depends on the size and its grid ends at sigma 0.1, both of which the policy takes from the pipeline.
Prompts:   48 of our own, to begin with (`--prompts FILE`).
"""

from dataclasses import replace

from alignkit.flow.transition import Noise
from alignkit.policy import LoRA
from alignkit.training.grpo import GRPO


def recipe() -> GRPO:
    return GRPO(
        model="Lightricks/LTX-Video",
        prompts="shipped:recipes/prompts/video.txt",
        eval_prompts="shipped:recipes/prompts/video_held_out.txt",
        rewards={"video_reward(media_fps=25)": 1.0},
        judges=("motion_smoothness", "flow_magnitude", 'per_frame_mean(reward="aesthetic")'),
        call={"height": 320, "width": 512, "num_frames": 49, "guidance_scale": 3.0},
        train=LoRA(rank=32, alpha=64.0),
        num_steps=20,
        eval_steps=50,
        noise=Noise("flow_sde", 0.7),
        plan="full",
        steps=300,
        prompts_per_step=16,
        group_size=24,
        updates=2,
        micro_batch=2,
        rollout_batch=8,
        lr=1e-4,
        advantage="batch",
        clip=1e-3,
        kl_beta=0.004,
        kl_form="no_dt",
        ema_decay=0.9,
        precision="bf16",
        gradient_checkpointing=True,
        eval_batch=4,
        diversity_prompts=4,
        diversity_samples=4,
    )


def fast() -> GRPO:
    """Two stochastic steps in the first half, coefficient-preserving noise, a tighter clip, no KL."""
    return replace(
        recipe(),
        noise=Noise("cps", 0.8),
        plan="window",
        window=2,
        window_last=9,
        clip=1e-5,
        kl_beta=0.0,
        kl_form="gaussian",
        updates=1,
    )


def frames() -> GRPO:
    """HPSv2.1 sees four frames: no video model is needed, and only these frames are decoded where that is possible."""
    return replace(
        recipe(),
        rewards={'segmental(reward="hpsv21")': 1.0},
        judges=(
            "motion_smoothness",
            "flow_magnitude",
            'per_frame_mean(reward="aesthetic")',
            "video_reward(media_fps=25)",
        ),
    )
