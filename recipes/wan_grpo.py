"""Flow-GRPO on Wan 2.1 T2V 1.3B towards VideoReward (arXiv 2505.05470, 2501.13918).

Command:   alignkit run wan_grpo
           alignkit run wan_grpo:dance     (DanceGRPO's noise and groups; arXiv 2505.07818)
           alignkit sample Wan-AI/Wan2.1-T2V-1.3B-Diffusers "PROMPT" --guide fk --reward video_reward --steps 20
               --set height=240 width=416 num_frames=33    (no training: guidance while sampling; --plan says its cost)
Measured:  not yet run at full size.
Hardware:  13 GiB of weights in bf16, most of it the text encoder, and 5 GB of VideoReward; one 80 GB GPU.
Sources:   size, frames, steps, KL, learning rate and clip are those of the released Wan configuration of Flow-GRPO;
           rank and groups as for SD3.5. VideoReward's scores are a sum of three z-scores; the released templates of its
           questions are its authors': give them as `template`.
Prompts:   48 of our own, to begin with (`--prompts FILE`).
"""

from dataclasses import replace

from alignkit.flow.transition import Noise
from alignkit.policy import LoRA
from alignkit.training.grpo import GRPO


def recipe() -> GRPO:
    return GRPO(
        model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        prompts="shipped:recipes/prompts/video.txt",
        eval_prompts="shipped:recipes/prompts/video_held_out.txt",
        rewards={"video_reward": 1.0},
        judges=("motion_smoothness", "flow_magnitude", 'per_frame_mean(reward="aesthetic")'),
        call={"height": 240, "width": 416, "num_frames": 33, "guidance_scale": 4.5},
        train=LoRA(rank=32, alpha=64.0),
        num_steps=20,
        eval_steps=50,
        noise=Noise("flow_sde", 0.7),
        plan="full",
        steps=300,
        prompts_per_step=16,
        group_size=24,
        updates=2,
        micro_batch=1,
        rollout_batch=4,
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


def dance() -> GRPO:
    """Constant noise, one initial noise per group, a random 0.6 of the steps, no KL: DanceGRPO on HunyuanVideo."""
    return replace(
        recipe(),
        noise=Noise("dance_sde", 0.25),
        shared_noise=True,
        rollout_batch=24,  # groups that share noise are sampled whole
        plan="random",
        window=11,
        clip=1e-4,
        advantage="group",
        kl_beta=0.0,
    )
