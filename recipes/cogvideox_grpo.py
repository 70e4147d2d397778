"""Policy gradient on CogVideoX 2B towards VideoReward (DDPO's sampler, arXiv 2305.13301; groups as in 2402.03300).

Command:   alignkit run cogvideox_grpo
           alignkit run cogvideox_grpo:fast            (a window of four stochastic steps; arXiv 2507.21802)
           alignkit run cogvideox_grpo:five_billion    (CogVideoX 5B)
Measured:  not yet run at full size.
Hardware:  `alignkit plan cogvideox_grpo`: 12 GiB of weights in bf16 (5B: 20), most of it the text encoder, and
           5 GB of VideoReward. A round keeps 36 GiB of latents of its 384 videos (`fast`: 8): two 80 GB GPUs.
Sources:   this model predicts v on a variance-preserving path whose first step has no signal, so its noise is DDIM's
           with eta 1, which is exact there; Flow-SDE is for flows. Size, frames, steps and guidance are the model
           card's but for fewer steps and frames; rank, groups and clip as in `wan_grpo`, untuned here; a KL of the
           step's own Gaussian instead of the published coefficients, which are for flows. Dynamic guidance
           (`use_dynamic_cfg`) is left off: it is part of what is trained if you switch it on.
Prompts:   48 of our own, to begin with (`--prompts FILE`).
"""

from dataclasses import replace

from alignkit.flow.transition import Noise
from alignkit.policy import LoRA
from alignkit.training.grpo import GRPO


def recipe() -> GRPO:
    return GRPO(
        model="THUDM/CogVideoX-2b",
        prompts="shipped:recipes/prompts/video.txt",
        eval_prompts="shipped:recipes/prompts/video_held_out.txt",
        rewards={"video_reward(media_fps=8)": 1.0},
        judges=("motion_smoothness", "flow_magnitude", 'per_frame_mean(reward="aesthetic")'),
        call={"height": 480, "width": 720, "num_frames": 17, "guidance_scale": 6.0},
        train=LoRA(rank=32, alpha=64.0),
        num_steps=20,
        eval_steps=50,
        noise=Noise("ddim", 1.0),
        plan="full",
        steps=300,
        prompts_per_step=16,
        group_size=24,
        updates=2,
        micro_batch=1,
        rollout_batch=4,
        lr=1e-4,
        advantage="batch",
        clip=1e-4,
        kl_beta=0.01,
        ema_decay=0.9,
        precision="bf16",
        gradient_checkpointing=True,
        eval_batch=4,
        diversity_prompts=4,
        diversity_samples=4,
    )


def fast() -> GRPO:
    """Noise, and training, at four steps of the first half: a quarter of the backward passes."""
    return replace(recipe(), plan="window", window=4, window_last=9, kl_beta=0.0)


def five_billion() -> GRPO:
    return replace(recipe(), model="THUDM/CogVideoX-5b")
