"""Every option of a run, typed (`options`) and validated once (`checks`)."""

from silkie.config.options import SilkieDPOConfig

__all__ = ["SilkieDPOConfig"]
