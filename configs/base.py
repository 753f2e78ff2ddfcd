"""Every knob at its default: what other configs start from.

The defaults themselves, with a sentence each, are in gpt4o_jax/config.py;
`python -m gpt4o_jax train --help` prints them.
"""

from gpt4o_jax.config import base_config


def get_config():
    return base_config()
