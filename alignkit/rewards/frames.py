"""Which frames of a video a reward looks at: the choices that files are read with."""

from __future__ import annotations

from alignkit.data.frames import count_at_rate, every_nth, middles, one_per_segment, segments, uniform

__all__ = ["count_at_rate", "every_nth", "middles", "one_per_segment", "segments", "uniform"]
