"""Every operation's tables hold together: what is preferred is there, and some backend takes whatever comes."""

import pytest

from streamdit_jax.kernels import residual_norm, text_attention, window_attention
from streamdit_jax.kernels.dispatch import dispatch

OPERATIONS = {
    "window attention": (window_attention.BACKENDS, window_attention.PREFERENCE, "xla"),
    "packed window attention": (window_attention.PACKED, window_attention.PACKED_PREFERENCE, "taken apart"),
    "text attention": (text_attention.BACKENDS, text_attention.PREFERENCE, "xla"),
    "residual norm": (residual_norm.BACKENDS, residual_norm.PREFERENCE, "xla"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_preference_has_a_backend_and_ends_with_one_that_takes_all(operation):
    backends, preference, last = OPERATIONS[operation]
    assert preference.keys() == {"cpu", "gpu", "tpu"}
    for names in preference.values():
        assert set(names) <= backends.keys() and "reference" not in names and names[-1] == last


def test_a_platform_that_no_one_names_does_as_cpus_do(monkeypatch):
    class Described:
        platform, device_kind = "metal", "another"

    monkeypatch.setattr("streamdit_jax.kernels.dispatch.sharding.target", Described)
    assert dispatch("nothing", {"plain": lambda x: x + 1}, {"cpu": ("plain",), "gpu": ()})(1) == 2
