"""miniclip: CLIP from scratch, a book that is a library."""

from miniclip.loss import clip_loss, siglip_loss
from miniclip.model import CLIP, load, save

__version__ = "0.1.0"
__all__ = ["CLIP", "clip_loss", "load", "save", "siglip_loss"]
