"""MiCo-Chat: any mix of image, audio, video, depth and normals, one encoder, one language model.

Importing the package does nothing else; the heavy parts are imported where they are used.
"""

__version__ = "0.2.0"
