"""miniclip: CLIP from scratch, a book that is a library."""

from importlib.metadata import version

from miniclip.loss import clip_loss, siglip_loss
from miniclip.model import (
    CLIP,
    CONFIGS,
    CLIPConfig,
    preprocess,
    save,
)
from miniclip.pretrained import available_models, load
from miniclip.tokenizer import Tokenizer, tokenize, train_bpe

__version__ = version("miniclip")
__all__ = [
    "CLIP",
    "CONFIGS",
    "CLIPConfig",
    "Tokenizer",
    "available_models",
    "clip_loss",
    "load",
    "preprocess",
    "save",
    "siglip_loss",
    "tokenize",
    "train_bpe",
]
