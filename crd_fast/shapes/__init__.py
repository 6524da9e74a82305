"""The shapes world: a tiny, exactly scorable stand-in for text-to-image data.

`world` makes prompts, scenes and true renders; `detector` reads images back into detections. Neither knows about
models, rewards or training.
"""
