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
    # features
    "dino_similarity": "alignkit.rewards.dino:DinoSimilarity",
    "dino_style": "alignkit.rewards.dino:DinoStyle",
    "critic": "alignkit.rewards.critic:CriticReward",
    # text
    "ocr": "alignkit.rewards.ocr:OCR",
    "ocr_video": "alignkit.rewards.ocr:OCRVideo",
    "tesseract": "alignkit.rewards.tesseract:Tesseract",
    # composition of the picture
    # judges
    # self
    "self_reward": "alignkit.rewards.understanding:SelfReward",
    "region_map": "alignkit.rewards.region_map:RegionMap",
    "solace": "alignkit.rewards.solace:Solace",
    # video
    "segmental": "alignkit.rewards.video:Segmental",
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
