"""`DiffusionTransformer`: a pipeline of diffusers under standard names, step by step; and methods on one.

It needs `pip install "nnatomy[diffusion]"`: see docs/diffusion.md.
"""

from nnatomy.diffusion.directions import Direction as Direction
from nnatomy.diffusion.head_ablation import head_ablation as head_ablation
from nnatomy.diffusion.prompt_patching import PromptPatching as PromptPatching
from nnatomy.diffusion.prompt_patching import prompt_patching as prompt_patching
from nnatomy.diffusion.transformer import DiffusionTransformer as DiffusionTransformer
from nnatomy.diffusion.word_maps import WordMaps as WordMaps
from nnatomy.diffusion.word_maps import word_maps as word_maps
