"""All settings at their defaults, which every other config starts from.

The defaults and their descriptions are in gpt4o_jax/config.py;
`python -m gpt4o_jax train --help` prints them.
"""

from gpt4o_jax.config import base_config


def get_config():
    return base_config()
