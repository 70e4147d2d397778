"""Flow-RWR on LTX-Video 2B: videos weighted by what VideoReward says of them (VideoAlign, arXiv 2501.13918).

Command:   alignkit pairs ltx_grpo --samples 8 --min-margin 0.5 --out data/ltx_pairs    (the samples of ltx_dpo)
           alignkit run ltx_rwr
           alignkit run ltx_rwr:sft       (the best of each prompt's samples, unweighted)
           alignkit run ltx_rwr:online    (new samples every round, held by the W2 anchor of ORW-CFM; arXiv 2502.06061)
Measured:  not yet run at full size; the paper finds that RWR and SFT barely move its model, and that DPO does.
Hardware:  as ltx_dpo, without the reference's forward.
Sources:   as wan_rwr, in the size of ltx_grpo.
"""

from dataclasses import replace

from alignkit.policy import LoRA
from alignkit.training.matching import Levels
from alignkit.training.rwr import ORW, RWR, SFT

VIDEO = {
    "model": "Lightricks/LTX-Video",
    "eval_prompts": "shipped:recipes/prompts/video_held_out.txt",
    "rewards": {"video_reward(media_fps=25)": 1.0},
    "judges": ("motion_smoothness", "flow_magnitude", 'per_frame_mean(reward="aesthetic")'),
    "call": {"height": 320, "width": 512, "num_frames": 49},
    "guidance_baseline": {"guidance_scale": 3.0},
    "train": LoRA(rank=64, alpha=128.0),
    "num_steps": 20,
    "eval_steps": 50,
    "levels": Levels("uniform"),
    "draws": 1,
    "steps": 400,
    "warmup": 20,
    "prompts_per_step": 16,
    "group_size": 8,
    "micro_batch": 4,
    "lr": 5e-6,
    "caption_dropout": 0.1,
    "precision": "bf16",
    "gradient_checkpointing": True,
    "eval_batch": 4,
    "diversity_prompts": 4,
    "diversity_samples": 4,
}
SAMPLES = "data/ltx_pairs/samples.jsonl"


def recipe() -> RWR:
    return RWR(**VIDEO, prompts=None, data=SAMPLES, temperature=1.0)


def sft() -> SFT:
    """Only the best sample of each prompt."""
    return SFT(**VIDEO, prompts=None, data=SAMPLES)


def online() -> ORW:
    """Without an anchor every round would sharpen the last one, down to a single video per prompt."""
    own = {**VIDEO, "prompts": "shipped:recipes/prompts/video.txt", "steps": 100, "draws": 4, "rollout_batch": 8}
    return replace(ORW(**own), temperature=1.0, velocity_beta=0.5, lr=1e-5)
