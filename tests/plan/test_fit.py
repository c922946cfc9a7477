"""What does not fit says what is over, by how much, and which keys would help, from the plan's own numbers."""

import pytest

from streamdit_jax.errors import ConfigError
from streamdit_jax.plan.fit import require_fit, size, too_large
from streamdit_jax.plan.report import named_sizes

GIB = 2**30
TRAIN = {
    "what": "train",
    "stage": "flow_matching",
    "topology": "v5e:4x4",
    "devices": 16,
    "mesh": {"data": 4, "fsdp": 4, "window": 1, "tensor": 1},
    "batch_size": 128,
    "accumulate": 2,
    "remat": "dots",
    "precision": "bfloat16",
    "argument_bytes_per_device": 4 * GIB,
    "temporary_bytes_per_device": 13 * GIB,
    "hbm_bytes_per_device": 16 * GIB,
}


def test_what_fits_is_let_through():
    require_fit(TRAIN | {"temporary_bytes_per_device": 11 * GIB}, 0.95)


def test_activations_that_do_not_fit():
    with pytest.raises(ConfigError) as refused:
        require_fit(TRAIN, 0.95)
    message = str(refused.value)
    assert "\n" not in message
    assert message.startswith(
        "training.flow_matching does not fit v5e:4x4: 17.0 GiB of 15.2 GiB (95% of 16.0 GiB) per device, 1.8 GiB too "
        "much: arguments 4.0 GiB, temporaries 13.0 GiB; try dit.remat=full (now dots), or "
        "training.flow_matching.accumulate=8 or a smaller batch_size (4 examples are on a device at once)"
    )


def test_a_state_that_does_not_fit_asks_for_more_cuts_first():
    sizes = TRAIN | {"argument_bytes_per_device": 20 * GIB, "temporary_bytes_per_device": 0}
    with pytest.raises(ConfigError, match=r"20\.0 GiB alone; try a larger mesh\.fsdp or mesh\.tensor .*cut in 4 of 16"):
        require_fit(sizes, 1.0)


def test_one_example_alone_asks_for_window_or_tensor():
    sizes = TRAIN | {"batch_size": 16, "accumulate": 1, "remat": "full"}
    with pytest.raises(ConfigError, match=r"; try a larger mesh\.window or mesh\.tensor \(a device has one example"):
        require_fit(sizes, 0.95)


def test_a_stream_that_does_not_fit():
    stream = {
        name: value for name, value in TRAIN.items() if name not in ("stage", "batch_size", "accumulate", "remat")
    }
    stream |= {"what": "stream", "precision": "float32"}
    with pytest.raises(
        ConfigError, match=r"^the streaming step does not fit .* try --precision=bfloat16, or a larger mesh\.w"
    ):
        require_fit(stream, 0.95)


@pytest.mark.parametrize(
    "message, named",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (2.56T) "
            "exceeds available HBM (95.74G).",
            {"temporary_bytes_per_device": int(2.56 * 2**40)},
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 17.50G "
            "of 15.75G hbm. Exceeded hbm capacity by 1.75G.",
            {"used_bytes_per_device": int(17.5 * GIB)},
        ),
        ("RESOURCE_EXHAUSTED: something else", {}),
    ],
)
def test_what_the_compiler_says(message, named):
    assert named_sizes(message) == named
    told = str(too_large(TRAIN | {"temporary_bytes_per_device": 0} | named, 0.95, message))
    assert told.count("\n") == 0 and "does not fit v5e:4x4" in told
    if not named:
        assert "something else" in told
    elif "temporary_bytes_per_device" in named:
        assert "temporaries 2.6 TiB" in told
    else:
        assert "17.5 GiB of 15.2 GiB" in told


def test_sizes_for_readers():
    assert [size(count) for count in (0, 1536, 3 * 2**20, 7.75 * GIB, 2**41)] == [
        "0.0 KiB",
        "1.5 KiB",
        "3.0 MiB",
        "7.8 GiB",
        "2.0 TiB",
    ]
