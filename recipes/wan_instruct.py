"""InstructVideo on Wan 2.1 T2V 1.3B: HPSv2 on a few frames, by editing videos part of the way (arXiv 2312.12490).

Command:   alignkit run wan_instruct           (edits what the model itself draws)
           alignkit run wan_instruct:videos    (edits your videos, as the paper does, and samples nothing)
Measured:  not yet run at full size. For its own model the paper reports HPSv2 0.2542 -> 0.2717 on prompts of animals,
           and that three quarters of the raters prefer the look of its videos to the base's.
Hardware:  `alignkit plan wan_instruct`: 13 GiB of weights in bf16, most of it the text encoder, and 3.9 GB of
           HPSv2. The gradient passes one denoiser call and the decoder of the frames that are judged; one 80 GB GPU.
Data:      `videos` reads `data/videos.jsonl`, lines of {"prompt", "video"}, the videos beside it.
Sources:   reward, segments, attenuation, share of 0.6 of 20 steps, learning rate, batch and guidance are the paper's;
           it warns of training longer than 20,000 such steps, and of editing more than 0.7 or less than 0.5. Here the
           steps are the pipeline's own, shifted as it does. Size and frames are those of `wan_grpo`.
Prompts:   48 of our own, to begin with (`--prompts FILE`).
"""

from dataclasses import replace

from alignkit.policy import LoRA
from alignkit.training.instruct_video import InstructVideo


def recipe() -> InstructVideo:
    return InstructVideo(
        model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        prompts="shipped:recipes/prompts/video.txt",
        eval_prompts="shipped:recipes/prompts/video_held_out.txt",
        rewards={'segmental(reward="hpsv2", normalised=False)': 1.0},
        judges=("motion_smoothness", "flow_magnitude", 'per_frame_mean(reward="aesthetic")', "video_reward"),
        call={"height": 240, "width": 416, "num_frames": 33, "guidance_scale": 5.0},
        train=LoRA(rank=16, alpha=16.0),
        num_steps=20,
        eval_steps=50,
        start=0.6,
        steps=2000,
        prompts_per_step=8,
        group_size=1,
        micro_batch=1,
        rollout_batch=4,
        lr=1e-5,
        precision="bf16",
        gradient_checkpointing=True,
        eval_batch=4,
        diversity_prompts=4,
        diversity_samples=4,
    )


def videos() -> InstructVideo:
    """The paper finds that it matters which videos are edited, and that good ones keep the model longer."""
    return replace(recipe(), prompts=None, data="data/videos.jsonl", steps=20000)
