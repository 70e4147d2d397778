"""Drawing with a pipeline: plain sampling, with LoRA files."""
