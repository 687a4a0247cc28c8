"""The calls of published libraries, under their own names: change the import and nothing else.

``natten`` (release 0.21), ``natten017`` (releases up to 0.17), ``image_local_attention`` and
``image_local_attention_fork``.
"""

from . import image_local_attention, image_local_attention_fork, natten, natten017

__all__ = ["image_local_attention", "image_local_attention_fork", "natten", "natten017"]
