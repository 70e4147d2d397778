"""The rewards that have a short name, and where each of them lives."""

from __future__ import annotations

TABLE: dict[str, str] = {
    # preference
    "clip_score": "alignkit.rewards.clip:CLIPScore",
    "open_clip": "alignkit.rewards.openclip:OpenCLIP",
    "pickscore": "alignkit.rewards.clip:PickScore",
    "hpsv2": "alignkit.rewards.hps:HPSv2",
    "hpsv21": "alignkit.rewards.hps:HPSv21",
    "social_reward": "alignkit.rewards.hps:SocialReward",
    "aesthetic": "alignkit.rewards.aesthetic:Aesthetic",
    "mps": "alignkit.rewards.mps:MPS",
    "image_reward": "alignkit.rewards.image_reward:ImageReward",
    "hpsv3": "alignkit.rewards.hpsv3:HPSv3",
    "unified_reward": "alignkit.rewards.unified_reward:UnifiedReward",
    # features
    "dino_similarity": "alignkit.rewards.dino:DinoSimilarity",
    "dino_style": "alignkit.rewards.dino:DinoStyle",
    "critic": "alignkit.rewards.critic:CriticReward",
    # text
    "ocr": "alignkit.rewards.ocr:OCR",
    "ocr_video": "alignkit.rewards.ocr:OCRVideo",
    "tesseract": "alignkit.rewards.tesseract:Tesseract",
    # composition of the picture
    "geneval": "alignkit.rewards.composition:GenEval",
    "box_iou": "alignkit.rewards.layout:BoxIoU",
    # judges
    "yes_probability": "alignkit.rewards.judges:YesProbability",
    "yes_against_reference": "alignkit.rewards.judges:YesAgainstReference",
    "rating": "alignkit.rewards.ratings:Rating",
    "checklist": "alignkit.rewards.checklist:Checklist",
    "pair_judge": "alignkit.rewards.ratings:PairJudge",
    "unified_reward_pair": "alignkit.rewards.unified_reward:UnifiedRewardPair",
    "win_rate": "alignkit.rewards.win_rate:WinRate",
    # self
    "self_reward": "alignkit.rewards.understanding:SelfReward",
    "region_map": "alignkit.rewards.region_map:RegionMap",
    "solace": "alignkit.rewards.solace:Solace",
    "noise_aware": "alignkit.rewards.noise_aware:NoiseAwareReward",
    # video
    "video_reward": "alignkit.rewards.video_reward:VideoReward",
    "segmental": "alignkit.rewards.video:Segmental",
    "per_frame_mean": "alignkit.rewards.per_frame:PerFrameMean",
    "frame_difference": "alignkit.rewards.video:FrameDifference",
    "flow_magnitude": "alignkit.rewards.video:FlowMagnitude",
    "motion_smoothness": "alignkit.rewards.video:MotionSmoothness",
    # rewards of rewards
    "gated": "alignkit.rewards.composed:Gated",
    "hybrid": "alignkit.rewards.composed:Hybrid",
    # statistics
    "sign_color": "alignkit.rewards.color:SignColor",
    "brightness": "alignkit.rewards.statistics:Brightness",
    "jpeg_compressibility": "alignkit.rewards.jpeg:JPEGCompressibility",
    "jpeg_incompressibility": "alignkit.rewards.jpeg:JPEGIncompressibility",
}
