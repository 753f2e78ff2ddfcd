"""The speed of decoding is reported only if the timings resolve it, and for any vocabulary."""

import types

import jax
import pytest

from gpt4o_jax.config import ModelConfig
from gpt4o_jax.model import gpt
from gpt4o_jax.ops.compute import Compute
from gpt4o_jax.sampling import throughput


@pytest.mark.parametrize(
    ("whole", "alone", "told"),
    [
        ([9.0, 5.0, 4.0], [9.0, 2.0, 3.0], 2 * 7 / 2),  # the first run of each compiles
        ([9.0, 3.0, 5.0], [9.0, 4.0, 2.0], None),
        ([9.0, 2.0, 2.0], [9.0, 3.0, 3.0], None),
        ([9.0, 2.0, 2.0], [9.0, 2.0, 2.0], None),
    ],
)
def test_decoding_alone_has_a_speed_only_beyond_the_noise(monkeypatch, whole, alone, told):
    now, durations = [0.0], iter(whole + alone)
    monkeypatch.setattr(throughput, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(throughput, "generate", lambda *_, **__: now.append(now.pop() + next(durations)))
    model = types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=9))
    found = throughput.measure(model, {}, batch=2, prompt_tokens=3, new_tokens=8, repeats=2)
    assert found["decode_tokens_per_second"] == told and found["prompt_tokens_per_second"] > 0


def test_a_vocabulary_smaller_than_the_ids_reserved_by_our_tokenizers_is_measured_too(one_device):
    model = gpt.GPT(ModelConfig(vocab_size=8, context_length=8, n_layers=1, d_model=16, n_heads=2), Compute("cpu", "float32"))
    found = throughput.measure(model, gpt.init(model, jax.random.key(0)), batch=1, prompt_tokens=3, new_tokens=2, repeats=1)
    assert found["tokens_per_second"] > 0
