"""DanceGRPO on HunyuanVideo towards VideoReward (arXiv 2505.07818, 2501.13918).

Command:   alignkit run hunyuan_grpo
           alignkit run hunyuan_grpo:frames    (an image reward on four frames, less the farther from the centre)
           alignkit run hunyuan_grpo:mixgrpo   (four stochastic steps that slide; arXiv 2507.21802)
Measured:  not yet run at full size.
Hardware:  `alignkit plan hunyuan_grpo`: 39 GiB of weights in bf16, 24 of them the denoiser, and 5 GB of VideoReward.
           A round is 384 videos and keeps 43 GiB of their latents, so eight 80 GB GPUs (`accelerate launch`), each
           with 48 of them and a micro-batch of one.
Sources:   noise level, frames, steps, groups of 24 with one initial noise, clip, share of trained steps and no KL are
           those of the released HunyuanVideo configuration. Deviations: LoRA with a learning rate that suits it, where
           all weights are trained at 1e-5; the pipeline's own time shift, 7, instead of 5; scores from alignkit's
           text of VideoReward's questions (`template`). Guidance is an input of this distilled model: one row a step.
Prompts:   48 of our own, to begin with (`--prompts FILE`).
"""

from dataclasses import replace

from alignkit.flow.transition import Noise
from alignkit.policy import LoRA
from alignkit.training.grpo import GRPO


def recipe() -> GRPO:
    return GRPO(
        model="hunyuanvideo-community/HunyuanVideo",
        prompts="shipped:recipes/prompts/video.txt",
        eval_prompts="shipped:recipes/prompts/video_held_out.txt",
        rewards={"video_reward(media_fps=24)": 1.0},
        judges=("motion_smoothness", "flow_magnitude", 'per_frame_mean(reward="aesthetic")'),
        call={"height": 480, "width": 640, "num_frames": 53, "guidance_scale": 6.0},
        train=LoRA(rank=64, alpha=128.0),
        num_steps=16,
        eval_steps=50,
        noise=Noise("dance_sde", 0.25),
        shared_noise=True,
        plan="random",
        window=9,  # 0.6 of the 15 steps that can be trained
        steps=200,
        prompts_per_step=16,
        group_size=24,
        updates=2,
        micro_batch=1,
        rollout_batch=24,  # groups that share noise are sampled whole
        lr=1e-4,
        clip=1e-4,
        advantage_clip=5.0,
        precision="bf16",
        gradient_checkpointing=True,
        eval_batch=2,
        diversity_prompts=4,
        diversity_samples=4,
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
            "video_reward(media_fps=24)",
        ),
    )


def mixgrpo() -> GRPO:
    """Four of 15 steps are stochastic and trained; they move by one every 25 rounds."""
    return replace(recipe(), noise=Noise("flow_sde", 0.7), plan="sliding", window=4, slide_every=25)
