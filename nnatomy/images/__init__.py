"""Models that read images too: prompts with images, which positions are an image's, and the vision side by names.

`media` turns prompts with images into what a model is given, `tokens` says where the images are, `vision` has the names of a
trace.
"""

from nnatomy.images.tokens import ImageTokens as ImageTokens
